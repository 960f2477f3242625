"""Attention in plain torch: the CPU's back-end, and what the GPU's are compared with.

It materialises scores and loops over prefill sequences; it is meant to be read, not to be fast.
"""

import torch
from torch import Tensor

from minidcp.batch import CacheRows, Varlen


class ReferenceBackend:
    """`softmax_scale` multiplies the scores; sums and softmax are in fp32."""

    name = "reference"
    graphs = False

    def __init__(self, softmax_scale: float) -> None:
        self.softmax_scale = softmax_scale

    def plan(self, rows: CacheRows) -> None:
        rows.prepared = torch.arange(int(rows.local_lens.max()), device=rows.local_lens.device)

    def decode(
        self, q_latent: Tensor, q_pe: Tensor, kv: Tensor, rows: CacheRows, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        block_size, slots = kv.shape[1], rows.prepared
        assert isinstance(slots, Tensor)
        places = rows.block_table.long()[:, slots // block_size] * block_size + slots % block_size
        empty = slots >= rows.local_lens[:, None]  # [B, L]
        latents = kv.flatten(0, 1)[places].float()  # [B, L, C + R]
        latents = latents.masked_fill(empty[..., None], 0.0)  # an unused slot may hold NaN
        q = torch.cat([q_latent, q_pe], -1).float()
        scores = torch.einsum("bhc,blc->bhl", q, latents) * self.softmax_scale
        scores = scores.masked_fill(empty[:, None], -torch.inf)
        out, lse = attend(scores, latents[..., : q_latent.shape[-1]])
        return out.to(q_latent.dtype), lse

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
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


def attend(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(scores [..., Q, K]) @ values [..., K, D], and the log-sum-exp; out is 0 where all is hidden."""
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return weights @ values, lse
