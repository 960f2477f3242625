"""Attention back-ends and the choice of one. The contract is in `base.py`."""

import logging

import torch

from minidcp.attention.base import AttentionBackend as AttentionBackend
from minidcp.attention.fa3 import COMPILED_DIMS, FA3Backend, load_operators
from minidcp.attention.reference import ReferenceBackend
from minidcp.config import EngineConfig, require
from minidcp.model_config import ModelConfig

logger = logging.getLogger("minidcp")


def make_backend(options: EngineConfig, config: ModelConfig, device: torch.device) -> AttentionBackend:
    """The back-end for --attention-backend; "auto" is FA3, else Triton, else plain torch. Raises ValueError if the one
    that was asked for cannot run here; the message says why."""
    name, auto = options.attention_backend, options.attention_backend == "auto"
    if auto and (device.type == "cpu" or options.dtype != "bfloat16"):
        if device.type != "cpu":
            logger.warning("attention: reference, because FlashAttention-3 and Triton need --dtype bfloat16")
        name = "reference"
    if name == "reference":
        return ReferenceBackend(config.softmax_scale)
    flag = f"--attention-backend {name}"
    require(device.type == "cuda", f"{flag}: needs a CUDA device; use reference")
    require(options.dtype == "bfloat16", f"{flag}: needs --dtype bfloat16; reference takes any")
    if name != "triton":
        try:
            return make_fa3(options, config, device)
        except ValueError as error:
            require(auto, f"{flag}: {error}; use triton or auto")
            logger.warning("attention: triton, because FlashAttention-3 %s", error)
    from minidcp.attention.triton import TritonBackend

    flag, dims = "--attention-backend triton", (config.kv_lora_rank, config.qk_rope_head_dim)
    what = f"kv_lora_rank and rope dims {dims} must be powers of two from 16 on"
    require(all(d >= 16 and d & (d - 1) == 0 for d in dims), f"{flag}: {what}; use reference")
    qk, v = config.qk_head_dim, config.v_head_dim
    what = f"qk and v head dims ({qk}, {v}) must be multiples of 8, at most 256, the first not below the second"
    require(v <= qk <= 256 and qk % 8 == v % 8 == 0, f"{flag}: {what}; use reference")
    return TritonBackend(config.softmax_scale)


def make_fa3(options: EngineConfig, config: ModelConfig, device: torch.device) -> AttentionBackend:
    """Raises ValueError: why FA3 cannot run this model here."""
    dims = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_head_dim, config.v_head_dim)
    what = f"kv_lora_rank, rope, qk and v dims {COMPILED_DIMS}"
    require(dims == COMPILED_DIMS, f"is compiled for {what}, the model has {dims}")
    major, minor = torch.cuda.get_device_capability(device)
    require(major == 9, f"needs a Hopper GPU (sm_90), this is sm_{major}{minor}")
    try:
        operators = load_operators()
    except (ImportError, OSError) as error:
        raise ValueError(f"is not installed ({error})") from None
    num_heads = config.num_attention_heads * options.dcp_size // options.tp_size
    return FA3Backend(operators, config.softmax_scale, num_heads, options.block_size)
