"""Decode in our own kernels, prefill in torch's FlashAttention-2. It runs on any GPU with bf16, and
it checks FA3."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minidcp.batch import CacheQueries, OutAndLse, Varlen
from minidcp.kernels.mla_decode import mla_decode


class TritonBackend:
    """`softmax_scale` multiplies the scores."""

    name = "triton"
    graphs = True

    def __init__(self, softmax_scale: float) -> None:
        self.softmax_scale = softmax_scale

    def prepare(self, queries: CacheQueries) -> None:
        pass

    def decode(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        kv: Tensor,
        queries: CacheQueries,
        out: Tensor | None = None,
    ) -> OutAndLse:
        return mla_decode(
            q_latent, q_pe, kv, queries.block_table, queries.local_lens, self.softmax_scale, out
        )

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> OutAndLse:
        v_dim = v.shape[2]
        padding = q.shape[2] - v_dim  # this operator wants one head dim for q, k and v
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            F.pad(v, (0, padding)),
            varlen.cu_seqlens_q,
            varlen.cu_seqlens_k,
            max(varlen.lens_q),
            max(varlen.lens_k),
            0.0,  # dropout
            varlen.causal,
            False,  # no debug mask
            scale=self.softmax_scale,
        )
        # A sequence without keys gets +inf.
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        return out[..., :v_dim], lse.transpose(0, 1)
