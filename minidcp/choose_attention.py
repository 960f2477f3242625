"""The choice of an attention back-end, a part of `resolve.py`: what was asked for, if it can run
the model here, else the fastest one that can."""

import logging
from collections.abc import Callable

from minidcp.config import EngineConfig, require
from minidcp.kernels.fa3 import COMPILED_DIMS
from minidcp.kernels.flashinfer import LEAST_CAPABILITY, find_dims_obstacle
from minidcp.machine import Machine, fa3_dims
from minidcp.model_config import ModelConfig

Report = Callable[[int, str], None]  # a logging level, and what was chosen and why

FETCH_FA3 = "minidcp fetch-fa3"


def choose_attention(
    config: EngineConfig,
    model: ModelConfig,
    machine: Machine,
    device: str,
    dtype: str,
    report: Report,
) -> str:
    """The back-end that was asked for, if it can run the model here."""
    backend = config.attention_backend
    if backend == "auto":
        return choose_fastest_attention(config, model, machine, device, dtype, report)
    if backend == "reference":
        return backend

    asked = f"--attention-backend {backend}"
    require(device == "cuda", f"{asked}: needs a CUDA device; use reference")
    require(dtype == "bfloat16", f"{asked}: needs --dtype bfloat16; reference takes any")
    if backend == "fa3":
        obstacle = find_fa3_obstacle(model, machine)
        require(not obstacle, f"{asked}: {obstacle}; use triton or auto")
    elif backend == "flashinfer":
        obstacle = find_flashinfer_obstacle(config, model, machine)
        require(not obstacle, f"{asked}: {obstacle}; use triton or auto")
    else:
        check_triton(model)
    return backend


def choose_fastest_attention(
    config: EngineConfig,
    model: ModelConfig,
    machine: Machine,
    device: str,
    dtype: str,
    report: Report,
) -> str:
    """FlashAttention-3 where it can run, else FlashInfer, else our Triton kernels; plain torch on
    CPUs.

    On a GPU plain torch is so slow that it must be asked for: it raises ValueError where none of
    the others can run the model, unless --dtype float32 leaves no choice.
    """
    if device == "cpu":
        return "reference"
    if dtype != "bfloat16":
        reason = "FlashAttention-3, FlashInfer and Triton need --dtype bfloat16"
        report(logging.WARNING, f"attention: reference, because {reason}")
        return "reference"

    obstacle = find_fa3_obstacle(model, machine)
    if not obstacle:
        return "fa3"
    reason = f"FlashAttention-3 {obstacle}"
    obstacle = find_flashinfer_obstacle(config, model, machine)
    if not obstacle:
        report(logging.INFO, f"attention: flashinfer, because {reason}")
        return "flashinfer"
    report(logging.WARNING, f"attention: triton, because {reason}, and FlashInfer {obstacle}")
    check_triton(model)
    return "triton"


def find_fa3_obstacle(model: ModelConfig, machine: Machine) -> str:
    """Why FlashAttention-3 cannot run this model here; empty if it can."""
    dims = fa3_dims(model)
    if dims not in COMPILED_DIMS:
        listed = " or ".join(str(compiled) for compiled in COMPILED_DIMS)
        compiled = f"kv_lora_rank, rope, qk and v dims {listed}"
        return f"is compiled for {compiled}, the model has {dims}"
    major, minor = machine.capability
    if major != 9:
        return f"needs a Hopper GPU (sm_90), this is sm_{major}{minor}"
    if machine.fa3_error:
        return f"is not installed ({machine.fa3_error}; get it with: {FETCH_FA3})"
    return ""


def find_flashinfer_obstacle(config: EngineConfig, model: ModelConfig, machine: Machine) -> str:
    """Why FlashInfer cannot run this model here; empty if it can."""
    if config.speculative_method == "mtp":
        return "plans on the host, which does not know where the drafts of mtp are"
    if (machine.torchrun_local_size or config.tp_size) > machine.num_gpus:
        return "needs a GPU for each rank, because a kernel of it waits for all multiprocessors"
    major, minor = machine.capability
    if machine.capability < LEAST_CAPABILITY:
        least = "".join(map(str, LEAST_CAPABILITY))
        return f"needs a GPU from sm_{least} on, this is sm_{major}{minor}"
    obstacle = find_dims_obstacle(model.kv_lora_rank, model.qk_rope_head_dim, machine.capability)
    if obstacle:
        return obstacle
    obstacle = find_flash2_obstacle(model)
    if obstacle:
        return f"leaves prompts to FlashAttention-2, which {obstacle}"
    return machine.flashinfer_error


def check_triton(model: ModelConfig) -> None:
    """Raises ValueError if our kernels, or torch's FlashAttention-2, cannot run the model."""
    asked = "--attention-backend triton"
    latent_dims = (model.kv_lora_rank, model.qk_rope_head_dim)
    require(
        all(is_power_of_two(dim) and dim >= 16 for dim in latent_dims),
        f"{asked}: kv_lora_rank and rope dims {latent_dims} must be powers of two from 16 on; "
        "use reference",
    )
    obstacle = find_flash2_obstacle(model)
    require(not obstacle, f"{asked}: FlashAttention-2 {obstacle}; use reference")


def find_flash2_obstacle(model: ModelConfig) -> str:
    """Why torch's FlashAttention-2 cannot run the model's prompts; empty if it can."""
    qk = model.qk_head_dim
    v = model.v_head_dim
    if v <= qk <= 256 and qk % 8 == 0 and v % 8 == 0:
        return ""
    return (
        f"needs qk and v head dims that are multiples of 8 and at most 256, the first not below "
        f"the second; the model has ({qk}, {v})"
    )


def is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0
