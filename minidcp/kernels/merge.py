"""Merging the partial attention results of several shards of the context, exactly:
    lse = ln Σ exp(lse_i),  out = Σ exp(lse_i - lse) out_i,  with out_i and lse_i of shard i.
Source: Dao, Haziza, Massa, Sizov 2023, "Flash-Decoding for long-context inference" (blog post).
`peer.py` does the same with shards of several ranks."""

import torch
from torch import Tensor

from minidcp.kernels import use_triton
from minidcp.kernels.compiler import tl, triton


def merge_partials_ref(
    outs: Tensor, lses: Tensor, dtype: torch.dtype, only: int | None
) -> tuple[Tensor, Tensor]:
    lse = lses.logsumexp(0)  # [T, H]
    finite_lse = lse.masked_fill(lse == -torch.inf, 0.0)  # -inf - -inf would be NaN
    weights = (lses - finite_lse).exp()  # [N, T, H]

    shards = slice(None) if only is None else slice(only, only + 1)
    is_empty = lses[shards] == -torch.inf
    parts = outs[shards].float().masked_fill(is_empty[..., None], 0.0)
    return torch.einsum("nth,nthd->thd", weights[shards], parts).to(dtype), lse


@triton.jit(do_not_specialize=["lses_n", "lses_t", "lses_h", "num_shards", "tokens", "heads"])
def merge_partials_kernel(
    outs, lses, out, lse,
    outs_n, outs_t, outs_h, lses_n, lses_t, lses_h,  # strides
    num_shards, tokens, heads, dim,
    ROWS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, ONLY: tl.constexpr,
):  # fmt: skip
    """One program merges the N partials of ROWS (token, head) pairs, CHUNK shards at a time.

    If ONLY >= 0 it reads the output of that shard alone and rescales it.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < tokens * heads
    row_shards = tl.where(in_rows, num_shards, 0)  # how many shards a row has
    t = (row // heads).to(tl.int64)
    h = row % heads
    d = tl.arange(0, DIM)[None, :]
    outs += (t * outs_t + h * outs_h)[:, None] + d
    lses += t * lses_t + h * lses_h

    max_lse = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for first in range(0, num_shards, CHUNK):
        # Load the outputs of a chunk of shards.
        parts = ()
        for i in tl.static_range(CHUNK):
            shard = tl.cast(first + i, tl.int64)
            is_read = first + i < row_shards
            if ONLY >= 0:
                is_read = first + i < tl.where(shard == ONLY, row_shards, 0)
            mask = is_read[:, None] & (d < dim)
            part = tl.load(outs + shard * outs_n, mask=mask, other=0.0)
            parts += (part,)  # type: ignore[assignment]

        # All loads must be under way before one of them is waited for.
        tl.debug_barrier()

        # Load their LSEs, and add them to the sums.
        part_lses = ()
        for i in tl.static_range(CHUNK):
            shard = tl.cast(first + i, tl.int64)
            part_lse = tl.load(
                lses + shard * lses_n, mask=first + i < row_shards, other=-float("inf")
            )
            part_lses += (part_lse,)  # type: ignore[assignment]
        max_lse, total, acc = add_partials(max_lse, total, acc, parts, part_lses)

    store_merged(max_lse, total, acc, out, lse, row, in_rows, d, dim)


@triton.jit
def add_partials(max_lse, total, acc, parts, part_lses):
    """Add several partial results to the sums so far.

    max_lse [ROWS] is the largest LSE so far; total [ROWS] and acc [ROWS, DIM] are the sums of
    exp(lse_i - max_lse) and of exp(lse_i - max_lse) out_i. parts and part_lses are tuples of
    [ROWS, DIM] and [ROWS]. Gives the new max_lse, total and acc.
    """
    new_max = max_lse
    for i in tl.static_range(len(part_lses)):
        new_max = tl.maximum(new_max, part_lses[i])

    # Rescale the sums to the new maximum. Where all is empty yet, avoid -inf - -inf.
    base = tl.where(new_max == -float("inf"), 0.0, new_max)
    decay = tl.exp(max_lse - base)
    total *= decay
    acc *= decay[:, None]

    for i in tl.static_range(len(part_lses)):
        weight = tl.exp(part_lses[i] - base)
        total += weight
        # The output of an empty shard may be NaN, so it is masked.
        part = tl.where(weight[:, None] > 0, parts[i].to(tl.float32), 0.0)
        acc += part * weight[:, None]
    return new_max, total, acc


@triton.jit
def store_merged(max_lse, total, acc, out, lse, row, in_rows, d, dim):
    """Write the sums of `add_partials` to rows `row` of contiguous out [rows, dim] and lse [rows].

    Where every shard was empty, out is 0 and lse is -inf.
    """
    safe_total = tl.where(total > 0, total, 1.0)
    merged_lse = tl.where(total > 0, tl.log(safe_total) + max_lse, -float("inf"))
    tl.store(lse + row, merged_lse, mask=in_rows)

    pointers = out + row.to(tl.int64)[:, None] * dim + d
    merged = acc * (1.0 / safe_total)[:, None]
    tl.store(pointers, merged.to(out.dtype.element_ty), mask=in_rows[:, None] & (d < dim))


def merge_partials(
    outs: Tensor,
    lses: Tensor,
    dtype: torch.dtype | None = None,
    only: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the union of N shards of the context.

    Args:
        outs: [N, T, H, D], the shards' partial outputs, contiguous in D.
        lses: [N, T, H] float32, their log-sum-exps, natural logarithms. -inf marks an empty shard,
            whose output may be anything, even NaN: it is masked, never multiplied by zero.
        dtype: of the result; by default that of `out`, or of `outs`.
        only: give this shard's summand alone, outs[only] · exp(lses[only] - lse), without reading
            the outputs of the other shards. The summands of all shards add up to the whole.
        out: [T, H, D], contiguous: where to write the result.

    Returns:
        out [T, H, D], 0 where every shard is empty, and lse [T, H] float32 of the union.
    """
    if dtype is None:
        dtype = outs.dtype if out is None else out.dtype
    if not use_triton(outs):
        merged, lse = merge_partials_ref(outs, lses, dtype, only)
        if out is not None:
            merged = out.copy_(merged)
        return merged, lse

    num_shards, tokens, heads, dim = outs.shape
    assert outs.stride(3) == 1
    if out is None:
        out = torch.empty(tokens, heads, dim, dtype=dtype, device=outs.device)
    assert out.is_contiguous() and out.shape == outs.shape[1:] and out.dtype == dtype
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=outs.device)

    # Up to 1024 values a program; fewer if there would be less than about 1024 programs.
    width = triton.next_power_of_2(dim)
    rows = max(1, min(1024 // width, triton.next_power_of_2(tokens * heads) // 1024))

    merge_partials_kernel[(triton.cdiv(tokens * heads, rows),)](
        outs, lses, out, lse,
        *outs.stride()[:3], *lses.stride(),
        num_shards, tokens, heads, dim,
        ROWS=rows, DIM=width, CHUNK=min(8, triton.next_power_of_2(num_shards)),
        ONLY=-1 if only is None else only,
        num_warps=max(1, rows * width * outs.element_size() // 1024),
    )  # fmt: skip
    return out, lse
