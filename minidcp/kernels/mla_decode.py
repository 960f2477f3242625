"""Absorbed MLA decode over a paged latent cache, split over the context, in Triton for any GPU; for Hopper there is
`mla_decode_hopper.py`. The torch twin is `attention/reference.py`; `merge.py` puts the splits together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidcp.kernels import gpu
from minidcp.kernels.merge import merge_partials
from minidcp.kernels.mla_decode_hopper import TILE, hopper_kernel

LOG2E = 1.4426950408889634
MAX_SPLITS = 64


def mla_decode(
    q_latent: Tensor, q_pe: Tensor, kv: Tensor, block_table: Tensor, local_lens: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """softmax([q_latent, q_pe] · kv · softmax_scale) · kv[..., :C] over each row's local tokens: q_latent [B, H, C] and
    q_pe [B, H, R] with a contiguous last dim, kv [num_blocks, block_size, C + R], block_table [B, W] and local_lens [B]
    int32 -> out [B, H, C] in q's dtype (0 where a row is empty) and lse [B, H] float32. Slots beyond a row's length are
    never read. The context is split so that about one program runs on each multiprocessor."""
    batch, heads, latent = q_latent.shape
    rope = q_pe.shape[2]
    kernel, block_h, options = choose_kernel(heads, latent, rope)
    head_tiles = triton.cdiv(heads, block_h)
    capacity = block_table.shape[1] * kv.shape[1]
    wanted = min(gpu().multiprocessors // max(batch * head_tiles, 1), triton.cdiv(capacity, 64), MAX_SPLITS)
    splits = 1 << max(wanted, 1).bit_length() - 1  # a power of two: few variants to compile in merge
    out_dtype = q_latent.dtype if splits == 1 else torch.float32
    outs = torch.empty(splits, batch, heads, latent, dtype=out_dtype, device=kv.device)
    lses = torch.empty(splits, batch, heads, dtype=torch.float32, device=kv.device)
    if batch:
        kernel[(head_tiles, batch, splits)](
            q_latent, q_pe, kv, block_table, local_lens, outs, lses, softmax_scale * LOG2E,
            *q_latent.stride()[:2], *q_pe.stride()[:2], block_table.stride(0), *outs.stride()[:2],
            *lses.stride()[:2], heads, splits,
            BLOCK_SIZE=kv.shape[1], LATENT=latent, ROPE=rope, BLOCK_H=block_h, **options,
        )  # fmt: skip
    if splits == 1:
        return outs[0], lses[0]
    return merge_partials(outs, lses, q_latent.dtype)


def choose_kernel(heads: int, latent: int, rope: int):
    """(kernel, heads per tile, its other options): the fastest of those tried that fit."""
    block_h = max(16, triton.next_power_of_2(heads))
    needed = 2 * TILE * (3 * (latent + rope) + TILE) + 1024  # bytes: q, two tiles of k, probabilities; some to spare
    if gpu().capability == (9, 0) and min(latent, rope, block_h) >= TILE and needed <= gpu().shared_memory:
        return hopper_kernel, TILE, {"BLOCK_N": TILE, "num_warps": 8}
    if block_h == 16:
        return mla_decode_kernel, 16, {"BLOCK_N": 64, "num_warps": 4, "num_stages": 4}  # 95 KiB for 576
    if gpu().shared_memory >= 144 << 10:
        return mla_decode_kernel, 32, {"BLOCK_N": 64, "num_warps": 8, "num_stages": 4}  # 115 KiB
    return mla_decode_kernel, 32, {"BLOCK_N": 32, "num_warps": 4, "num_stages": 4}  # 76 KiB


@triton.jit(do_not_specialize=["splits", "table_b"], do_not_specialize_on_alignment=["block_table", "local_lens"])
def mla_decode_kernel(
    q_latent, q_pe, kv, block_table, local_lens, outs, lses, scale,
    q_latent_b, q_latent_h, q_pe_b, q_pe_h, table_b, outs_s, outs_b, lses_s, lses_b, heads, splits,
    BLOCK_SIZE: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program attends with BLOCK_H heads of one row over one split of its context."""
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    b = tl.program_id(1).to(tl.int64)
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
    q = tl.load(q_latent + b * q_latent_b + h[:, None] * q_latent_h + c[None, :], mask=in_heads[:, None], other=0.0)
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
