"""Merging partial attention results by their log-sum-exp: a Triton kernel and its torch twin. LSEs are natural
logarithms in fp32; -inf marks an empty shard, whose output may hold anything, NaN too: it is masked, never multiplied
by zero. Source: FlashDecoding's reduction, arXiv:2307.08691 §3.1."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidcp.kernels import use_triton


def merge_partials(
    outs: Tensor, lses: Tensor, dtype: torch.dtype | None = None, only: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the union of N shards: partial outputs outs [N, T, H, D], contiguous D, and lses [N, T, H] float32
    -> out [T, H, D] in `dtype` or outs' (0 where every shard is empty) and lse [T, H] float32. With `only`, that
    shard's share alone, outs[only] times exp(its lse - lse of the union), reading no other: shares sum to the whole."""
    dtype = dtype or outs.dtype
    if not use_triton(outs):
        return merge_partials_ref(outs, lses, dtype, only)
    size, tokens, heads, dim = outs.shape
    assert outs.stride(3) == 1
    out = torch.empty(tokens, heads, dim, dtype=dtype, device=outs.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=outs.device)
    width = triton.next_power_of_2(dim)
    rows = max(1, min(1024 // width, triton.next_power_of_2(tokens * heads) // 1024))
    merge_kernel[(triton.cdiv(tokens * heads, rows),)](
        outs, lses, out, lse, *outs.stride()[:3], *lses.stride(), size, tokens, heads, dim,
        ROWS=rows, DIM=width, CHUNK=min(8, triton.next_power_of_2(size)), ONLY=-1 if only is None else only,
        num_warps=max(1, rows * width * outs.element_size() // 1024),
    )  # fmt: skip
    return out, lse


def merge_partials_ref(outs: Tensor, lses: Tensor, dtype: torch.dtype, only: int | None) -> tuple[Tensor, Tensor]:
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == -torch.inf, 0.0)).exp()  # [N, T, H]
    some = slice(None) if only is None else slice(only, only + 1)
    parts = outs[some].float().masked_fill((lses[some] == -torch.inf)[..., None], 0.0)
    return torch.einsum("nth,nthd->thd", weights[some], parts).to(dtype), lse


@triton.jit(do_not_specialize=["lses_n", "lses_t", "lses_h", "size", "tokens", "heads"])
def merge_kernel(
    outs, lses, out, lse, outs_n, outs_t, outs_h, lses_n, lses_t, lses_h, size, tokens, heads, dim,
    ROWS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, ONLY: tl.constexpr,
):  # fmt: skip
    """One program merges the N partials of ROWS (token, head) pairs, or rescales partial ONLY of them."""
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
            if ONLY >= 0:
                live = first + i < tl.where(shard == ONLY, limit, 0)
            parts += (tl.load(outs + shard * outs_n, mask=live[:, None] & (d < dim), other=0.0),)  # type: ignore[assignment]
        tl.debug_barrier()  # so that all loads are under way before one is waited for
        for i in tl.static_range(CHUNK):
            shard, live = tl.cast(first + i, tl.int64), first + i < limit
            part_lses += (tl.load(lses + shard * lses_n, mask=live, other=-float("inf")),)  # type: ignore[assignment]
        top, total, acc = add_partials(top, total, acc, parts, part_lses)
    store_merged(top, total, acc, out, lse, row, there, d, dim)


@triton.jit
def add_partials(top, total, acc, parts, lses):
    """Add tuples of parts [ROWS, DIM] and lses [ROWS] to the sums so far, scaled by exp(-top), top their largest."""
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
