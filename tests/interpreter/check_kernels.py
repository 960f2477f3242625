"""Triton kernels under Triton's interpreter against their torch twins, and the twins against fp64."""

from __future__ import annotations

import pytest
import torch

from minidcp.kernels import kv_store, merge

DTYPES = [torch.float32, torch.bfloat16]


def partials(
    size: int, tokens: int, heads: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random partials; about a third of the shards are empty, and hold NaN."""
    torch.manual_seed(size * 1000 + dim)
    outs = torch.randn(size, tokens, heads, dim).to(dtype)
    lses = torch.randn(size, tokens, heads) * 5
    empty = torch.rand(size, tokens, heads) < 0.35
    empty[:, 0, 0] = True  # one token and head that nobody has seen anything for
    return outs.masked_fill(empty[..., None], torch.nan), lses.masked_fill(empty, -torch.inf)


def merged_in_fp64(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = lses.double().exp()
    parts = outs.double().masked_fill((lses == -torch.inf)[..., None], 0)
    total = weights.sum(0)
    out = (weights[..., None] * parts).sum(0) / total.clamp(min=1e-300)[..., None]
    return out, total.log()


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2**-7}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "tokens", "heads", "dim"), [(2, 3, 2, 128), (8, 2, 3, 512), (3, 4, 2, 16)])
def test_merge(size: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    outs, lses = partials(size, tokens, heads, dim, dtype)
    expected, expected_lse = merged_in_fp64(outs, lses)
    for function in (merge.merge_partials_ref, merge.merge_partials_triton):
        out, lse = function(outs, lses)
        torch.testing.assert_close(out.double(), expected, **tolerance(dtype))
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
        assert out.dtype == dtype and lse[0, 0] == -torch.inf and (out[0, 0] == 0).all()


def test_merge_reads_the_packed_layout() -> None:
    """The exchange hands in strided views of one buffer."""
    outs, lses = partials(4, 3, 2, 32, torch.bfloat16)
    packed = torch.empty(4, 3, 2, 34, dtype=torch.bfloat16)
    packed[..., :32] = outs
    packed[..., 32:].view(torch.float32)[..., 0] = lses
    views = packed[..., :32], packed[..., 32:].view(torch.float32)[..., 0]
    for a, b in zip(merge.merge_partials_triton(*views), merge.merge_partials_ref(outs, lses), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "tokens", "heads", "dim"), [(2, 3, 2, 128), (8, 1, 4, 512), (3, 2, 3, 16)])
def test_rescale(size: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    outs, lses = partials(size, tokens, heads, dim, dtype)
    expected, expected_lse = merged_in_fp64(outs, lses)
    for function in (merge.rescale_partial_ref, merge.rescale_partial_triton):
        parts, merged = zip(*(function(outs[r], lses, r) for r in range(size)), strict=True)
        torch.testing.assert_close(torch.stack(parts).double().sum(0), expected, **tolerance(dtype))
        for lse in merged:
            torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("latent", "rope"), [(512, 64), (32, 8)])
def test_store(latent: int, rope: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    both = torch.randn(6, latent + rope).to(dtype)
    kv_c, k_pe = both.split([latent, rope], -1)  # strided, as the projection's output is
    slots = torch.tensor([5, -1, 0, 11, -1, 7])
    for function in (kv_store.store_latents_ref, kv_store.store_latents_triton):
        cache = torch.full((3, 4, latent + rope), torch.nan, dtype=dtype)
        function(kv_c, k_pe, cache, slots)
        rows = cache.view(12, -1)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert torch.equal(rows[slot], both[token])
        untouched = [i for i in range(12) if i not in slots.tolist()]
        assert rows[untouched].isnan().all()
