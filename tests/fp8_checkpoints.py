"""Checkpoints in FP8 as DeepSeek publishes them: e4m3 matrices with a scale for each block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

E4M3_MAX = 448.0
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.")  # DeepSeek-V3 keeps these
FILE = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"

Block = tuple[int, int]  # rows and columns that share a scale


def split_blocks(matrix: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in e4m3, and the scale of each block."""
    rows, columns = matrix.shape
    num_rows, num_columns = -(-rows // block[0]), -(-columns // block[1])
    quantised = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(num_rows, num_columns)
    for i in range(num_rows):
        for j in range(num_columns):
            place = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scales[i, j] = matrix[place].abs().max() / E4M3_MAX
            quantised[place] = (matrix[place] / scales[i, j]).to(torch.float8_e4m3fn)
    return quantised, scales


def dequantize_blocks(tensor: torch.Tensor, scales: torch.Tensor, block: Block) -> torch.Tensor:
    rows, columns = tensor.shape
    scales = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return tensor.float() * scales[:rows, :columns]


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def quantize_checkpoint(path: Path, block: Block, spread: float = 1.0) -> None:
    """Quantise a checkpoint in its place, into one file.

    With a spread the scales are multiplied by random factors of up to that much, or divided. Then
    blocks differ, and one with the scale of another is far off.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[name] = tensor
            if tensor.dim() == 2 and not any(part in name for part in KEPT):
                tensors[name], scales = split_blocks(tensor.float(), block)
                exponents = 2 * torch.rand(scales.shape, generator=generator) - 1
                tensors[f"{name}{SCALE_SUFFIX}"] = scales * spread**exponents
        file.unlink()
    (path / f"{FILE}.index.json").unlink(missing_ok=True)
    save_file(tensors, path / FILE, {"format": "pt"})
    quantization = dict(
        quant_method="fp8",
        fmt="e4m3",
        activation_scheme="dynamic",
        weight_block_size=list(block),
    )
    edit_config(path, quantization_config=quantization)


def load_dequantized(path: Path, scratch: Path) -> DeepseekV3ForCausalLM:
    """transformers' model in fp32 with the same weights, dequantised as the format is defined.

    Its checkpoint is written into the folder `scratch`.
    """
    config = json.loads((path / "config.json").read_text())
    block = config.pop("quantization_config")["weight_block_size"]
    tensors = load_file(path / FILE)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        scales = tensors.get(f"{name}{SCALE_SUFFIX}")
        if scales is not None:
            weights[name] = dequantize_blocks(tensor, scales, block)
        elif not name.endswith(SCALE_SUFFIX):
            weights[name] = tensor
    (scratch / "config.json").write_text(json.dumps(config))
    save_file(weights, scratch / FILE, {"format": "pt"})
    return DeepseekV3ForCausalLM.from_pretrained(scratch, dtype=torch.float32).eval()
