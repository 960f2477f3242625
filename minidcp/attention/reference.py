"""Attention in plain torch: the back-end for CPUs, and what the GPU back-ends are compared with.
It materialises all scores and loops over prefill sequences. It is meant to be read, not to be
fast. Next: `context.py`."""

import torch
from torch import Tensor

from minidcp.batch import CacheQueries, OutAndLse, Varlen

MAX_GATHERED_VALUES = 16 << 20  # of latents that are gathered at once, to bound memory


class ReferenceBackend:
    """`softmax_scale` multiplies the scores. Sums and softmax are in float32."""

    name = "reference"
    graphs = False

    def __init__(self, softmax_scale: float) -> None:
        self.softmax_scale = softmax_scale

    def plan(self, queries: CacheQueries) -> None:
        pass

    def prepare(self, queries: CacheQueries) -> None:
        """The local slots [0, L) up to the longest shard."""
        longest = int(queries.local_lens.max())
        queries.prepared = torch.arange(longest, device=queries.local_lens.device)

    def decode(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        kv: Tensor,
        queries: CacheQueries,
        out: Tensor | None = None,
    ) -> OutAndLse:
        local_slots = queries.prepared
        assert isinstance(local_slots, Tensor)
        if out is None:
            out = torch.empty_like(q_latent)
        lse = torch.empty(q_latent.shape[:2], dtype=torch.float32, device=q_latent.device)

        values_per_row = max(1, len(local_slots) * kv.shape[2])
        rows_at_once = max(1, MAX_GATHERED_VALUES // values_per_row)
        for start in range(0, len(q_latent), rows_at_once):
            part = slice(start, start + rows_at_once)
            latents, is_unused = self.gather_latents(kv, queries, part, local_slots)
            q = torch.cat([q_latent[part], q_pe[part]], -1).float()
            scores = torch.einsum("bhc,blc->bhl", q, latents) * self.softmax_scale
            scores = scores.masked_fill(is_unused[:, None], -torch.inf)
            values = latents[..., : q_latent.shape[-1]]
            out[part], lse[part] = attend(scores, values)
        return out, lse

    def gather_latents(
        self, kv: Tensor, queries: CacheQueries, part: slice, local_slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cached tokens [b, L, C + rope] float32 of these rows, and which are unused [b, L]."""
        block_size = kv.shape[1]
        blocks = queries.block_table[part].long()[:, local_slots // block_size]
        cache_rows = blocks * block_size + local_slots % block_size
        is_unused = local_slots >= queries.local_lens[part, None]
        latents = kv.flatten(0, 1)[cache_rows].float()
        return latents.masked_fill(is_unused[..., None], 0.0), is_unused  # unused may hold NaN

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> OutAndLse:
        outs = []
        lses = []
        queries = q.split(varlen.lens_q)
        keys = k.split(varlen.lens_k)
        values = v.split(varlen.lens_k)
        for q_i, k_i, v_i in zip(queries, keys, values, strict=True):
            scores = torch.einsum("qhd,khd->hqk", q_i.float(), k_i.float()) * self.softmax_scale
            if varlen.causal:
                is_later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(is_later, -torch.inf)
            out, lse = attend(scores, v_i.float().transpose(0, 1))
            outs.append(out.transpose(0, 1))
            lses.append(lse.transpose(0, 1))
        return torch.cat(outs).to(q.dtype), torch.cat(lses)


def attend(scores: Tensor, values: Tensor) -> OutAndLse:
    """softmax(scores [..., Q, K]) @ values [..., K, D], and the log-sum-exp of the scores [..., Q].

    Where all scores are -inf the output is 0 and the log-sum-exp -inf.
    """
    lse = scores.logsumexp(-1)
    finite_lse = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = (scores - finite_lse[..., None]).exp()
    return weights @ values, lse
