"""Attention back-ends and the choice of one. The contract is in `base.py`."""

from __future__ import annotations

import logging

import torch

from minidcp.attention.base import AttentionBackend
from minidcp.config import require
from minidcp.model_config import ModelConfig

__all__ = ["AttentionBackend", "make_backend"]

logger = logging.getLogger("minidcp")


def make_backend(
    name: str, config: ModelConfig, num_heads: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> AttentionBackend:
    """The back-end for `--attention-backend name`; "auto" is FA3, else Triton, else plain torch.

    Raises:
        ValueError: the back-end that was asked for cannot run here; the message says why.
    """
    auto = name == "auto"
    if auto and (device.type == "cpu" or dtype != torch.bfloat16):
        if device.type != "cpu":
            logger.warning("attention: reference, because FlashAttention-3 and Triton need --dtype bfloat16")
        name = "reference"
    if name == "reference":
        from minidcp.attention.reference import ReferenceBackend

        return ReferenceBackend(config.softmax_scale)
    flag = f"--attention-backend {name}"
    require(device.type == "cuda", f"{flag}: needs a CUDA device; use reference")
    require(dtype == torch.bfloat16, f"{flag}: needs --dtype bfloat16; reference takes any")
    if name != "triton":
        try:
            return make_fa3(config, num_heads, block_size, device)
        except ValueError as error:
            require(auto, f"{flag}: {error}; use triton or auto")
            logger.warning("attention: triton, because FlashAttention-3 %s", error)
    from minidcp.attention.triton import TritonBackend

    dims = (config.kv_lora_rank, config.qk_rope_head_dim)
    require(
        all(d >= 16 and d & (d - 1) == 0 for d in dims),
        f"--attention-backend triton: kv_lora_rank and rope dims {dims} must be powers of two from 16 on; "
        "use reference",
    )
    qk, v = config.qk_head_dim, config.v_head_dim
    require(
        v <= qk <= 256 and qk % 8 == 0,
        f"--attention-backend triton: qk and v head dims ({qk}, {v}) must be at most 256, the first a "
        "multiple of 8 and not below the second; use reference",
    )
    return TritonBackend(config.softmax_scale, device)


def make_fa3(config: ModelConfig, num_heads: int, block_size: int, device: torch.device) -> AttentionBackend:
    """Raises ValueError: why FA3 cannot run this model here."""
    from minidcp.attention.fa3 import FA3Backend, load_operators

    dims = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_head_dim, config.v_head_dim)
    require(
        dims == (512, 64, 192, 128),
        f"is compiled for kv_lora_rank, rope, qk and v dims (512, 64, 192, 128), the model has {dims}",
    )
    major, minor = torch.cuda.get_device_capability(device)
    require(major == 9, f"needs a Hopper GPU (sm_90), this is sm_{major}{minor}")
    try:
        operators = load_operators()
    except (ImportError, OSError) as error:
        raise ValueError(f"is not installed ({error})") from None
    return FA3Backend(operators, config.softmax_scale, num_heads, block_size)
