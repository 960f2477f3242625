"""Merging partial attention results by their log-sum-exp: two Triton kernels and their torch twins.

LSEs are natural logarithms in fp32; -inf marks an empty shard, whose output may hold anything, NaN too: it is masked,
never multiplied by zero. Source: FlashDecoding's reduction, arXiv:2307.08691 §3.1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidcp.kernels import use_triton


def merge_partials(outs: Tensor, lses: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Attention over the union of N shards.

    Args:
        outs: [N, T, H, D] partial outputs, contiguous D; lses: [N, T, H] float32. Other strides are free.
        dtype: of the result; outs' by default.

    Returns:
        out [T, H, D] (0 where every shard is empty) and lse [T, H] float32.
    """
    dtype = dtype or outs.dtype
    if not use_triton(outs):
        return merge_partials_ref(outs, lses, dtype)
    size, tokens, heads, dim = outs.shape
    assert outs.stride(3) == 1
    out = torch.empty(tokens, heads, dim, dtype=dtype, device=outs.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=outs.device)
    if tokens:
        width = triton.next_power_of_2(dim)
        rows = max(1, min(1024 // width, triton.next_power_of_2(tokens * heads // 1024)))
        merge_kernel[(triton.cdiv(tokens * heads, rows),)](
            outs, lses, out, lse, *outs.stride()[:3], *lses.stride(), size, tokens, heads, dim,
            ROWS=rows, DIM=width, CHUNK=min(8, triton.next_power_of_2(size)),
            num_warps=max(1, rows * width * outs.element_size() // 1024),
        )  # fmt: skip
    return out, lse


def merge_partials_ref(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == -torch.inf, 0.0)).exp()  # [N, T, H]
    parts = outs.float().masked_fill((lses == -torch.inf)[..., None], 0.0)
    return torch.einsum("nth,nthd->thd", weights, parts).to(dtype), lse


@triton.jit
def merge_kernel(
    outs, lses, out, lse, outs_n, outs_t, outs_h, lses_n, lses_t, lses_h, size, tokens, heads, dim,
    ROWS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program merges the N partials of ROWS (token, head) pairs."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < tokens * heads
    limit = tl.where(there, size, 0)  # of shards that a row has
    t, h = (row // heads).to(tl.int64), row % heads
    d = tl.arange(0, DIM)[None, :]
    outs += (t * outs_t + h * outs_h)[:, None] + d
    lses += t * lses_t + h * lses_h
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for first in range(0, size, CHUNK):
        parts, part_lses = (), ()
        for i in tl.static_range(CHUNK):
            shard, live = tl.cast(first + i, tl.int64), first + i < limit
            parts += (tl.load(outs + shard * outs_n, mask=live[:, None] & (d < dim), other=0.0),)  # type: ignore[assignment]
        tl.debug_barrier()  # so that all loads are under way before one is waited for
        for i in tl.static_range(CHUNK):
            shard, live = tl.cast(first + i, tl.int64), first + i < limit
            part_lses += (tl.load(lses + shard * lses_n, mask=live, other=-float("inf")),)  # type: ignore[assignment]
        top, total, acc = add_partials(top, total, acc, parts, part_lses)
    store_merged(top, total, acc, out, lse, row, there, d, dim)


@triton.jit
def add_partials(top, total, acc, parts, lses):
    """Add partials, tuples of parts [ROWS, DIM] and lses [ROWS], to the sums over those before, which are scaled by
    exp(-top), the largest lse so far."""
    new_top = top
    for i in tl.static_range(len(lses)):
        new_top = tl.maximum(new_top, lses[i])
    base = tl.where(new_top == -float("inf"), 0.0, new_top)
    decay = tl.exp(top - base)
    total *= decay
    acc *= decay[:, None]
    for i in tl.static_range(len(lses)):
        weight = tl.exp(lses[i] - base)
        total += weight
        part = tl.where(weight[:, None] > 0, parts[i].to(tl.float32), 0.0)  # an empty shard may hold NaN
        acc += part * weight[:, None]
    return new_top, total, acc


@triton.jit
def store_merged(top, total, acc, out, lse, row, there, d, dim):
    """Write the sums of `add_partials` to rows `row` of contiguous out [rows, dim] and lse [rows]."""
    some = tl.where(total > 0, total, 1.0)
    tl.store(lse + row, tl.where(total > 0, tl.log(some) + top, -float("inf")), mask=there)
    dst = out + row.to(tl.int64)[:, None] * dim + d
    merged = acc * (1.0 / some)[:, None]
    tl.store(dst, merged.to(out.dtype.element_ty), mask=there[:, None] & (d < dim))


def rescale_partial(out: Tensor, lses: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Rank `rank`'s share of the union: its partial output times exp(its lse - lse of the union).

    From out [T, H, D] with contiguous D and every rank's lses [N, T, H] float32: [T, H, D] in out's dtype, to be summed
    over the ranks, and the union's lse [T, H] float32.
    """
    if not use_triton(out):
        return rescale_partial_ref(out, lses, rank)
    tokens, heads, dim = out.shape
    assert out.stride(2) == 1
    scaled = torch.empty(tokens, heads, dim, dtype=out.dtype, device=out.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=out.device)
    if tokens:
        rescale_kernel[(tokens, heads)](
            out, lses, scaled, lse, *out.stride()[:2], *lses.stride(), rank, lses.shape[0], dim,
            SIZE=triton.next_power_of_2(lses.shape[0]), DIM=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
    return scaled, lse


def rescale_partial_ref(out: Tensor, lses: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    lse = lses.logsumexp(0)
    own = lses[rank]
    weight = (own - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    part = out.float().masked_fill((own == -torch.inf)[..., None], 0.0)
    return (part * weight[..., None]).to(out.dtype), lse


@triton.jit
def rescale_kernel(
    out, lses, scaled, lse, out_t, out_h, lses_n, lses_t, lses_h, rank, size, dim,
    SIZE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One program rescales one token and head."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = t * tl.num_programs(1) + h
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
    tl.store(scaled + row * dim + d, (part.to(tl.float32) * weight).to(scaled.dtype.element_ty), mask=d < dim)
    tl.store(lse + row, merged)
