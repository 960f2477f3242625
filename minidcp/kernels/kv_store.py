"""Writing new tokens' latents into the paged cache: a Triton kernel and its torch twin."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def store_latents(kv_c: Tensor, k_pe: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write token i's [kv_c, k_pe] to row slot_mapping[i] of this rank's cache; -1 writes nothing.

    Args:
        kv_c: [T, C] normed latents, contiguous C.
        k_pe: [T, R] rotated keys, contiguous R.
        cache: [num_blocks, block_size, C + R], contiguous; changed in place.
        slot_mapping: [T] int64; no row appears twice.
    """
    store = store_latents_triton if cache.is_cuda else store_latents_ref
    store(kv_c, k_pe, cache, slot_mapping)


def store_latents_ref(kv_c: Tensor, k_pe: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    rows = cache.view(-1, cache.shape[-1])
    mine = slot_mapping >= 0
    slots = slot_mapping[mine]
    rows[slots, : kv_c.shape[1]] = kv_c[mine].to(cache.dtype)
    rows[slots, kv_c.shape[1] :] = k_pe[mine].to(cache.dtype)


def store_latents_triton(kv_c: Tensor, k_pe: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    tokens, latent = kv_c.shape
    rope = k_pe.shape[1]
    assert cache.is_contiguous() and kv_c.stride(1) == 1 and k_pe.stride(1) == 1
    if tokens:
        store_kernel[(tokens,)](
            kv_c, k_pe, cache, slot_mapping, kv_c.stride(0), k_pe.stride(0), latent, rope,
            LATENT=triton.next_power_of_2(latent), ROPE=triton.next_power_of_2(rope),
        )  # fmt: skip


@triton.jit
def store_kernel(
    kv_c, k_pe, cache, slot_mapping, kv_c_t, k_pe_t, latent, rope,
    LATENT: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """One program stores one token."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + t)
    if slot >= 0:
        row = cache + slot * (latent + rope)
        c = tl.arange(0, LATENT)
        r = tl.arange(0, ROPE)
        value = tl.load(kv_c + t * kv_c_t + c, mask=c < latent)
        tl.store(row + c, value.to(cache.dtype.element_ty), mask=c < latent)
        value = tl.load(k_pe + t * k_pe_t + r, mask=r < rope)
        tl.store(row + latent + r, value.to(cache.dtype.element_ty), mask=r < rope)
