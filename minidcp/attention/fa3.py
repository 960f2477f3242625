"""FlashAttention-3: decode with q 64 + qv 512 over the paged latent cache, prefill in MHA form.

The kernels come from whichever package is installed: the official `flash_attn_interface`, or the copy inside vLLM,
whose one shared object is loaded without importing vLLM. Never both: their symbols collide."""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidcp.batch import CacheRows, Varlen

LATENT_DIM, ROPE_DIM = 512, 64  # what FA3 is compiled for, with 192 and 128 in prefill


@dataclass(frozen=True)
class Operators:
    """FA3's two operators. Their arguments are positional, and the same but for what stands here."""

    source: str
    ops: Any
    chunk: tuple[int, ...] = ()  # attention_chunk, which vLLM's have not
    tail: tuple[object, ...] = ()  # sinks and vLLM's own context parallelism: all off

    def plan(self, lens: Tensor, max_len: int, heads: int, block_size: int) -> Tensor:
        """Scheduler metadata for `decode` with local lengths `lens`, on the device."""
        metadata: Tensor = self.ops.get_scheduler_metadata(
            len(lens), 1, max_len, heads, 1, ROPE_DIM, LATENT_DIM, torch.bfloat16, lens, None, None, None,
            None, None, block_size, 0, False, -1, -1, *self.chunk, False, 0, None, 0,
        )  # fmt: skip
        return metadata

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        longest: tuple[int, int],
        qv: Tensor | None = None,
        out: Tensor | None = None,
        cu_seqlens: tuple[Tensor | None, Tensor | None] = (None, None),
        lens_k: Tensor | None = None,
        table: Tensor | None = None,
        causal: bool = False,
        plan: object = None,
    ) -> tuple[Tensor, Tensor]:
        """Output and lse; pairs are of queries and keys."""
        result, lse, *_ = self.ops.fwd(
            q, k, v, None, None, qv, out, *cu_seqlens, None, None, lens_k, *longest, table, None, None,
            None, None, None, None, None, None, scale, causal, -1, -1, *self.chunk, 0.0, True, plan, 0, None,
            0, *self.tail,
        )  # fmt: skip
        return result, lse


def load_operators() -> Operators:
    """Raises ImportError, saying what is missing, if neither package is there."""
    if importlib.util.find_spec("flash_attn_interface") is not None:
        importlib.import_module("flash_attn_interface")  # registers them
        return Operators("flash_attn_interface", torch.ops.flash_attn_3, chunk=(0,))
    spec = importlib.util.find_spec("vllm")
    folders = [Path(f) for f in (spec.submodule_search_locations or [])] if spec else []
    files = [f for folder in folders for f in folder.glob("vllm_flash_attn/_vllm_fa3_C*.so")]
    if not files:
        raise ImportError("neither flash_attn_interface nor a vLLM with FlashAttention-3 is there")
    torch.ops.load_library(str(files[0]))
    return Operators("vllm.vllm_flash_attn", torch.ops._vllm_fa3_C, tail=(None, 1, 0, None))


class FA3Backend:
    """FlashAttention-3 on one rank; `softmax_scale` multiplies the scores. `num_heads` are those of the DCP group."""

    graphs = True

    def __init__(self, operators: Operators, softmax_scale: float, num_heads: int, block_size: int) -> None:
        self.name = f"fa3 from {operators.source}"
        self.operators, self.softmax_scale = operators, softmax_scale
        self.num_heads, self.block_size = num_heads, block_size

    def plan(self, rows: CacheRows) -> None:
        max_len = rows.block_table.shape[1] * self.block_size
        rows.prepared = self.operators.plan(rows.local_lens, max_len, self.num_heads, self.block_size)

    def decode(
        self, q_latent: Tensor, q_pe: Tensor, kv: Tensor, rows: CacheRows, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        k, v = kv[:, :, None, LATENT_DIM:], kv[:, :, None, :LATENT_DIM]
        result, lse = self.operators.attend(
            q_pe[:, None], k, v, self.softmax_scale, (1, rows.block_table.shape[1] * kv.shape[1]),
            qv=q_latent[:, None], out=None if out is None else out[:, None], lens_k=rows.local_lens,
            table=rows.block_table, plan=rows.prepared,
        )  # fmt: skip
        return result[:, 0], lse[..., 0]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
        longest = max(varlen.lens_q), max(varlen.lens_k)
        cu_seqlens = varlen.cu_seqlens_q, varlen.cu_seqlens_k
        out, lse = self.operators.attend(
            q, k, v, self.softmax_scale, longest, cu_seqlens=cu_seqlens, causal=varlen.causal
        )
        if not varlen.causal:  # a sequence without keys is written +inf by some builds
            lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        return out, lse.transpose(0, 1)
