"""Attention in our own Triton kernels: for any GPU with bf16, and the second opinion on FA3."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from minidcp.batch import CacheRows, Varlen
from minidcp.kernels.mha_prefill import mha_prefill
from minidcp.kernels.mla_decode import DeviceLimits, mla_decode


class TritonBackend:
    """`softmax_scale` multiplies the scores; `rope_dim` is the width of a key's rotary part."""

    name = "triton"
    graphs = True

    def __init__(self, softmax_scale: float, rope_dim: int, device: torch.device) -> None:
        self.softmax_scale, self.rope_dim = softmax_scale, rope_dim
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
        return mla_decode(
            q_latent, q_pe, kv, rows.block_table, rows.local_lens, self.softmax_scale, self.limits
        )

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
        return mha_prefill(
            q,
            k,
            v,
            varlen.cu_seqlens_q,
            varlen.cu_seqlens_k,
            max(varlen.lens_q),
            self.softmax_scale,
            varlen.causal,
            self.rope_dim,
        )
