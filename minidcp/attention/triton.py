"""Decode in our own kernels, prefill in torch's FlashAttention-2. It runs on any GPU with bf16, and
it checks FA3."""

from torch import Tensor

from minidcp.attention.flash2 import attend_packed
from minidcp.batch import CacheQueries, OutAndLse, Varlen
from minidcp.kernels.mla_decode import mla_decode


class TritonBackend:
    """`softmax_scale` multiplies the scores."""

    name = "triton"
    graphs = True

    def __init__(self, softmax_scale: float) -> None:
        self.softmax_scale = softmax_scale

    def plan(self, queries: CacheQueries) -> None:
        pass

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
        return attend_packed(q, k, v, varlen, self.softmax_scale)
