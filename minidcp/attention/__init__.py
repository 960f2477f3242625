"""Attention back-ends, and the one that a configuration names. The contract is in `base.py`; which
one "auto" means is decided in `resolve.py`."""

import torch

from minidcp.attention.base import AttentionBackend as AttentionBackend
from minidcp.attention.fa3 import FA3Backend
from minidcp.attention.flashinfer import FlashInferBackend
from minidcp.attention.reference import ReferenceBackend
from minidcp.kernels.fa3 import load_operators
from minidcp.kernels.flashinfer import load_library
from minidcp.model_config import ModelConfig
from minidcp.resolve import ResolvedConfig


def make_backend(
    config: ResolvedConfig, model: ModelConfig, device: torch.device
) -> AttentionBackend:
    """The back-end named by `config.attention_backend`, for the heads of a DCP group."""
    group_heads = model.num_attention_heads * config.dcp_size // config.tp_size
    scale = model.softmax_scale
    if config.attention_backend == "reference":
        return ReferenceBackend(scale)
    if config.attention_backend == "fa3":
        return FA3Backend(load_operators(), scale, group_heads, config.block_size)
    if config.attention_backend == "flashinfer":
        capability = torch.cuda.get_device_capability(device)
        library = load_library(model.kv_lora_rank, model.qk_rope_head_dim, capability)
        return FlashInferBackend(library, scale, group_heads, config.block_size, device)

    from minidcp.attention.triton import TritonBackend  # only where its kernels are wanted

    return TritonBackend(scale)
