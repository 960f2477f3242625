"""Absorbed MLA decode over a paged latent cache, split over the context: our own Triton kernel.

Its torch twin is `attention/reference.py`. The splits are put together by `merge.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidcp.kernels.merge import merge_partials

LOG2E = 1.4426950408889634
MAX_SPLITS = 64


def mla_decode(
    q_latent: Tensor,
    q_pe: Tensor,
    kv: Tensor,
    block_table: Tensor,
    local_lens: Tensor,
    softmax_scale: float,
    num_programs: int = 132,
    shared_memory: int = 227 << 10,
) -> tuple[Tensor, Tensor]:
    """softmax([q_latent, q_pe] · kv · softmax_scale) · kv[..., :C] over each row's local tokens.

    Slots beyond a row's length are never read. The context is split so that about `num_programs` run,
    by default one for each multiprocessor of a Hopper GPU, whose shared memory is the default too.

    Args:
        q_latent: [B, H, C]; q_pe: [B, H, R]; both with a contiguous last dim.
        kv: [num_blocks, block_size, C + R], contiguous.
        block_table: [B, W] int32; local_lens: [B] int32.

    Returns:
        out [B, H, C] in q's dtype (0 where a row is empty) and lse [B, H] float32.
    """
    batch, heads, latent = q_latent.shape
    rope = q_pe.shape[2]
    block_h, block_n, warps, stages = choose_tiles(heads, shared_memory)
    tiles = batch * triton.cdiv(heads, block_h)
    capacity = block_table.shape[1] * kv.shape[1]
    wanted = min(num_programs // max(tiles, 1), triton.cdiv(capacity, 64), MAX_SPLITS)
    splits = 1 << max(wanted, 1).bit_length() - 1  # a power of two: few variants to compile in merge
    out_dtype = q_latent.dtype if splits == 1 else torch.float32
    outs = torch.empty(splits, batch, heads, latent, dtype=out_dtype, device=kv.device)
    lses = torch.empty(splits, batch, heads, dtype=torch.float32, device=kv.device)
    if batch:
        mla_decode_kernel[(batch, triton.cdiv(heads, block_h), splits)](
            q_latent, q_pe, kv, block_table, local_lens, outs, lses, softmax_scale * LOG2E,
            *q_latent.stride()[:2], *q_pe.stride()[:2], block_table.stride(0), *outs.stride()[:2],
            *lses.stride()[:2], heads, splits,
            BLOCK_SIZE=kv.shape[1], LATENT=latent, ROPE=rope, BLOCK_H=block_h, BLOCK_N=block_n,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if splits == 1:
        return outs[0], lses[0]
    return merge_partials(outs, lses, q_latent.dtype)


def choose_tiles(heads: int, shared_memory: int) -> tuple[int, int, int, int]:
    """(heads and tokens per tile, warps, stages), the fastest of those tried on an H200 that fit.

    Of the stages half go to the block ids, which the rows' addresses wait for.
    """
    block_h = min(64, max(16, triton.next_power_of_2(heads)))
    if block_h == 16:
        return 16, 64, 4, 4  # 95 KiB
    if block_h == 64 and shared_memory >= 192 << 10:
        return 64, 32, 8, 5  # 185 KiB
    if shared_memory >= 144 << 10:
        return (64, 32, 8, 3) if block_h == 64 else (32, 64, 8, 4)  # 144 and 115 KiB on Hopper
    return 32, 32, 4, 4  # 76 KiB


@triton.jit
def mla_decode_kernel(
    q_latent, q_pe, kv, block_table, local_lens, outs, lses, scale,
    q_latent_b, q_latent_h, q_pe_b, q_pe_h, table_b, outs_s, outs_b, lses_s, lses_b, heads, splits,
    BLOCK_SIZE: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program attends with BLOCK_H heads of one row over one split of its context."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    s = tl.program_id(2)
    c = tl.arange(0, LATENT)
    r = tl.arange(0, ROPE)
    in_heads = h < heads

    length = tl.load(local_lens + b)
    per_split = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    begin = s * per_split
    end = tl.minimum(begin + per_split, length)  # [begin, end) is this split's; may be empty

    top = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, LATENT], tl.float32)
    q = tl.load(
        q_latent + b * q_latent_b + h[:, None] * q_latent_h + c[None, :], mask=in_heads[:, None], other=0.0
    )
    qr = tl.load(q_pe + b * q_pe_b + h[:, None] * q_pe_h + r[None, :], mask=in_heads[:, None], other=0.0)
    for n in range(begin, end, BLOCK_N):
        token = n + tl.arange(0, BLOCK_N)
        seen = token < end
        block = tl.load(block_table + b * table_b + token // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        row = kv + (block * BLOCK_SIZE + token % BLOCK_SIZE) * (LATENT + ROPE)
        k = tl.load(row[:, None] + c[None, :], mask=seen[:, None], other=0.0)
        kr = tl.load(row[:, None] + LATENT + r[None, :], mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k))
        scores = tl.dot(qr, tl.trans(kr), scores) * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: every chunk has a token
        decay = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(k.dtype), k, acc * decay[:, None])
        top = new_top

    empty = end <= begin
    # Base 2 inside, natural outside.
    lse = tl.where(empty, -float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    tl.store(lses + s * lses_s + b * lses_b + h, lse, mask=in_heads)
    out = acc / tl.where(empty, 1.0, total)[:, None]
    dst = outs + s * outs_s + b * outs_b + h[:, None] * LATENT + c[None, :]
    tl.store(dst, out.to(outs.dtype.element_ty), mask=in_heads[:, None])
