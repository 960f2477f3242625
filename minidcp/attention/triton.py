"""Decode in our own kernels, prefill in torch's own FlashAttention-2: for any GPU with bf16, and to check FA3."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minidcp.batch import CacheRows, Partial, Varlen
from minidcp.kernels.mla_decode import mla_decode


class TritonBackend:
    """`softmax_scale` multiplies the scores."""

    name = "triton"
    graphs = True

    def __init__(self, softmax_scale: float) -> None:
        self.softmax_scale = softmax_scale

    def plan(self, rows: CacheRows) -> None:
        pass

    def decode(self, q_latent: Tensor, q_pe: Tensor, kv: Tensor, rows: CacheRows, out: Tensor | None = None) -> Partial:
        return mla_decode(q_latent, q_pe, kv, rows.block_table, rows.local_lens, self.softmax_scale)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> Partial:
        pad = q.shape[2] - v.shape[2]  # it wants one head dim for all
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, F.pad(v, (0, pad)), varlen.cu_seqlens_q, varlen.cu_seqlens_k, max(varlen.lens_q),
            max(varlen.lens_k), 0.0, varlen.causal, False, scale=self.softmax_scale,
        )  # fmt: skip
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)  # of a sequence without keys
        return out[..., : v.shape[2]], lse.transpose(0, 1)
