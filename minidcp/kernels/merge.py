"""Merging partial attention results by their log-sum-exp: two Triton kernels and their torch twins.

LSEs are natural logarithms in fp32; -inf marks an empty shard, whose output may hold anything, NaN
too: it is masked, never multiplied by zero. Source: FlashDecoding's reduction, arXiv:2307.08691 §3.1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def merge_partials(outs: Tensor, lses: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Attention over the union of N shards.

    Args:
        outs: [N, T, H, D] partial outputs, any strides with a contiguous D.
        lses: [N, T, H] float32, any strides.
        dtype: of the result; outs' by default.

    Returns:
        out [T, H, D] (0 where every shard is empty) and lse [T, H] float32.
    """
    return (merge_partials_triton if outs.is_cuda else merge_partials_ref)(outs, lses, dtype or outs.dtype)


def merge_partials_ref(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == -torch.inf, 0.0)).exp()  # [N, T, H]
    parts = outs.float().masked_fill((lses == -torch.inf)[..., None], 0.0)
    return torch.einsum("nth,nthd->thd", weights, parts).to(dtype), lse


def merge_partials_triton(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size, tokens, heads, dim = outs.shape
    assert outs.stride(3) == 1
    out = torch.empty(tokens, heads, dim, dtype=dtype, device=outs.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=outs.device)
    if tokens:
        merge_kernel[(tokens, heads)](
            outs, lses, out, lse,
            *outs.stride()[:3], *lses.stride(), *out.stride()[:2], lse.stride(0),
            size, dim, SIZE=triton.next_power_of_2(size), DIM=triton.next_power_of_2(dim),
            CHUNK=min(8, triton.next_power_of_2(size)), num_warps=1,
        )  # fmt: skip
    return out, lse


@triton.jit
def merge_kernel(
    outs, lses, out, lse,
    outs_n, outs_t, outs_h, lses_n, lses_t, lses_h, out_t, out_h, lse_t,
    size, dim, SIZE: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program merges the N partials of one token and head, CHUNK of them at a time."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.arange(0, SIZE)
    d = tl.arange(0, DIM)
    part_lse = tl.load(lses + n * lses_n + t * lses_t + h * lses_h, mask=n < size, other=-float("inf"))
    top = tl.max(part_lse, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp(part_lse - top), 0)
    merged = tl.where(total > 0, tl.log(tl.where(total > 0, total, 1.0)) + top, -float("inf"))
    base = tl.where(total > 0, merged, 0.0)
    acc = tl.zeros([DIM], tl.float32)
    for first in range(0, size, CHUNK):
        for i in tl.static_range(CHUNK):  # unrolled: CHUNK rows are on their way at once
            shard = first + i
            shard_lse = tl.load(
                lses + shard * lses_n + t * lses_t + h * lses_h, mask=shard < size, other=-float("inf")
            )
            seen = d < tl.where(shard_lse > -float("inf"), dim, 0)  # an empty shard is not even read
            part = tl.load(outs + shard * outs_n + t * outs_t + h * outs_h + d, mask=seen, other=0.0)
            acc += part.to(tl.float32) * tl.exp(shard_lse - base)
    tl.store(out + t * out_t + h * out_h + d, acc.to(out.dtype.element_ty), mask=d < dim)
    tl.store(lse + t * lse_t + h, merged)


def rescale_partial(out: Tensor, lses: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the union: its partial output times exp(its lse - lse of the union).

    Args:
        out: [T, H, D] this rank's partial output, contiguous D.
        lses: [N, T, H] float32, every rank's.
        rank: whose partial `out` is.

    Returns:
        [T, H, D] in out's dtype, to be summed over the ranks, and the union's lse [T, H] float32.
    """
    return rescale_partial_triton(out, lses, rank) if out.is_cuda else rescale_partial_ref(out, lses, rank)


def rescale_partial_ref(out: Tensor, lses: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    lse = lses.logsumexp(0)
    own = lses[rank]
    weight = (own - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    part = out.float().masked_fill((own == -torch.inf)[..., None], 0.0)
    return (part * weight[..., None]).to(out.dtype), lse


def rescale_partial_triton(out: Tensor, lses: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    tokens, heads, dim = out.shape
    assert out.stride(2) == 1
    scaled = torch.empty(tokens, heads, dim, dtype=out.dtype, device=out.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=out.device)
    if tokens:
        rescale_kernel[(tokens, heads)](
            out, lses, scaled, lse,
            *out.stride()[:2], *lses.stride(), *scaled.stride()[:2], lse.stride(0),
            rank, lses.shape[0], dim,
            SIZE=triton.next_power_of_2(lses.shape[0]), DIM=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
    return scaled, lse


@triton.jit
def rescale_kernel(
    out, lses, scaled, lse,
    out_t, out_h, lses_n, lses_t, lses_h, scaled_t, scaled_h, lse_t,
    rank, size, dim, SIZE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One program rescales one token and head."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.arange(0, SIZE)
    d = tl.arange(0, DIM)
    part_lse = tl.load(lses + n * lses_n + t * lses_t + h * lses_h, mask=n < size, other=-float("inf"))
    own = tl.load(lses + rank * lses_n + t * lses_t + h * lses_h)
    top = tl.max(part_lse, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp(part_lse - top), 0)
    merged = tl.where(total > 0, tl.log(tl.where(total > 0, total, 1.0)) + top, -float("inf"))
    weight = tl.exp(own - tl.where(total > 0, merged, 0.0))
    mask = d < tl.where(own > -float("inf"), dim, 0)  # an empty shard is not even read
    part = tl.load(out + t * out_t + h * out_h + d, mask=mask, other=0.0)
    acc = part.to(tl.float32) * weight
    tl.store(scaled + t * scaled_t + h * scaled_h + d, acc.to(scaled.dtype.element_ty), mask=d < dim)
    tl.store(lse + t * lse_t + h, merged)
