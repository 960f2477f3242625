"""MLA decode over a paged cache of latents c, in absorbed form: keys and values are never made.
Since q · (W_UK c) = (W_UKᵀ q) · c, the model applies W_UK to the query before this; and since
Σ p (W_UV c) = W_UV Σ p c, it applies W_UV to the output after this. The definition in torch is in
`attention/reference.py`, Hopper's kernel in `mla_decode_hopper.py`."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidcp.kernels import get_device_properties
from minidcp.kernels.merge import merge_partials
from minidcp.kernels.mla_decode_hopper import TILE, mla_decode_hopper_kernel

LN2 = tl.constexpr(math.log(2.0))
LOG2E = 1.4426950408889634  # exp(x) = exp2(x · LOG2E), and exp2 is what GPUs have
MAX_SPLITS = 64
MIN_TOKENS_OF_SPLIT = 64


@triton.jit(
    do_not_specialize=["splits", "table_b"],
    do_not_specialize_on_alignment=["block_table", "local_lens"],
)
def mla_decode_kernel(
    q_latent, q_pe, kv, block_table, local_lens, outs, lses, scale,
    q_latent_b, q_latent_h, q_pe_b, q_pe_h, table_b, outs_s, outs_b, lses_s, lses_b,  # strides
    heads, splits,
    BLOCK_SIZE: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program attends with BLOCK_H heads of one row over one split of its context.

    `scale` includes LOG2E: inside, all exponentials and logarithms are base 2.
    """
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    b = tl.program_id(1).to(tl.int64)
    s = tl.program_id(2)
    c = tl.arange(0, LATENT)
    r = tl.arange(0, ROPE)
    in_heads = h < heads

    # This split has tokens [begin, end), which may be none.
    length = tl.load(local_lens + b)
    split_length = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    begin = s * split_length
    end = tl.minimum(begin + split_length, length)

    max_score = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, LATENT], tl.float32)
    q_row = q_latent + b * q_latent_b + h[:, None] * q_latent_h
    q = tl.load(q_row + c[None, :], mask=in_heads[:, None], other=0.0)
    q_pe_row = q_pe + b * q_pe_b + h[:, None] * q_pe_h
    q_rope = tl.load(q_pe_row + r[None, :], mask=in_heads[:, None], other=0.0)

    for n in range(begin, end, BLOCK_N):
        # Find the next tokens' rows in the cache, and load their latents and rotated keys.
        token = n + tl.arange(0, BLOCK_N)
        seen = token < end
        block_pointers = block_table + b * table_b + token // BLOCK_SIZE
        block = tl.load(block_pointers, mask=seen, other=0).to(tl.int64)
        cache_row = kv + (block * BLOCK_SIZE + token % BLOCK_SIZE) * (LATENT + ROPE)
        latent = tl.load(cache_row[:, None] + c[None, :], mask=seen[:, None], other=0.0)
        k_rope = tl.load(cache_row[:, None] + LATENT + r[None, :], mask=seen[:, None], other=0.0)

        # Scores, [BLOCK_H, BLOCK_N].
        scores = tl.dot(q, tl.trans(latent))
        scores = tl.dot(q_rope, tl.trans(k_rope), scores) * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))

        # Softmax, online: rescale the sums so far to the new maximum, and add the new ones.
        new_max = tl.maximum(max_score, tl.max(scores, 1))  # finite: every turn has a token
        decay = tl.exp2(max_score - new_max)
        p = tl.exp2(scores - new_max[:, None])
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(latent.dtype), latent, acc * decay[:, None])
        max_score = new_max

    # Base 2 inside, natural logarithm outside.
    is_empty = end <= begin
    safe_total = tl.where(is_empty, 1.0, total)
    lse = tl.where(is_empty, -float("inf"), (max_score + tl.log2(safe_total)) * LN2)
    tl.store(lses + s * lses_s + b * lses_b + h, lse, mask=in_heads)

    out = acc / safe_total[:, None]
    out_row = outs + s * outs_s + b * outs_b + h[:, None] * LATENT
    tl.store(out_row + c[None, :], out.to(outs.dtype.element_ty), mask=in_heads[:, None])


def mla_decode(
    q_latent: Tensor,
    q_pe: Tensor,
    kv: Tensor,
    block_table: Tensor,
    local_lens: Tensor,
    softmax_scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax([q_latent, q_pe] · kv · softmax_scale) · kv[..., :C] over each row's local tokens.

    Args:
        q_latent: [B, H, C], the absorbed part of the queries, contiguous in C.
        q_pe: [B, H, R], the rotated part, contiguous in R.
        kv: [num_blocks, block_size, C + R], the cache. Its rows beyond a row's length are not read.
        block_table: [B, W] int32.
        local_lens: [B] int32, numbers of tokens.
        softmax_scale: factor of the scores.
        out: [B, H, C] in q's dtype, contiguous: where to write the result.

    Returns:
        out [B, H, C] in q's dtype, 0 for rows without tokens, and lse [B, H] float32.
    """
    batch, heads, latent_dim = q_latent.shape
    rope_dim = q_pe.shape[2]
    block_size = kv.shape[1]
    if out is None:
        out = torch.empty(batch, heads, latent_dim, dtype=q_latent.dtype, device=kv.device)
    assert out.is_contiguous() and out.shape == q_latent.shape and out.dtype == q_latent.dtype

    kernel, block_h, options = choose_kernel(heads, latent_dim, rope_dim)
    head_tiles = triton.cdiv(heads, block_h)
    splits = choose_num_splits(batch * head_tiles, block_table.shape[1] * block_size)

    # A single split is the result; several are merged below.
    outs = out[None]
    if splits > 1:
        shape = (splits, batch, heads, latent_dim)
        outs = torch.empty(shape, dtype=torch.float32, device=kv.device)
    lses = torch.empty(splits, batch, heads, dtype=torch.float32, device=kv.device)

    if batch > 0:
        kernel[(head_tiles, batch, splits)](
            q_latent, q_pe, kv, block_table, local_lens, outs, lses, softmax_scale * LOG2E,
            *q_latent.stride()[:2], *q_pe.stride()[:2], block_table.stride(0),
            *outs.stride()[:2], *lses.stride()[:2],
            heads, splits,
            BLOCK_SIZE=block_size, LATENT=latent_dim, ROPE=rope_dim, BLOCK_H=block_h, **options,
        )  # fmt: skip

    if splits == 1:
        return out, lses[0]
    return merge_partials(outs, lses, out=out)


def choose_num_splits(num_programs: int, max_tokens: int) -> int:
    """Into how many splits to cut contexts of at most `max_tokens`.

    About one program then runs on each multiprocessor. `num_programs` is how many there are without
    splits. The result is a power of two, so that few variants of the merge have to be compiled.
    """
    to_fill_gpu = get_device_properties().multiprocessors // max(num_programs, 1)
    max_useful = triton.cdiv(max_tokens, MIN_TOKENS_OF_SPLIT)
    splits = max(1, min(to_fill_gpu, max_useful, MAX_SPLITS))
    return int(1 << (splits.bit_length() - 1))


def choose_kernel(heads: int, latent_dim: int, rope_dim: int) -> tuple[Any, int, dict[str, int]]:
    """The kernel, its heads per program and its other options: the fastest of those that fit."""
    device = get_device_properties()
    block_h = max(16, triton.next_power_of_2(heads))

    # Bytes: q, two tiles of keys, and probabilities, in bf16; some to spare.
    hopper_bytes = 2 * TILE * (3 * (latent_dim + rope_dim) + TILE) + 1024
    fits_hopper_tiles = min(latent_dim, rope_dim, block_h) >= TILE
    if device.capability == (9, 0) and fits_hopper_tiles and hopper_bytes <= device.shared_memory:
        return mla_decode_hopper_kernel, TILE, {"BLOCK_N": TILE, "num_warps": 8}

    # The sizes in the comments are what the kernel takes of shared memory for C + R = 576.
    if block_h == 16:
        return mla_decode_kernel, 16, {"BLOCK_N": 64, "num_warps": 4, "num_stages": 4}  # 95 KiB
    if device.shared_memory >= 144 << 10:
        return mla_decode_kernel, 32, {"BLOCK_N": 64, "num_warps": 8, "num_stages": 4}  # 115 KiB
    return mla_decode_kernel, 32, {"BLOCK_N": 32, "num_warps": 4, "num_stages": 4}  # 76 KiB
