"""The steps between the projections and attention, in one kernel: latents are normalised and keys
rotated, both are stored in the paged cache, and queries are rotated in place.

Rotary embedding is in the rotate-half layout and computed in float32."""

import torch
from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous
from minidcp.kernels.compiler import tl, triton
from minidcp.kernels.norm import rms_norm_ref


def store_latents_ref(
    kv: Tensor,
    q_pe: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    q_pe.copy_(rotate_ref(q_pe, cos_sin))

    latent_dim = norm_weight.shape[0]
    kv_c = rms_norm_ref(kv[:, :latent_dim], norm_weight, eps)[0]
    k_pe = rotate_ref(kv[:, None, latent_dim:], cos_sin)[:, 0]
    latents = torch.cat([kv_c, k_pe], -1)  # [T, C + R]

    is_stored = slot_mapping >= 0
    cache_rows = cache.view(-1, cache.shape[-1])
    cache_rows[slot_mapping[is_stored].long()] = latents[is_stored]
    return latents


def rotate_ref(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, H, R], cos_sin [T, R] -> [T, H, R]."""
    cos, sin = cos_sin[:, None].chunk(2, -1)
    first, second = x.float().chunk(2, -1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.to(x.dtype)


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])  # a slice of it may begin anywhere
def store_latents_kernel(
    kv, q_pe, norm_weight, cos_sin, cache, slot_mapping, out,
    kv_t, q_t, q_h,  # strides
    heads, latent_dim, half, eps,
    LATENT: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program normalises, rotates and stores one token, and rotates its queries."""
    wait_for_previous(EARLY)
    t = tl.program_id(0).to(tl.int64)
    cache_row = tl.load(slot_mapping + t).to(tl.int64)
    c = tl.arange(0, LATENT)
    i = tl.arange(0, HALF)
    in_latent = c < latent_dim
    in_half = i < half
    width = latent_dim + 2 * half
    dtype = out.dtype.element_ty

    # Normalise the latent: rounded before the product with the weight, as in `norm.py`.
    latent = tl.load(kv + t * kv_t + c, mask=in_latent, other=0.0).to(tl.float32)
    normed = latent * tl.rsqrt(tl.sum(latent * latent, 0) / latent_dim + eps)
    scale = tl.load(norm_weight + c, mask=in_latent, other=0.0).to(tl.float32)
    kv_c = (normed.to(dtype).to(tl.float32) * scale).to(dtype)

    # Rotate the key.
    k_pe = kv + t * kv_t + latent_dim
    first = tl.load(k_pe + i, mask=in_half, other=0.0).to(tl.float32)
    second = tl.load(k_pe + half + i, mask=in_half, other=0.0).to(tl.float32)
    cos = tl.load(cos_sin + t * 2 * half + i, mask=in_half, other=0.0)
    sin = tl.load(cos_sin + t * 2 * half + half + i, mask=in_half, other=0.0)
    rotated_first = (first * cos - second * sin).to(dtype)
    rotated_second = (second * cos + first * sin).to(dtype)

    # Store both: in the result always, in the cache if this rank holds the token.
    out_row = out + t * width
    tl.store(out_row + c, kv_c, mask=in_latent)
    tl.store(out_row + latent_dim + i, rotated_first, mask=in_half)
    tl.store(out_row + latent_dim + half + i, rotated_second, mask=in_half)
    if cache_row >= 0:
        stored_row = cache + cache_row * width
        tl.store(stored_row + c, kv_c, mask=in_latent)
        tl.store(stored_row + latent_dim + i, rotated_first, mask=in_half)
        tl.store(stored_row + latent_dim + half + i, rotated_second, mask=in_half)

    # Rotate the queries of all heads, in place.
    h = tl.arange(0, HEADS)
    q_row = q_pe + t * q_t + h[:, None] * q_h + i[None, :]
    q_mask = (h < heads)[:, None] & in_half[None, :]
    first = tl.load(q_row, mask=q_mask, other=0.0).to(tl.float32)
    second = tl.load(q_row + half, mask=q_mask, other=0.0).to(tl.float32)
    rotated = first * cos[None, :] - second * sin[None, :]
    tl.store(q_row, rotated.to(q_pe.dtype.element_ty), mask=q_mask)
    rotated = second * cos[None, :] + first * sin[None, :]
    tl.store(q_row + half, rotated.to(q_pe.dtype.element_ty), mask=q_mask)


def store_latents(
    kv: Tensor,
    q_pe: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Normalise the latents, rotate the keys, store both in the cache, and rotate the queries.

    Args:
        kv: [T, C + R], the output of kv_a_proj_with_mqa: a latent and a key before rotation.
        q_pe: [T, H, R], the last R dims of wider heads; changed in place.
        norm_weight: [C], the weight of kv_a_layernorm.
        eps: of kv_a_layernorm.
        cos_sin: [T, R] float32, the cosines of R / 2 angles and then their sines.
        cache: [num_blocks, block_size, C + R], contiguous; changed in place.
        slot_mapping: [T] integers. Token i goes to row slot_mapping[i] of this rank's cache, seen
            as [num_blocks · block_size, C + R]; -1 means that the token is not stored. No row may
            appear twice.

    Returns:
        [T, C + R]: the latent and the key of every token, as they are stored.
    """
    if not use_triton(cache):
        return store_latents_ref(kv, q_pe, norm_weight, eps, cos_sin, cache, slot_mapping)

    tokens, width = kv.shape
    heads = q_pe.shape[1]
    latent_dim = norm_weight.shape[0]
    half = (width - latent_dim) // 2
    assert cache.is_contiguous() and cos_sin.is_contiguous()
    assert kv.stride(1) == 1 and q_pe.stride(2) == 1

    out = torch.empty(tokens, width, dtype=kv.dtype, device=kv.device)
    store_latents_kernel[(tokens,)](
        kv, q_pe, norm_weight, cos_sin, cache, slot_mapping, out,
        kv.stride(0), *q_pe.stride()[:2],
        heads, latent_dim, half, eps,
        LATENT=triton.next_power_of_2(latent_dim), HALF=triton.next_power_of_2(half),
        HEADS=triton.next_power_of_2(heads), **launch_early(),
    )  # fmt: skip
    return out
