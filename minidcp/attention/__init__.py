"""Attention back-ends and the choice of one. The contract is in `base.py`."""

from __future__ import annotations

import logging

import torch

from minidcp.attention.base import AttentionBackend
from minidcp.config import ModelConfig, require

__all__ = ["AttentionBackend", "make_backend"]

logger = logging.getLogger("minidcp")


def make_backend(
    name: str, config: ModelConfig, num_heads: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> AttentionBackend:
    """The back-end for `--attention-backend name`; "auto" is FA3, else Triton, else plain torch on a CPU.

    Raises:
        ValueError: the back-end that was asked for cannot run here; the message says why.
    """
    if name == "auto":
        name = "reference" if device.type == "cpu" else choose_on_gpu(config, device, dtype)
    scale = config.softmax_scale
    if name == "reference":
        from minidcp.attention.reference import ReferenceBackend

        return ReferenceBackend(scale)
    require(device.type == "cuda", f"--attention-backend {name}: needs a CUDA device; use reference")
    require(
        dtype == torch.bfloat16, f"--attention-backend {name}: needs --dtype bfloat16; reference takes any"
    )
    if name == "triton":
        from minidcp.attention.triton import TritonBackend

        dims = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)
        require(
            all(d >= 16 and d & (d - 1) == 0 for d in dims),
            f"--attention-backend triton: dims {dims} must be powers of two from 16 on; use reference",
        )
        return TritonBackend(scale, config.qk_rope_head_dim, device)
    why = why_not_fa3(config, device)
    require(not why, f"--attention-backend fa3: {why}; use triton or auto")
    from minidcp.attention.fa3 import FA3Backend, load_kernels

    try:
        kernels = load_kernels()
    except (ImportError, OSError) as error:
        raise ValueError(
            f"--attention-backend fa3: no FlashAttention-3 ({error}); use triton or auto"
        ) from None
    return FA3Backend(kernels, scale, num_heads, block_size)


def why_not_fa3(config: ModelConfig, device: torch.device) -> str:
    """Why FA3 cannot run this model on this device, or an empty string."""
    dims = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_head_dim, config.v_head_dim)
    if dims != (512, 64, 192, 128):
        return f"is compiled for kv_lora_rank, rope, qk and v dims (512, 64, 192, 128), the model has {dims}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major == 9 else f"needs a Hopper GPU (sm_90), this is sm_{major}{minor}"


def choose_on_gpu(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """FA3 where it runs; the fallback is logged with its reason."""
    if dtype != torch.bfloat16:
        logger.warning("attention: reference, because Triton and FA3 need --dtype bfloat16")
        return "reference"
    why = why_not_fa3(config, device)
    if not why:
        from minidcp.attention.fa3 import load_kernels

        try:
            load_kernels()
            return "fa3"
        except (ImportError, OSError) as error:
            why = f"not installed ({error})"
    logger.warning("attention: triton, because FlashAttention-3 %s", why)
    return "triton"
