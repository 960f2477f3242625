"""Checkpoints in FP8 as DeepSeek publishes them, on CPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, make_prompt
from fp8_checkpoints import (
    E4M3_MAX,
    dequantize_blocks,
    edit_config,
    load_dequantized,
    quantize_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from minidcp import LLM, SamplingParams
from minidcp.kernels.fp8 import Fp8Tensor
from minidcp.model_config import ModelConfig
from minidcp.models.checkpoint import CheckpointSource
from minidcp.models.weights import Shard

BLOCK = (16, 24)  # of which the matrices' sizes are no multiples, nor are the ranks' shares


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8")
    make_checkpoint(path, "v3", seed=10)
    quantize_checkpoint(path, BLOCK)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> DeepseekV3ForCausalLM:
    return load_dequantized(checkpoint, tmp_path_factory.mktemp("dequantised"))


@pytest.mark.parametrize(("tp", "dcp"), [(1, 1), (2, 2), (4, 2), (8, 8)])
def test_logits_are_those_of_the_dequantised_model(
    checkpoint: Path, model: DeepseekV3ForCausalLM, tp: int, dcp: int
) -> None:
    prompts = [make_prompt(length, 128) for length in (1, 7, 33, 100)]
    options = dict(tp_size=tp, dcp_size=dcp, ranks="threads", device="cpu", max_model_len=256)
    with LLM(str(checkpoint), dtype="float32", quantization="none", **options) as llm:
        actual = score(llm, prompts)
    for prompt, row in zip(prompts, actual, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert (row - expected).norm() / expected.norm() < 1e-4


def score(llm: LLM, prompts: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary behind each prompt."""
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=128)
    scores = torch.empty(len(prompts), 128)
    for row, output in zip(scores, llm.generate(prompts, params), strict=True):
        for token, value in output.outputs[0].logprobs[0].top:
            row[token] = value
    return scores


@torch.no_grad()
def score_rounding(
    model: DeepseekV3ForCausalLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """The same of transformers' model, whose products round their inputs to e4m3.

    A row of inputs is less than 128 here, so it has one scale. W_UK and W_UV, the router and the
    head take inputs as they are.
    """
    plain = torch.nn.functional.linear
    exact = {
        parameter.data_ptr()
        for name, parameter in model.named_parameters()
        if any(part in name for part in ("kv_b_proj", "mlp.gate.", "lm_head"))
    }

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: object = None) -> torch.Tensor:
        if weight.data_ptr() not in exact:
            assert x.shape[-1] <= 128
            scale = x.abs().amax(-1, keepdim=True) / E4M3_MAX
            x = (x / scale).to(torch.float8_e4m3fn).float() * scale
        return plain(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    model.set_experts_implementation("eager")  # each expert by itself, with `linear`
    logits = [model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    return torch.stack(logits).log_softmax(-1)


def test_products_in_fp8_round_their_inputs(
    checkpoint: Path, model: DeepseekV3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [make_prompt(length, 128) for length in (1, 7, 33, 100)]
    options = dict(device="cpu", dtype="float32", max_model_len=256)
    with LLM(str(checkpoint), quantization="fp8", **options) as llm:
        actual = score(llm, prompts)
    expected = score_rounding(model, prompts, monkeypatch)
    assert (actual - expected).norm() / expected.norm() < 1e-4


@torch.no_grad()
def test_ranks_in_fp8(checkpoint: Path, model: DeepseekV3ForCausalLM) -> None:
    """A rank rounds its own inputs, with scales of its own. So results on more ranks are off by
    another error than one rank's, but one of the same size."""
    prompts = [make_prompt(length, 128) for length in (1, 7, 33, 100)]
    logits = [model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    exact = torch.stack(logits).log_softmax(-1)
    options = dict(device="cpu", dtype="float32", max_model_len=256, quantization="fp8")
    errors = []
    for tp, dcp in ((1, 1), (2, 2), (4, 2), (8, 8)):
        with LLM(str(checkpoint), tp_size=tp, dcp_size=dcp, ranks="threads", **options) as llm:
            errors.append(float((score(llm, prompts) - exact).norm() / exact.norm()))
    assert min(errors) > 0
    assert max(errors) < 1.5 * errors[0], errors


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_that_cut_blocks(
    checkpoint: Path, model: DeepseekV3ForCausalLM, dim: int, count: int
) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    expected = model.get_parameter(name).detach()
    source = CheckpointSource(checkpoint, torch.float32, torch.device("cpu"), fp8_block=BLOCK)
    shape = tuple(expected.shape)
    parts = [source.read(name, shape, Shard(dim, index, count)) for index in range(count)]
    source.close()
    whole = torch.cat(parts, dim).narrow(dim, 0, shape[dim])
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_stay_in_fp8(
    checkpoint: Path, model: DeepseekV3ForCausalLM, dim: int, count: int
) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    expected = model.get_parameter(name).detach()
    cpu = torch.device("cpu")
    source = CheckpointSource(checkpoint, torch.float32, cpu, fp8_block=BLOCK, fp8=True)
    shape = tuple(expected.shape)
    parts = []
    for index in range(count):
        part = source.read_matrix(name, shape, Shard(dim, index, count))
        assert isinstance(part, Fp8Tensor)
        parts.append(part.dequantize())
    source.close()
    assert not source.quantized
    whole = torch.cat(parts, dim).narrow(dim, 0, shape[dim])
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("kept", ["q_a_proj", "mlp.up_proj", "experts.3.gate_proj"])
def test_matrices_that_are_kept_in_more_bits(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: str
) -> None:
    """They are quantised too, with a warning: some are stacked, or joined, with others."""
    tensors = load_file(checkpoint / "model.safetensors")
    names = [name for name in tensors if name.endswith(f"{kept}.weight")]
    for name in names:
        tensors[name] = dequantize_blocks(tensors[name], tensors.pop(f"{name}_scale_inv"), BLOCK)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())

    prompts = [make_prompt(length, 128) for length in (7, 33)]
    options = dict(device="cpu", dtype="float32", max_model_len=256, quantization="fp8")
    with LLM(str(checkpoint), **options) as llm:
        expected = score(llm, prompts)
    with caplog.at_level("WARNING"), LLM(str(tmp_path), **options) as llm:
        actual = score(llm, prompts)
    assert f"quantised {len(names)} matrices to FP8 that the checkpoint keeps" in caplog.text
    assert (actual - expected).norm() / expected.norm() < 0.1


def test_scales_that_are_powers_of_two(checkpoint: Path, tmp_path: Path) -> None:
    """As DeepSeek-V3.1's are, which may be stored as exponents."""
    tensors = load_file(checkpoint / "model.safetensors")
    as_floats, as_exponents = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            exponents = tensor.log2().ceil().exp2().to(torch.float8_e8m0fnu)
            as_exponents[name] = exponents
            as_floats[name] = exponents.float()
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    options = dict(device="cpu", dtype="float32", max_model_len=256)
    scores = []
    for changed in (as_floats, as_exponents):
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with LLM(str(tmp_path), **options) as llm:
            scores.append(score(llm, [make_prompt(33, 128)]))
    # The weights lie elsewhere in the file, and so in memory, which may change the last bits.
    torch.testing.assert_close(*scores)


def test_what_does_not_fit_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    scale = "model.layers.0.mlp.up_proj.weight_scale_inv"
    tensors = load_file(checkpoint / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())

    def refuse(changed: dict[str, torch.Tensor], words: str) -> None:
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError) as refused:
            LLM(str(tmp_path), device="cpu", ranks="threads").close()
        assert words in str(refused.value)

    without = {name: tensor for name, tensor in tensors.items() if name != scale}
    refuse(without, f"1 missing: {scale}")
    refuse(tensors | {scale: tensors[scale][:-1].clone()}, f"1 of another shape: {scale}")
    refuse(tensors | {scale: tensors[scale][:-1].clone()}, "with weight_block_size [16, 24]")
    as_int8 = tensors[scale.removesuffix("_scale_inv")].view(torch.int8)
    refuse(tensors | {scale.removesuffix("_scale_inv"): as_int8}, "of a dtype other than")
    edit_config(tmp_path, quantization_config=None)
    refuse(tensors, "FP8 needs a quantization_config with quant_method and weight_block_size")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(quant_method="awq"), "quant_method 'awq' is not supported; supported: 'fp8'"),
        (dict(weight_block_size=None), "weight_block_size None is not supported"),
        (dict(weight_block_size=[128]), "weight_block_size [128] is not supported"),
        (dict(weight_block_size=[0, 128]), "weight_block_size [0, 128] is not supported"),
        (dict(activation_scheme="static"), "activation_scheme 'static' is not supported"),
        (dict(fmt="e5m2"), "fmt 'e5m2' is not supported; supported: 'e4m3'"),
        (dict(bits=4), "has 'bits', which is not supported"),
    ],
)
def test_other_quantisations_are_refused(
    checkpoint: Path, changes: dict[str, object], words: str
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] |= changes
    with pytest.raises(ValueError, match="quantization_config") as refused:
        ModelConfig.from_dict(config)
    assert words in str(refused.value)
