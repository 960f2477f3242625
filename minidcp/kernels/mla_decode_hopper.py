"""The inner loop of MLA decode for Hopper GPUs: `mla_decode_kernel`'s contract, in Gluon. Gluon is Triton with layouts
and memory in the programmer's hand. It is needed here because Triton lets both warpgroups compute the same scores; here
each takes half of a tile's tokens, and then half of the latent dim of the output."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

# Triton 3.9 has the new names, 3.6 only the old ones.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

TILE = 64  # heads and tokens


@gluon.jit
def find_rows(table, n, last, BLOCK_N: gl.constexpr, BLOCK_SIZE: gl.constexpr, copy: gl.constexpr):
    """The cache rows of the tokens from n on; those beyond `last` count as `last`, so nothing is masked."""
    token = gl.minimum(n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, copy)), last)
    return gl.load(table + token // BLOCK_SIZE).to(gl.int64) * BLOCK_SIZE + token % BLOCK_SIZE


@gluon.jit
def start_copy(kv, rows, k, k_pe, LATENT: gl.constexpr, ROPE: gl.constexpr, copy: gl.constexpr):
    """Start copying these rows to shared memory."""
    row = kv + rows[:, None] * (LATENT + ROPE)
    async_load(k, row + gl.arange(0, LATENT, gl.SliceLayout(0, copy))[None, :])
    async_load(k_pe, row + LATENT + gl.arange(0, ROPE, gl.SliceLayout(0, copy))[None, :])
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["splits", "table_b"], do_not_specialize_on_alignment=["block_table", "local_lens"])
def hopper_kernel(
    q_latent, q_pe, kv, block_table, local_lens, outs, lses, scale,
    q_latent_b, q_latent_h, q_pe_b, q_pe_h, table_b, outs_s, outs_b, lses_s, lses_b, heads, splits,
    BLOCK_SIZE: gl.constexpr, LATENT: gl.constexpr, ROPE: gl.constexpr,
    BLOCK_H: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """One program attends with BLOCK_H heads of one row over one split of its context. Programs with the other heads of
    that row run beside it and find the keys in the L2 cache."""
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    by_token: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_N // 2, 16])  # scores
    by_dim: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, LATENT // 2, 16])  # output
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
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

    length = gl.load(local_lens + b)
    per_split = gl.cdiv(gl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    begin = s * per_split
    end = gl.minimum(begin + per_split, length)  # [begin, end) is this split's; may be empty
    if begin >= end:
        gl.store(lses, gl.full([BLOCK_H], -float("inf"), gl.float32, gl.SliceLayout(1, by_token)), mask=h < heads)
        if splits == 1:  # else the merge masks it
            zeros = gl.full([BLOCK_H, LATENT], 0.0, outs.dtype.element_ty, copy)
            gl.store(outs + h_copy[:, None] * LATENT + c_copy[None, :], zeros, mask=(h_copy < heads)[:, None])
        return
    last = end - 1

    dtype = kv.dtype.element_ty
    q = gl.allocate_shared_memory(dtype, [BLOCK_H, LATENT], shared)
    qr = gl.allocate_shared_memory(dtype, [BLOCK_H, ROPE], shared)
    ks = gl.allocate_shared_memory(dtype, [2, BLOCK_N, LATENT], shared)  # one is copied, one is used
    krs = gl.allocate_shared_memory(dtype, [2, BLOCK_N, ROPE], shared)
    ps = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], shared)
    in_heads = (h_copy < heads)[:, None]
    q_row = (q_latent + b * q_latent_b + h_copy * q_latent_h)[:, None]
    qr_row = (q_pe + b * q_pe_b + h_copy * q_pe_h)[:, None]
    async_load(q, q_row + c_copy[None, :], mask=in_heads)
    async_load(qr, qr_row + r_copy[None, :], mask=in_heads)
    # Rows are looked up a tile ahead of their copying.
    rows = find_rows(table, begin, last, BLOCK_N, BLOCK_SIZE, copy)
    start_copy(kv, rows, ks.index(0), krs.index(0), LATENT, ROPE, copy)
    rows = find_rows(table, begin + BLOCK_N, last, BLOCK_N, BLOCK_SIZE, copy)

    top = gl.full([BLOCK_H], -float("inf"), gl.float32, gl.SliceLayout(1, by_token))
    sums = gl.full([BLOCK_H, BLOCK_N], 0.0, gl.float32, by_token)  # added up over the tokens at the end
    acc = gl.full([BLOCK_H, LATENT], 0.0, gl.float32, by_dim)
    zero = gl.full([BLOCK_H, BLOCK_N], 0.0, gl.float32, by_token)
    off = gl.arange(0, BLOCK_N, gl.SliceLayout(0, by_token))
    use = 0
    for n in range(begin, end, BLOCK_N):
        async_copy.wait_group(0)
        fence_async_shared()
        k = ks.index(use)
        scores = warpgroup_mma(qr, krs.index(use).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma(q, k.permute((1, 0)), scores, is_async=True)
        if n + BLOCK_N < end:
            start_copy(kv, rows, ks.index(1 - use), krs.index(1 - use), LATENT, ROPE, copy)
        rows = find_rows(table, n + 2 * BLOCK_N, last, BLOCK_N, BLOCK_SIZE, copy)
        scores = warpgroup_mma_wait(0, [scores])
        scores = gl.where((n + off < end)[None, :], scores, -float("inf"))
        new_top = gl.maximum(top, gl.max(scores, 1) * scale)  # finite: every tile has a token
        decay = gl.exp2(top - new_top)
        p = gl.exp2(scores * scale - new_top[:, None])
        sums = sums * decay[:, None] + p
        top = new_top
        ps.store(p.to(dtype))
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, by_dim))[:, None]
        fence_async_shared()
        barrier()  # each warpgroup has written half of the probabilities that both read
        acc = warpgroup_mma_wait(0, [warpgroup_mma(ps, k, acc, is_async=True)])
        barrier()  # the next turn copies into this k and writes ps
        use = 1 - use

    total = gl.sum(sums, 1)
    gl.store(lses, (top + gl.log2(total)) * 0.6931471805599453, mask=h < heads)  # base 2 to natural
    out = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, by_dim))[:, None]
    dst = outs + h_out[:, None] * LATENT + c_out[None, :]
    gl.store(dst, out.to(outs.dtype.element_ty), mask=(h_out < heads)[:, None])
