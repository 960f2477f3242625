"""Kernels that do the work of several for few tokens, compared with those. They run in CUDA graphs,
with other inputs than those they were captured with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minidcp.kernels.absorb import absorb_query
from minidcp.kernels.dense import multiply, norm_and_multiply
from minidcp.kernels.fp8 import Weight, quantize_weight
from minidcp.kernels.kv_store import NewLatents, store_latents
from minidcp.kernels.linear import multiply_by_head
from minidcp.kernels.norm import rms_norm
from minidcp.kernels.route import multiply_and_route, route
from minidcp.model_config import ModelConfig

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


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("columns", "rows"), [(1536, 6144), (1536, 100), (768, 2048)])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_norm_and_multiply(tokens: int, columns: int, rows: int, fp8: bool) -> None:
    torch.manual_seed(tokens)
    weight: Weight = normal(rows, columns) * columns**-0.5
    if fp8:
        weight = quantize_weight(weight)
    x, norm_weight = normal(tokens, columns + 576)[:, :columns], normal(columns)
    results: list[Tensor] = []

    def work() -> None:
        results[:] = [norm_and_multiply(x, norm_weight, 1e-6, weight)]

    graph = capture(work)
    x.normal_()
    graph.replay()
    expected = multiply(rms_norm(x, norm_weight, 1e-6)[0], weight)
    if not fp8:
        close(results[0], expected)
        return
    # Another last bit of the norm may be rounded to another FP8 value.
    error = (results[0].double() - expected.double()).norm() / expected.double().norm()
    assert error < 5e-3, f"{error:.1e}"


@pytest.mark.parametrize(
    ("experts", "groups", "hidden", "has_bias"),
    [(160, 8, 5120, False), (64, 1, 2048, False), (256, 8, 7168, True)],
)
def test_multiply_and_route(experts: int, groups: int, hidden: int, has_bias: bool) -> None:
    """Many times in a row, because programs meet in it."""
    torch.manual_seed(0)
    config = ModelConfig(
        *[8] * 9,
        n_routed_experts=experts,
        n_group=groups,
        topk_group=min(groups, 3),
        num_experts_per_tok=6,
        norm_topk_prob=has_bias,
        sigmoid_router=has_bias,
        routed_scaling_factor=16.0,
    )
    gate = normal(experts, hidden) * hidden**-0.5
    bias = torch.rand(experts, device="cuda") if has_bias else None
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    x = normal(1, hidden)
    xs = normal(300, 1, hidden)
    results: list[Tensor] = []

    def work() -> None:
        results[:] = multiply_and_route(x, gate, config, 2, bias, counter)

    graph = capture(work)
    num_others = 0
    for row in xs:
        x.copy_(row)
        graph.replay()
        logits = multiply_by_head(row[:, None], gate[None], torch.empty(1, 1, experts).cuda())[:, 0]
        weights, ids = route(logits, config, 2, bias)
        assert counter.item() == 0
        if not torch.equal(results[1], ids):
            num_others += 1  # logits that are equal up to the order of a sum
            continue
        torch.testing.assert_close(results[0], weights, atol=1e-5, rtol=1e-5)
    assert num_others <= 3, num_others
