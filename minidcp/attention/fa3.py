"""FlashAttention-3: decode with q 64 + qv 512 over the paged latent cache, prefill in MHA form. The kernels come from
whichever package is installed: the official `flash_attn_interface`, or the copy inside vLLM, whose one shared object is
loaded without importing vLLM. Never both: their symbols collide."""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidcp.batch import CacheRows, Partial, Varlen

LATENT_DIM, ROPE_DIM = 512, 64
COMPILED_DIMS = LATENT_DIM, ROPE_DIM, 192, 128  # the last two of q and k, and of v, in prefill


@dataclass(frozen=True)
class Operators:
    """FA3's two operators. Their arguments are positional, and the same but for what stands here: of `fwd` q, k, v, new
    k and v, qv, out, cu_seqlens of q, k and new k, used lengths of q and k, longest q and k, page table, …"""

    source: str
    ops: Any
    chunk: tuple[int, ...] = ()  # attention_chunk, which vLLM's have not
    tail: tuple[object, ...] = ()  # sinks and vLLM's own context parallelism: all off


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
        self.ops, self.chunk, self.tail = operators.ops, operators.chunk, operators.tail
        self.softmax_scale, self.num_heads, self.block_size = softmax_scale, num_heads, block_size

    def plan(self, rows: CacheRows) -> None:
        lens, max_len = rows.local_lens, rows.block_table.shape[1] * self.block_size
        rows.prepared = self.ops.get_scheduler_metadata(
            len(lens), 1, max_len, self.num_heads, 1, ROPE_DIM, LATENT_DIM, torch.bfloat16, lens, None, None, None,
            None, None, self.block_size, 0, False, -1, -1, *self.chunk, False, 0, None, 0,
        )  # fmt: skip

    def decode(self, q_latent: Tensor, q_pe: Tensor, kv: Tensor, rows: CacheRows, out: Tensor | None = None) -> Partial:
        k, v = kv[:, :, None, LATENT_DIM:], kv[:, :, None, :LATENT_DIM]
        result, lse, *_ = self.ops.fwd(
            q_pe[:, None], k, v, None, None, q_latent[:, None], None if out is None else out[:, None], None, None,
            None, None, rows.local_lens, 1, rows.block_table.shape[1] * kv.shape[1], rows.block_table, None, None,
            None, None, None, None, None, None, self.softmax_scale, False, -1, -1, *self.chunk, 0.0, True,
            rows.prepared, 0, None, 0, *self.tail,
        )  # fmt: skip
        return result[:, 0], lse[..., 0]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> Partial:
        out, lse, *_ = self.ops.fwd(
            q, k, v, None, None, None, None, varlen.cu_seqlens_q, varlen.cu_seqlens_k, None, None, None,
            max(varlen.lens_q), max(varlen.lens_k), None, None, None, None, None, None, None, None, None,
            self.softmax_scale, varlen.causal, -1, -1, *self.chunk, 0.0, True, None, 0, None, 0, *self.tail,
        )  # fmt: skip
        if not varlen.causal:  # a sequence without keys is written +inf by some builds
            lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        return out, lse.transpose(0, 1)
