"""Attention back-ends, and the one that a configuration names. The contract is in `base.py`; which
one "auto" means is decided in `resolve.py`."""

from minidcp.attention.base import AttentionBackend as AttentionBackend
from minidcp.attention.fa3 import FA3Backend
from minidcp.attention.reference import ReferenceBackend
from minidcp.kernels.fa3 import load_operators
from minidcp.model_config import ModelConfig
from minidcp.resolve import ResolvedConfig


def make_backend(config: ResolvedConfig, model: ModelConfig) -> AttentionBackend:
    """The back-end named by `config.attention_backend`, for the heads of a DCP group."""
    if config.attention_backend == "reference":
        return ReferenceBackend(model.softmax_scale)
    if config.attention_backend == "fa3":
        group_heads = model.num_attention_heads * config.dcp_size // config.tp_size
        return FA3Backend(load_operators(), model.softmax_scale, group_heads, config.block_size)

    from minidcp.attention.triton import TritonBackend  # only where its kernels are wanted

    return TritonBackend(model.softmax_scale)
