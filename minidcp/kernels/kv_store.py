"""From the kv_a projection to the paged cache: norm, rope and store in one Triton kernel, and its twin."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidcp.kernels import use_triton
from minidcp.kernels.norm import rms_norm_ref
from minidcp.kernels.rope import rotate_ref


def store_latents(
    kv: Tensor, norm_weight: Tensor, eps: float, cos_sin: Tensor, cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """Normalise the latents, rotate the keys, and write token i to row slot_mapping[i] of this rank's
    cache; -1 writes nothing there.

    Args:
        kv: [T, C + R] output of kv_a_proj_with_mqa.
        norm_weight: [C] of kv_a_layernorm.
        eps: of that norm.
        cos_sin: [T, R] float32.
        cache: [num_blocks, block_size, C + R], contiguous; changed in place.
        slot_mapping: [T] integers; no row appears twice.

    Returns:
        [T, C + R] every token's normed latent and rotated key, as stored.
    """
    if not use_triton(cache):
        return store_latents_ref(kv, norm_weight, eps, cos_sin, cache, slot_mapping)
    tokens, width = kv.shape
    latent = norm_weight.shape[0]
    half = (width - latent) // 2
    assert cache.is_contiguous() and kv.stride(1) == 1 and cos_sin.is_contiguous()
    out = torch.empty(tokens, width, dtype=kv.dtype, device=kv.device)
    if tokens:
        store_kernel[(tokens,)](
            kv, norm_weight, cos_sin, cache, slot_mapping, out, kv.stride(0), latent, half, eps,
            LATENT=triton.next_power_of_2(latent), HALF=triton.next_power_of_2(half), num_warps=2,
        )  # fmt: skip
    return out


def store_latents_ref(
    kv: Tensor, norm_weight: Tensor, eps: float, cos_sin: Tensor, cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    latent = norm_weight.shape[0]
    kv_c = rms_norm_ref(kv[:, :latent], norm_weight, eps)[0]
    k_pe = rotate_ref(kv[:, None, latent:], cos_sin)[:, 0]
    latents = torch.cat([kv_c, k_pe], -1)
    mine = slot_mapping >= 0
    cache.view(-1, cache.shape[-1])[slot_mapping[mine].long()] = latents[mine]
    return latents


@triton.jit
def store_kernel(
    kv, norm_weight, cos_sin, cache, slot_mapping, out, kv_t, latent, half, eps,
    LATENT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program normalises, rotates and stores one token."""
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
