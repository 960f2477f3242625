"""Kernels that do the work of several for few tokens, compared with those. They run in CUDA graphs,
with other inputs than those they were captured with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minidcp.kernels.absorb import absorb_query
from minidcp.kernels.dense import multiply, norm_and_multiply
from minidcp.kernels.kv_store import NewLatents, store_latents
from minidcp.kernels.linear import multiply_by_head
from minidcp.kernels.norm import rms_norm

pytestmark = pytest.mark.gpu

NOPE, LATENT, ROPE = 128, 512, 64


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of sums in another order."""
    assert actual.isfinite().all()
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < 1e-3, f"{error:.1e}"


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("heads", [1, 5, 16, 32, 128])
@pytest.mark.parametrize("tokens", [1, 2, 8, 17, 32])
def test_absorb(tokens: int, heads: int, in_place: bool) -> None:
    torch.manual_seed(tokens)
    w_uk = (normal(heads, NOPE + 128, LATENT) * NOPE**-0.5)[:, 128:]
    norm_weight = normal(LATENT)
    q, kv = normal(tokens, heads, NOPE + ROPE), normal(tokens, 1536 + LATENT + ROPE)
    angles = torch.randn(tokens, ROPE // 2, device="cuda")
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    slots = torch.randperm(64, device="cuda")[:tokens].to(torch.int32)
    slots[1::3] = -1

    def make(cache: Tensor) -> NewLatents:
        return NewLatents(kv[:, 1536:], norm_weight, 1e-6, cos_sin, cache, slots)

    cache = torch.full((4, 16, LATENT + ROPE), torch.nan, device="cuda").bfloat16()
    place = None if in_place else normal(tokens, heads, LATENT + ROPE)
    given = q.clone()
    results: list[Tensor] = []

    def work() -> None:
        results[:] = absorb_query(given, w_uk, make(cache), place)

    graph = capture(work)
    cache.fill_(torch.nan)
    q.normal_()
    kv.normal_()
    slots.copy_(slots.roll(1))
    given.copy_(q)
    graph.replay()

    expected_cache = torch.full_like(cache, torch.nan)
    store_latents(make(expected_cache), q[..., NOPE:])
    close(results[0], multiply_by_head(q[..., :NOPE], w_uk.mT))
    close(results[1], q[..., NOPE:])
    assert torch.equal(cache.isnan(), expected_cache.isnan())
    close(cache.nan_to_num(), expected_cache.nan_to_num())


@pytest.mark.parametrize(("columns", "rows"), [(1536, 6144), (1536, 100), (768, 2048)])
@pytest.mark.parametrize("tokens", [1, 2])
def test_norm_and_multiply(tokens: int, columns: int, rows: int) -> None:
    torch.manual_seed(tokens)
    weight = normal(rows, columns) * columns**-0.5
    x, norm_weight = normal(tokens, columns + 576)[:, :columns], normal(columns)
    results: list[Tensor] = []

    def work() -> None:
        results[:] = [norm_and_multiply(x, norm_weight, 1e-6, weight)]

    graph = capture(work)
    x.normal_()
    graph.replay()
    close(results[0], multiply(rms_norm(x, norm_weight, 1e-6)[0], weight))
