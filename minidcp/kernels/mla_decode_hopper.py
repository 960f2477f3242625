"""MLA decode for Hopper GPUs in Gluon: `mla_decode_kernel`'s contract (read `mla_decode.py` first).
Gluon is Triton with layouts and memory in the programmer's hand. It is needed here because Triton
lets both warpgroups compute the same scores. Here each warpgroup takes half of a tile's tokens for
the scores, and then half of the latent dim for the output."""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.9 has the new names, 3.6 only the old ones.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

TILE = 64  # heads of a program, and tokens at a time
LN2 = gl.constexpr(math.log(2.0))


@gluon.jit
def find_cache_rows(
    table, n, last, BLOCK_N: gl.constexpr, BLOCK_SIZE: gl.constexpr, copy: gl.constexpr
):
    """The cache rows of tokens [n, n + BLOCK_N). Tokens beyond `last` count as `last`, so that
    nothing has to be masked."""
    token = gl.minimum(n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, copy)), last)
    block = gl.load(table + token // BLOCK_SIZE).to(gl.int64)
    return block * BLOCK_SIZE + token % BLOCK_SIZE


@gluon.jit
def start_copy(
    kv, cache_rows, latent, k_rope, LATENT: gl.constexpr, ROPE: gl.constexpr, copy: gl.constexpr
):
    """Start copying these rows of the cache to shared memory."""
    row = kv + cache_rows[:, None] * (LATENT + ROPE)
    async_load(latent, row + gl.arange(0, LATENT, gl.SliceLayout(0, copy))[None, :])
    async_load(k_rope, row + LATENT + gl.arange(0, ROPE, gl.SliceLayout(0, copy))[None, :])
    async_copy.commit_group()


@gluon.jit(
    do_not_specialize=["splits", "table_b"],
    do_not_specialize_on_alignment=["block_table", "local_lens"],
)
def mla_decode_hopper_kernel(
    q_latent, q_pe, kv, block_table, local_lens, outs, lses, scale,
    q_latent_b, q_latent_h, q_pe_b, q_pe_h, table_b, outs_s, outs_b, lses_s, lses_b,  # strides
    heads, splits,
    BLOCK_SIZE: gl.constexpr, LATENT: gl.constexpr, ROPE: gl.constexpr,
    BLOCK_H: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """One program attends with BLOCK_H heads of one row over one split of its context.

    Programs with the other heads of that row run beside it and find the keys in the L2 cache.
    """
    # Layouts: of copies, of scores and probabilities (a warpgroup has half of the tokens), of the
    # output (a warpgroup has half of the latent dim), and of shared memory.
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    by_token: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_N // 2, 16])
    by_dim: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, LATENT // 2, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

    # The same index vectors in each layout that needs them.
    first_head = gl.program_id(0) * BLOCK_H
    b = gl.program_id(1).to(gl.int64)
    s = gl.program_id(2)
    h = first_head + gl.arange(0, BLOCK_H, gl.SliceLayout(1, by_token))
    h_copy = first_head + gl.arange(0, BLOCK_H, gl.SliceLayout(1, copy))
    h_out = first_head + gl.arange(0, BLOCK_H, gl.SliceLayout(1, by_dim))
    c_copy = gl.arange(0, LATENT, gl.SliceLayout(0, copy))
    c_out = gl.arange(0, LATENT, gl.SliceLayout(0, by_dim))
    r_copy = gl.arange(0, ROPE, gl.SliceLayout(0, copy))
    outs += s * outs_s + b * outs_b
    lses += s * lses_s + b * lses_b + h
    table = block_table + b * table_b

    # This split has tokens [begin, end), which may be none.
    length = gl.load(local_lens + b)
    split_length = gl.cdiv(gl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    begin = s * split_length
    end = gl.minimum(begin + split_length, length)
    if begin >= end:
        no_lse = gl.full([BLOCK_H], -float("inf"), gl.float32, gl.SliceLayout(1, by_token))
        gl.store(lses, no_lse, mask=h < heads)
        if splits == 1:  # else the merge masks the output
            zeros = gl.full([BLOCK_H, LATENT], 0.0, outs.dtype.element_ty, copy)
            pointers = outs + h_copy[:, None] * LATENT + c_copy[None, :]
            gl.store(pointers, zeros, mask=(h_copy < heads)[:, None])
        return
    last = end - 1

    # Shared memory. Of the two tiles of latents and keys one is copied while one is used.
    dtype = kv.dtype.element_ty
    q = gl.allocate_shared_memory(dtype, [BLOCK_H, LATENT], shared)
    q_rope = gl.allocate_shared_memory(dtype, [BLOCK_H, ROPE], shared)
    latents = gl.allocate_shared_memory(dtype, [2, BLOCK_N, LATENT], shared)
    k_ropes = gl.allocate_shared_memory(dtype, [2, BLOCK_N, ROPE], shared)
    probabilities = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], shared)

    # Start copying the queries and the first tile. Rows are looked up one tile ahead.
    in_heads = (h_copy < heads)[:, None]
    q_row = (q_latent + b * q_latent_b + h_copy * q_latent_h)[:, None]
    q_pe_row = (q_pe + b * q_pe_b + h_copy * q_pe_h)[:, None]
    async_load(q, q_row + c_copy[None, :], mask=in_heads)
    async_load(q_rope, q_pe_row + r_copy[None, :], mask=in_heads)
    rows = find_cache_rows(table, begin, last, BLOCK_N, BLOCK_SIZE, copy)
    start_copy(kv, rows, latents.index(0), k_ropes.index(0), LATENT, ROPE, copy)
    rows = find_cache_rows(table, begin + BLOCK_N, last, BLOCK_N, BLOCK_SIZE, copy)

    max_score = gl.full([BLOCK_H], -float("inf"), gl.float32, gl.SliceLayout(1, by_token))
    sums = gl.full([BLOCK_H, BLOCK_N], 0.0, gl.float32, by_token)  # added up over the tokens last
    acc = gl.full([BLOCK_H, LATENT], 0.0, gl.float32, by_dim)
    zero = gl.full([BLOCK_H, BLOCK_N], 0.0, gl.float32, by_token)
    offset = gl.arange(0, BLOCK_N, gl.SliceLayout(0, by_token))
    use = 0
    for n in range(begin, end, BLOCK_N):
        # The copy of this tile is done.
        async_copy.wait_group(0)
        fence_async_shared()

        # Start the scores, [BLOCK_H, BLOCK_N].
        latent = latents.index(use)
        k_rope = k_ropes.index(use)
        scores = warpgroup_mma(q_rope, k_rope.permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma(q, latent.permute((1, 0)), scores, is_async=True)

        # Meanwhile start copying the next tile, and look up the one after it.
        if n + BLOCK_N < end:
            start_copy(kv, rows, latents.index(1 - use), k_ropes.index(1 - use), LATENT, ROPE, copy)
        rows = find_cache_rows(table, n + 2 * BLOCK_N, last, BLOCK_N, BLOCK_SIZE, copy)

        scores = warpgroup_mma_wait(0, [scores])
        scores = gl.where((n + offset < end)[None, :], scores, -float("inf"))

        # Softmax, online: rescale the sums so far to the new maximum, and add the new ones.
        new_max = gl.maximum(max_score, gl.max(scores, 1) * scale)  # finite: a tile has a token
        decay = gl.exp2(max_score - new_max)
        p = gl.exp2(scores * scale - new_max[:, None])
        sums = sums * decay[:, None] + p
        max_score = new_max
        probabilities.store(p.to(dtype))
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, by_dim))[:, None]

        # Each warpgroup has written half of the probabilities, and both read all of them.
        fence_async_shared()
        barrier()
        acc = warpgroup_mma_wait(0, [warpgroup_mma(probabilities, latent, acc, is_async=True)])

        # The next turn copies into this tile and writes probabilities, so both must be done.
        barrier()
        use = 1 - use

    # Base 2 inside, natural logarithm outside.
    total = gl.sum(sums, 1)
    gl.store(lses, (max_score + gl.log2(total)) * LN2, mask=h < heads)

    out = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, by_dim))[:, None]
    pointers = outs + h_out[:, None] * LATENT + c_out[None, :]
    gl.store(pointers, out.to(outs.dtype.element_ty), mask=(h_out < heads)[:, None])
