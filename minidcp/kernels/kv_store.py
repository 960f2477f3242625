"""The steps between the projections and attention, in one kernel: latents are normalised and keys
rotated, both are stored in the paged cache, and queries are rotated in place.

Rotary embedding is in the rotate-half layout and computed in float32."""

from typing import NamedTuple

import torch
from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous
from minidcp.kernels.compiler import tl, triton
from minidcp.kernels.norm import norm_row, rms_norm_ref


class NewLatents(NamedTuple):
    """New tokens' latents and keys, and all that is needed to store them.

    Attributes:
        kv: [T, C + R], the output of kv_a_proj_with_mqa: a latent and a key before rotation.
        norm_weight: [C], the weight of kv_a_layernorm.
        eps: of kv_a_layernorm.
        cos_sin: [T, R] float32, the cosines of R / 2 angles and then their sines.
        cache: [num_blocks, block_size, C + R], contiguous; changed in place.
        slot_mapping: [T] integers. Token i goes to row slot_mapping[i] of this rank's cache, seen
            as [num_blocks · block_size, C + R]; -1 means that the token is not stored. No row may
            appear twice.
    """

    kv: Tensor
    norm_weight: Tensor
    eps: float
    cos_sin: Tensor
    cache: Tensor
    slot_mapping: Tensor


def store_latents_ref(new: NewLatents, q_pe: Tensor) -> Tensor:
    q_pe.copy_(rotate_ref(q_pe, new.cos_sin))

    latent_dim = new.norm_weight.shape[0]
    kv_c = rms_norm_ref(new.kv[:, :latent_dim], new.norm_weight, new.eps)[0]
    k_pe = rotate_ref(new.kv[:, None, latent_dim:], new.cos_sin)[:, 0]
    latents = torch.cat([kv_c, k_pe], -1)  # [T, C + R]

    is_stored = new.slot_mapping >= 0
    cache_rows = new.cache.view(-1, new.cache.shape[-1])
    cache_rows[new.slot_mapping[is_stored].long()] = latents[is_stored]
    return latents


def rotate_ref(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, H, R], cos_sin [T, R] -> [T, H, R]."""
    cos, sin = cos_sin[:, None].chunk(2, -1)
    first, second = x.float().chunk(2, -1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.to(x.dtype)


@triton.jit
def load_rotated(x, cos_sin, half, x_mask, angle_mask):
    """The two halves of rotary parts, rotated, in float32. `x` and `cos_sin` point to the values of
    the first half and their cosines; the others are `half` values behind them."""
    first = tl.load(x, mask=x_mask, other=0.0).to(tl.float32)
    second = tl.load(x + half, mask=x_mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_sin, mask=angle_mask, other=0.0)
    sin = tl.load(cos_sin + half, mask=angle_mask, other=0.0)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def store_token(
    kv, norm_weight, cos_sin, cache, slot_mapping, out,
    t, kv_t, latent_dim, half, eps,
    LATENT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Normalise the latent of token t and rotate its key. Store both in the cache if this rank
    holds the token, and in `out` unless that is None."""
    cache_row = tl.load(slot_mapping + t).to(tl.int64)
    c = tl.arange(0, LATENT)
    i = tl.arange(0, HALF)
    in_latent = c < latent_dim
    in_half = i < half
    width = latent_dim + 2 * half
    dtype = cache.dtype.element_ty

    latent = tl.load(kv + t * kv_t + c, mask=in_latent, other=0.0).to(tl.float32)
    scale = tl.load(norm_weight + c, mask=in_latent, other=0.0).to(tl.float32)
    kv_c = norm_row(latent, scale, latent_dim, eps, cache)

    k_pe = kv + t * kv_t + latent_dim + i
    first, second = load_rotated(k_pe, cos_sin + t * 2 * half + i, half, in_half, in_half)

    if out is not None:
        out_row = out + t * width
        tl.store(out_row + c, kv_c, mask=in_latent)
        tl.store(out_row + latent_dim + i, first.to(dtype), mask=in_half)
        tl.store(out_row + latent_dim + half + i, second.to(dtype), mask=in_half)
    if cache_row >= 0:
        stored_row = cache + cache_row * width
        tl.store(stored_row + c, kv_c, mask=in_latent)
        tl.store(stored_row + latent_dim + i, first.to(dtype), mask=in_half)
        tl.store(stored_row + latent_dim + half + i, second.to(dtype), mask=in_half)


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
    store_token(
        kv, norm_weight, cos_sin, cache, slot_mapping, out,
        t, kv_t, latent_dim, half, eps, LATENT, HALF,
    )  # fmt: skip

    # Rotate the queries of all heads, in place.
    h = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    q_row = q_pe + t * q_t + h * q_h + i
    mask = (h < heads) & (i < half)
    first, second = load_rotated(q_row, cos_sin + t * 2 * half + i, half, mask, i < half)
    tl.store(q_row, first.to(q_pe.dtype.element_ty), mask=mask)
    tl.store(q_row + half, second.to(q_pe.dtype.element_ty), mask=mask)


def store_latents(new: NewLatents, q_pe: Tensor) -> Tensor:
    """Normalise the latents, rotate the keys, store both in the cache, and rotate the queries.

    Args:
        new: of T tokens.
        q_pe: [T, H, R], the last R dims of wider heads; changed in place.

    Returns:
        [T, C + R]: the latent and the key of every token, as they are stored.
    """
    if not use_triton(new.cache):
        return store_latents_ref(new, q_pe)

    tokens, width = new.kv.shape
    heads = q_pe.shape[1]
    latent_dim = new.norm_weight.shape[0]
    half = (width - latent_dim) // 2
    assert new.cache.is_contiguous() and new.cos_sin.is_contiguous()
    assert new.kv.stride(1) == 1 and q_pe.stride(2) == 1

    out = torch.empty(tokens, width, dtype=new.kv.dtype, device=new.kv.device)
    store_latents_kernel[(tokens,)](
        new.kv, q_pe, new.norm_weight, new.cos_sin, new.cache, new.slot_mapping, out,
        new.kv.stride(0), *q_pe.stride()[:2],
        heads, latent_dim, half, new.eps,
        LATENT=triton.next_power_of_2(latent_dim), HALF=triton.next_power_of_2(half),
        HEADS=triton.next_power_of_2(heads), **launch_early(),
    )  # fmt: skip
    return out
