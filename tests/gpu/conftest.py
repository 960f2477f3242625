"""GPU tests: `pytest -m gpu tests/gpu` on one or two Hopper GPUs, which ranks share with MPS."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import Oracle, make_checkpoint, make_prompt
from fp8_checkpoints import load_dequantized, quantize_checkpoint
from predictions import PredictionOracle, make_prediction_checkpoint

# The head dims that FA3 is compiled for. Everything else is tiny.
GPU_DIMS = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_size": 256,
    "moe_intermediate_size": 64,
    "intermediate_size": 256,
    "vocab_size": 512,
    "initializer_range": 0.08,
}


@pytest.fixture(scope="session", autouse=True)
def mps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """NVIDIA's multi-process service. Without it, ranks on one GPU take turns of milliseconds.

    A service that runs already is used as it is: several test runs can share it.
    """
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield
        return
    folder = tmp_path_factory.mktemp("mps")
    os.environ["CUDA_MPS_PIPE_DIRECTORY"] = str(folder / "pipe")
    os.environ["CUDA_MPS_LOG_DIRECTORY"] = str(folder / "log")
    for name in ("pipe", "log"):
        (folder / name).mkdir()
    subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True)
    yield
    # It ends after its last client, which is this process, so do not wait for it.
    subprocess.Popen(["sh", "-c", "echo quit | nvidia-cuda-mps-control"], start_new_session=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_gpu_checkpoint("v2", tmp_path_factory.mktemp("gpu-v2"))


@pytest.fixture(scope="session")
def lite_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_gpu_checkpoint("v2-lite", tmp_path_factory.mktemp("gpu-v2-lite"))


@pytest.fixture(scope="session")
def v3_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_gpu_checkpoint("v3", tmp_path_factory.mktemp("gpu-v3"))


@pytest.fixture(scope="session")
def glm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """With the head dims and the number of heads of GLM-4.7-Flash."""
    dims = dict(num_attention_heads=20, qk_nope_head_dim=192, v_head_dim=256)
    return make_gpu_checkpoint("glm", tmp_path_factory.mktemp("gpu-glm"), **dims)


@pytest.fixture(scope="session")
def fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """In DeepSeek-V3's blocks, of which experts and their shares on two ranks are no multiples.

    A token is sent to all experts, because rounding to FP8 would often choose others, and that
    would hide smaller errors.
    """
    path = tmp_path_factory.mktemp("gpu-fp8")
    every_expert = dict(n_routed_experts=8, num_experts_per_tok=8, n_group=1, topk_group=1)
    sizes = dict(q_lora_rank=64, moe_intermediate_size=192, initializer_range=0.05)
    oracle = make_gpu_checkpoint("v3", path, **every_expert, **sizes)
    quantize_checkpoint(path, (128, 128), spread=2.0)
    scratch = tmp_path_factory.mktemp("gpu-fp8-dequantised")
    return replace(oracle, model=load_dequantized(path, scratch))


@pytest.fixture(scope="session")
def mtp(tmp_path_factory: pytest.TempPathFactory) -> PredictionOracle:
    # FP8 on tensor cores: blocks of 32 columns at least.
    dims = GPU_DIMS | {"q_lora_rank": 64}
    return make_prediction_checkpoint(tmp_path_factory.mktemp("gpu-mtp"), **dims)


def make_gpu_checkpoint(style: str, path: Path, **changes: object) -> Oracle:
    """A bf16 checkpoint that FA3 can run, and prompts with lengths around the block edges."""
    model = make_checkpoint(path, style, seed=1, **(GPU_DIMS | changes))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            # So far apart that the rounding of bf16 seldom changes which experts are chosen.
            buffer.uniform_(5.0, 9.0)
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="5MB")
    prompts = [make_prompt(n, 512) for n in (1, 3, 7, 16, 17, 127, 128, 129, 300, 700)]
    return Oracle(path, model.float(), prompts, [], [])
