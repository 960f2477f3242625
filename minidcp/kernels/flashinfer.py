"""FlashInfer's MLA decode: which of its kernels fits this GPU, compiled and ready to be planned.

This is not our own kernel (that is `mla_decode.py`) and does not decide what to pass: the back-end
in `attention/flashinfer.py` does."""

from dataclasses import dataclass
from typing import Any

import torch

LEAST_CAPABILITY = (8, 0)
# FlashInfer's limits on kv_lora_rank and the rope dim.
LATENT_STEP = 128
HOPPER_LATENT_DIMS = (128, 256, 512)
ROPE_STEP = 64


@dataclass(frozen=True)
class Library:
    """What is used of FlashInfer 0.7.

    Attributes:
        wrapper: the class BatchMLAPagedAttentionWrapper. One is planned on the host for some
            queries, and then runs in every layer.
        make_metadata: makes a plan's metadata from qo_indptr, kv_indptr, kv_indices and kv_len_arr.
        variant: its name for the kernels: fa3 on Hopper, fa2 elsewhere. They are written after
            FlashAttention-3 and -2, and contain neither.
        latent_dim: kv_lora_rank, for which the kernel is compiled.
        rope_dim: the rope dim, for which it is too.
    """

    wrapper: Any
    make_metadata: Any
    variant: str
    latent_dim: int
    rope_dim: int


def find_dims_obstacle(latent_dim: int, rope_dim: int, capability: tuple[int, int]) -> str:
    """Why its kernels cannot have these dims on such a GPU; empty if they can."""
    dims = f"kv_lora_rank and rope dims ({latent_dim}, {rope_dim})"
    if latent_dim % LATENT_STEP or rope_dim % ROPE_STEP:
        return f"needs {dims} to be multiples of {LATENT_STEP} and {ROPE_STEP}"
    if choose_variant(capability) == "fa3" and latent_dim not in HOPPER_LATENT_DIMS:
        return f"needs a kv_lora_rank of {HOPPER_LATENT_DIMS} on Hopper, the model has {latent_dim}"
    return ""


def choose_variant(capability: tuple[int, int]) -> str:
    return "fa3" if capability[0] == 9 else "fa2"


def load_library(latent_dim: int, rope_dim: int, capability: tuple[int, int]) -> Library:
    """FlashInfer, with its kernel for these dims in bf16.

    It is compiled if it has not been before, which takes half a minute. Processes that want the
    same one wait for the first. Raises ImportError if FlashInfer is not installed or too old, and
    RuntimeError, OSError and others if it cannot compile.
    """
    from flashinfer.jit import gen_batch_mla_module
    from flashinfer.mla import BatchMLAPagedAttentionWrapper, MLAPlanMetadata

    variant = choose_variant(capability)
    bf16 = torch.bfloat16
    with_profiler = False
    kernel = gen_batch_mla_module(
        variant, bf16, bf16, bf16, torch.int32, latent_dim, rope_dim, with_profiler
    )
    kernel.build_and_load()
    return Library(
        BatchMLAPagedAttentionWrapper, MLAPlanMetadata.csr, variant, latent_dim, rope_dim
    )
