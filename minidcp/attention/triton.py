"""Decode in our own kernels, prefill in the FlashAttention-2 that is part of torch: for any GPU with bf16,
and the second opinion on FA3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from minidcp.batch import CacheRows, Varlen
from minidcp.kernels.mla_decode import DeviceLimits, mla_decode


class TritonBackend:
    """`softmax_scale` multiplies the scores."""

    name = "triton"
    graphs = True

    def __init__(self, softmax_scale: float, device: torch.device) -> None:
        self.softmax_scale = softmax_scale
        properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
        self.limits = DeviceLimits(
            properties["multiprocessor_count"],
            properties["max_shared_mem"],
            hopper=torch.cuda.get_device_capability(device)[0] == 9,
        )

    def plan(self, rows: CacheRows) -> None:
        pass

    def decode(
        self, q_latent: Tensor, q_pe: Tensor, kv: Tensor, rows: CacheRows, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return mla_decode(q_latent, q_pe, kv, rows.block_table, rows.local_lens, self.softmax_scale, self.limits)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
        pad = q.shape[2] - v.shape[2]  # it wants one head dim for all
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, F.pad(v, (0, pad)), varlen.cu_seqlens_q, varlen.cu_seqlens_k, max(varlen.lens_q),
            max(varlen.lens_k), 0.0, varlen.causal, False, scale=self.softmax_scale,
        )  # fmt: skip
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)  # of a sequence without keys
        return out[..., : v.shape[2]], lse.transpose(0, 1)
