"""Attention in plain torch: the CPU's back-end, and what the GPU's are compared with. It materialises scores and loops
over prefill sequences; it is meant to be read, not to be fast."""

import torch
from torch import Tensor

from minidcp.batch import CacheRows, Partial, Varlen

CHUNK = 16 << 20  # values of latents that are gathered at once


class ReferenceBackend:
    """`softmax_scale` multiplies the scores; sums and softmax are in fp32."""

    name = "reference"
    graphs = False

    def __init__(self, softmax_scale: float) -> None:
        self.softmax_scale = softmax_scale

    def plan(self, rows: CacheRows) -> None:
        rows.prepared = torch.arange(int(rows.local_lens.max()), device=rows.local_lens.device)

    def decode(self, q_latent: Tensor, q_pe: Tensor, kv: Tensor, rows: CacheRows, out: Tensor | None = None) -> Partial:
        block_size, slots = kv.shape[1], rows.prepared
        assert isinstance(slots, Tensor)
        q, cache = torch.cat([q_latent, q_pe], -1).float(), kv.flatten(0, 1)
        outs, lses = [], []
        some = max(1, CHUNK // max(1, len(slots) * kv.shape[2]))  # rows at once, so that memory is bounded
        parts = (x.split(some) for x in (rows.block_table.long(), rows.local_lens, q))
        for table, lens, q_some in zip(*parts, strict=True):
            places = table[:, slots // block_size] * block_size + slots % block_size
            empty = slots >= lens[:, None]  # [b, L]
            latents = cache[places].float().masked_fill(empty[..., None], 0.0)  # an unused slot may hold NaN
            scores = torch.einsum("bhc,blc->bhl", q_some, latents) * self.softmax_scale
            out_some, lse = attend(scores.masked_fill(empty[:, None], -torch.inf), latents[..., : q_latent.shape[-1]])
            outs.append(out_some.to(q_latent.dtype))
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> Partial:
        outs, lses = [], []
        sequences = zip(q.split(varlen.lens_q), k.split(varlen.lens_k), v.split(varlen.lens_k), strict=True)
        for q_i, k_i, v_i in sequences:
            scores = torch.einsum("qhd,khd->hqk", q_i.float(), k_i.float()) * self.softmax_scale
            if varlen.causal:
                hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(hidden, -torch.inf)
            out, lse = attend(scores, v_i.float().transpose(0, 1))
            outs.append(out.transpose(0, 1))
            lses.append(lse.transpose(0, 1))
        return torch.cat(outs).to(q.dtype), torch.cat(lses)


def attend(scores: Tensor, values: Tensor) -> Partial:
    """softmax(scores [..., Q, K]) @ values [..., K, D], and the log-sum-exp; out is 0 where all is hidden."""
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return weights @ values, lse
