"""FlashAttention-3: decode with q 64 + qv 512 over the paged latent cache, prefill in MHA form.

The kernels come from whichever package is installed: the official `flash_attn_interface`, or the copy
inside vLLM, whose one shared object is loaded without importing vLLM. Never both: their symbols collide.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minidcp.batch import ForwardBatch, Varlen

LATENT_DIM, ROPE_DIM = 512, 64  # what FA3 is compiled for, with 192 and 128 in prefill


class Kernels(Protocol):
    """The two calls we make, whatever package they come from."""

    source: str

    def plan(self, lens: Tensor, max_len: int, heads: int, block_size: int) -> Tensor:
        """Scheduler metadata for `decode`, on the device."""

    def decode(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        kv: Tensor,
        table: Tensor,
        lens: Tensor,
        scale: float,
        plan: Tensor,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """out [B, H, 512], in `out` if the package can write there, and lse [B, H]."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> tuple[Tensor, Tensor]:
        """out [T, H, 128] and lse [H, T]."""


class OfficialKernels:
    """The package flash_attn_3 of the FlashAttention repository."""

    source = "flash_attn_interface"

    def __init__(self) -> None:
        self.module: Any = importlib.import_module("flash_attn_interface")

    def plan(self, lens: Tensor, max_len: int, heads: int, block_size: int) -> Tensor:
        metadata: Tensor = self.module.get_scheduler_metadata(
            len(lens), 1, max_len, heads, 1, ROPE_DIM, lens, torch.bfloat16,
            headdim_v=LATENT_DIM, page_size=block_size,
        )  # fmt: skip
        return metadata

    def decode(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        kv: Tensor,
        table: Tensor,
        lens: Tensor,
        scale: float,
        plan: Tensor,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        result, lse, *_ = self.module.flash_attn_with_kvcache(
            q_pe[:, None], kv[:, :, None, LATENT_DIM:], kv[:, :, None, :LATENT_DIM], qv=q_latent[:, None],
            cache_seqlens=lens, page_table=table, softmax_scale=scale, causal=False,
            scheduler_metadata=plan, return_softmax_lse=True,
        )  # fmt: skip
        return result[:, 0], lse[..., 0]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.module.flash_attn_varlen_func(
            q, k, v, varlen.cu_seqlens_q, varlen.cu_seqlens_k, max(varlen.lens_q), max(varlen.lens_k),
            softmax_scale=scale, causal=varlen.causal, return_attn_probs=True,
        )  # fmt: skip
        return out, lse


class VllmKernels:
    """The copy of FlashAttention-3 that vLLM ships: one op with positional arguments."""

    source = "vllm.vllm_flash_attn"

    def __init__(self) -> None:
        spec = importlib.util.find_spec("vllm")
        folders = [Path(f) for f in (spec.submodule_search_locations or [])] if spec else []
        files = [f for folder in folders for f in folder.glob("vllm_flash_attn/_vllm_fa3_C*.so")]
        if not files:
            raise ImportError("vLLM is not installed, or without FlashAttention-3")
        torch.ops.load_library(str(files[0]))
        self.ops: Any = torch.ops._vllm_fa3_C

    def plan(self, lens: Tensor, max_len: int, heads: int, block_size: int) -> Tensor:
        metadata: Tensor = self.ops.get_scheduler_metadata(
            len(lens), 1, max_len, heads, 1, ROPE_DIM, LATENT_DIM, torch.bfloat16, lens,
            None, None, None, None, None, block_size, 0, False, -1, -1, False, 0, None, 0,
        )  # fmt: skip
        return metadata

    def decode(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        kv: Tensor,
        table: Tensor,
        lens: Tensor,
        scale: float,
        plan: Tensor,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        k, v = kv[:, :, None, LATENT_DIM:], kv[:, :, None, :LATENT_DIM]
        max_len = table.shape[1] * kv.shape[1]
        into = None if out is None else out[:, None]
        result, lse = self.run(
            q_pe[:, None], k, v, q_latent[:, None], into, None, None, lens, 1, max_len, table, scale, False,
            plan,
        )  # fmt: skip
        return result[:, 0], lse[..., 0]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> tuple[Tensor, Tensor]:
        longest = max(varlen.lens_q), max(varlen.lens_k)
        cu_q, cu_k = varlen.cu_seqlens_q, varlen.cu_seqlens_k
        return self.run(q, k, v, None, None, cu_q, cu_k, None, *longest, None, scale, varlen.causal, None)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None,
        out: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        lens_k: Tensor | None,
        max_q: int,
        max_k: int,
        table: Tensor | None,
        scale: float,
        causal: bool,
        plan: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        none = (None,) * 3
        result, lse, *_ = self.ops.fwd(
            q, k, v, None, None, qv, out, cu_seqlens_q, cu_seqlens_k, None, None, lens_k, max_q, max_k,
            table, None, None, *none, *none, scale, causal, -1, -1, 0.0, True, plan, 0, None, 0, None,
            1, 0, None,
        )  # fmt: skip
        return result, lse


def load_kernels() -> Kernels:
    """Raises ImportError, saying what is missing, if neither package is there."""
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return OfficialKernels()
    return VllmKernels()


class FA3Backend:
    """FlashAttention-3 on one rank; `softmax_scale` multiplies the scores.

    `num_heads` are those of the DCP group, which attend over this rank's shard.
    """

    graphs = True

    def __init__(self, kernels: Kernels, softmax_scale: float, num_heads: int, block_size: int) -> None:
        self.name = f"fa3 from {kernels.source}"
        self.kernels, self.softmax_scale = kernels, softmax_scale
        self.num_heads, self.block_size = num_heads, block_size
        self.metadata = torch.empty(0)

    def plan(self, batch: ForwardBatch) -> None:
        if batch.num_decode:
            max_len = batch.block_table.shape[1] * self.block_size
            self.metadata = self.kernels.plan(batch.local_lens, max_len, self.num_heads, self.block_size)

    def decode(
        self, q_latent: Tensor, q_pe: Tensor, kv: Tensor, batch: ForwardBatch, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.kernels.decode(
            q_latent, q_pe, kv, batch.block_table, batch.local_lens, self.softmax_scale, self.metadata, out
        )

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
        out, lse = self.kernels.prefill(q, k, v, varlen, self.softmax_scale)
        if not varlen.causal:  # a sequence without keys is written +inf by some builds
            lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        return out, lse.transpose(0, 1)
