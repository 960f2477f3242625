"""From the projections to attention: norm, rope and store of new latents, and rope of the queries, in one Triton kernel
and its twin. Rotary embedding is in the rotate-half layout, computed in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous
from minidcp.kernels.norm import rms_norm_ref


def store_latents(
    kv: Tensor, q_pe: Tensor, norm_weight: Tensor, eps: float, cos_sin: Tensor, cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """Normalise the latents, rotate the keys, and write token i to row slot_mapping[i] of this rank's cache; -1 writes
    nothing there. Rotate the queries in place. Returns every token's latent and key as stored, [T, C + R].

    Args:
        kv: [T, C + R] output of kv_a_proj_with_mqa; norm_weight: [C] of kv_a_layernorm, and its eps.
        q_pe: [T, H, R], part of wider heads; changed in place.
        cos_sin: [T, R] float32: the cosines of R / 2 angles and then their sines.
        cache: [num_blocks, block_size, C + R], contiguous; changed in place.
        slot_mapping: [T] integers; no row appears twice."""
    if not use_triton(cache):
        return store_latents_ref(kv, q_pe, norm_weight, eps, cos_sin, cache, slot_mapping)
    (tokens, width), heads = kv.shape, q_pe.shape[1]
    latent = norm_weight.shape[0]
    half = (width - latent) // 2
    assert cache.is_contiguous() and kv.stride(1) == q_pe.stride(2) == 1 and cos_sin.is_contiguous()
    out = torch.empty(tokens, width, dtype=kv.dtype, device=kv.device)
    store_kernel[(tokens,)](
        kv, q_pe, norm_weight, cos_sin, cache, slot_mapping, out, kv.stride(0), *q_pe.stride()[:2], heads, latent,
        half, eps, LATENT=triton.next_power_of_2(latent), HALF=triton.next_power_of_2(half),
        HEADS=triton.next_power_of_2(heads), **launch_early(),
    )  # fmt: skip
    return out


def store_latents_ref(
    kv: Tensor, q_pe: Tensor, norm_weight: Tensor, eps: float, cos_sin: Tensor, cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    q_pe.copy_(rotate_ref(q_pe, cos_sin))
    latent = norm_weight.shape[0]
    kv_c = rms_norm_ref(kv[:, :latent], norm_weight, eps)[0]
    k_pe = rotate_ref(kv[:, None, latent:], cos_sin)[:, 0]
    latents = torch.cat([kv_c, k_pe], -1)
    mine = slot_mapping >= 0
    cache.view(-1, cache.shape[-1])[slot_mapping[mine].long()] = latents[mine]
    return latents


def rotate_ref(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, H, R], cos_sin [T, R] -> [T, H, R]."""
    cos, sin = cos_sin[:, None].chunk(2, -1)
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])  # a slice begins anywhere
def store_kernel(
    kv, q_pe, norm_weight, cos_sin, cache, slot_mapping, out, kv_t, q_t, q_h, heads, latent, half, eps,
    LATENT: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program normalises, rotates and stores one token, and rotates its queries."""
    wait_for_previous(EARLY)
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + t).to(tl.int64)
    c = tl.arange(0, LATENT)
    i = tl.arange(0, HALF)
    in_latent, in_half = c < latent, i < half
    width = latent + 2 * half

    row = tl.load(kv + t * kv_t + c, mask=in_latent, other=0.0).to(tl.float32)
    normed = row * tl.rsqrt(tl.sum(row * row, 0) / latent + eps)
    scale = tl.load(norm_weight + c, mask=in_latent, other=0.0).to(tl.float32)
    kv_c = (normed.to(out.dtype.element_ty).to(tl.float32) * scale).to(out.dtype.element_ty)

    first = tl.load(kv + t * kv_t + latent + i, mask=in_half, other=0.0).to(tl.float32)
    second = tl.load(kv + t * kv_t + latent + half + i, mask=in_half, other=0.0).to(tl.float32)
    cos = tl.load(cos_sin + t * 2 * half + i, mask=in_half, other=0.0)
    sin = tl.load(cos_sin + t * 2 * half + half + i, mask=in_half, other=0.0)
    rotated_first = (first * cos - second * sin).to(out.dtype.element_ty)
    rotated_second = (second * cos + first * sin).to(out.dtype.element_ty)

    dst = out + t * width
    tl.store(dst + c, kv_c, mask=in_latent)
    tl.store(dst + latent + i, rotated_first, mask=in_half)
    tl.store(dst + latent + half + i, rotated_second, mask=in_half)
    if slot >= 0:
        dst = cache + slot * width
        tl.store(dst + c, kv_c, mask=in_latent)
        tl.store(dst + latent + i, rotated_first, mask=in_half)
        tl.store(dst + latent + half + i, rotated_second, mask=in_half)

    row = q_pe + t * q_t + tl.arange(0, HEADS)[:, None] * q_h + i[None, :]
    mask = (tl.arange(0, HEADS) < heads)[:, None] & in_half[None, :]
    first = tl.load(row, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(row + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(row, (first * cos[None, :] - second * sin[None, :]).to(q_pe.dtype.element_ty), mask=mask)
    tl.store(row + half, (second * cos[None, :] + first * sin[None, :]).to(q_pe.dtype.element_ty), mask=mask)
