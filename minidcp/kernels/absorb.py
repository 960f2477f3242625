"""Between q and absorbed attention: W_UK is applied to the queries. For few tokens the same kernel
also does what `kv_store.py` does, because launches would take most of the time. The definition in
torch is that of the kernels it stands for."""

from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous
from minidcp.kernels.compiler import tl, triton
from minidcp.kernels.kv_store import NewLatents, load_rotated, store_latents, store_token
from minidcp.kernels.linear import (
    MAX_TOKENS_OF_HEADS,
    choose_num_warps,
    choose_tile,
    multiply_by_head,
    multiply_tile,
)


def split_query(q: Tensor, w_uk: Tensor) -> tuple[Tensor, Tensor]:
    """q_nope and q_pe."""
    nope = w_uk.shape[1]
    return q[..., :nope], q[..., nope:]


@triton.jit(
    do_not_specialize=["tokens"],
    do_not_specialize_on_alignment=["slot_mapping"],  # a slice of it may begin anywhere
)
def absorb_query_kernel(
    q_nope, q_pe, w_uk, q_latent, rotated,
    kv, norm_weight, cos_sin, cache, slot_mapping,
    tokens, latent_dim, nope_dim, half, eps,
    q_t, q_h, w_h, w_c, w_n, latent_t, latent_h, rotated_t, rotated_h, kv_t,  # strides
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    LATENT: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For one head and BM tokens: a program for each BN outputs of W_UK, and one that rotates.

    Beside them there is one more for each head. They share out the tokens, whose latents and keys
    they store.
    """
    part = tl.program_id(0)
    num_tiles = tl.cdiv(latent_dim, BN)
    h = tl.program_id(1).to(tl.int64)
    first_t = tl.program_id(2) * BM
    if part < num_tiles:
        multiply_tile(
            q_nope, w_uk, q_latent, h, first_t, part * BN,
            tokens, latent_dim, nope_dim,
            q_t, q_h, w_h, w_c, w_n, latent_t, latent_h, BM, BN, BK, EARLY,
        )  # fmt: skip
    elif part == num_tiles:
        wait_for_previous(EARLY)
        t = (first_t + tl.arange(0, BM)).to(tl.int64)[:, None]
        i = tl.arange(0, HALF)[None, :]
        mask = (t < tokens) & (i < half)
        source = q_pe + t * q_t + h * q_h + i
        first, second = load_rotated(source, cos_sin + t * 2 * half + i, half, mask, mask)
        target = rotated + t * rotated_t + h * rotated_h + i  # may be the source
        tl.store(target, first.to(rotated.dtype.element_ty), mask=mask)
        tl.store(target + half, second.to(rotated.dtype.element_ty), mask=mask)
    else:
        wait_for_previous(EARLY)
        begin = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        for token in range(begin, tokens, tl.num_programs(1) * tl.num_programs(2)):
            store_token(
                kv, norm_weight, cos_sin, cache, slot_mapping, None,
                tl.cast(token, tl.int64), kv_t, latent_dim, half, eps, LATENT, HALF,
            )  # fmt: skip


def absorb_query(
    q: Tensor, w_uk: Tensor, new: NewLatents | None = None, absorbed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Move W_UK from the keys to the queries, so that these meet the cached latents as they are.

    With `new`, first rotate the queries, and store the latents as `store_latents` does.

    Args:
        q: [T, H, nope + R], contiguous in the last dim. The rotary part is rotated already if `new`
            is None. Else it may be changed in place.
        w_uk: [H, nope, C], of any strides.
        new: the latents of the same T tokens.
        absorbed: [T, H, C + R], contiguous in the last dim: where to write the result. Without it,
            q_pe is a part of q.

    Returns:
        q_latent [T, H, C] and q_pe [T, H, R], what `AttentionBackend.decode` takes.
    """
    tokens, heads, _ = q.shape
    nope_dim, latent_dim = w_uk.shape[1:]
    q_nope, q_pe = split_query(q, w_uk)
    if absorbed is None:
        q_latent = q.new_empty(tokens, heads, latent_dim)
        rotated = q_pe
    else:
        q_latent = absorbed[..., :latent_dim]
        rotated = absorbed[..., latent_dim:]

    if new is None or not use_triton(q) or tokens > MAX_TOKENS_OF_HEADS:
        if new is not None:
            store_latents(new, q_pe)
        multiply_by_head(q_nope, w_uk.mT, q_latent)
        if absorbed is not None:
            rotated.copy_(q_pe)
        return q_latent, rotated

    assert new.cache.is_contiguous() and new.cos_sin.is_contiguous()
    assert q.stride(2) == 1 and q_latent.stride(2) == 1 and new.kv.stride(1) == 1
    bm, bn, bk = choose_tile(tokens, heads, nope_dim, latent_dim)
    half = q_pe.shape[2] // 2
    absorb_query_kernel[(triton.cdiv(latent_dim, bn) + 2, heads, triton.cdiv(tokens, bm))](
        q_nope, q_pe, w_uk, q_latent, rotated,
        new.kv, new.norm_weight, new.cos_sin, new.cache, new.slot_mapping,
        tokens, latent_dim, nope_dim, half, new.eps,
        *q.stride()[:2], *w_uk.mT.stride(), *q_latent.stride()[:2], *rotated.stride()[:2],
        new.kv.stride(0),
        BM=bm, BN=bn, BK=bk,
        LATENT=triton.next_power_of_2(latent_dim), HALF=triton.next_power_of_2(half),
        num_warps=choose_num_warps(bn, bk), **launch_early(),
    )  # fmt: skip
    return q_latent, rotated
