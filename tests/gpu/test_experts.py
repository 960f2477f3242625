"""Routing, experts and products in bf16 against fp64, because the interpreter cannot do bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from checkpoints import Oracle
from torch import Tensor

from minidcp.kernels.experts import run_experts, run_experts_ref
from minidcp.kernels.linear import multiply_by_head
from minidcp.kernels.norm import rms_norm
from minidcp.kernels.route import route, route_ref
from minidcp.kernels.tiles import Tiles, list_tiles, make_hopper_tiles
from minidcp.model_config import ModelConfig

pytestmark = pytest.mark.gpu


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.isfinite().all()
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("hidden", "inter"), [(256, 96), (2048, 1408), (200, 40)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 40, 130, 700, 3000])
def test_experts(tokens: int, hidden: int, inter: int) -> None:
    """Some experts are popular, and some have no tokens. From 700 tokens on, Hopper has a kernel of
    its own for them.

    The bits are the same in a second run, in a graph that ran with other inputs before, and where
    the next norm adds up the experts.
    """
    torch.manual_seed(tokens)
    count, top_k = 18, 6
    gate_up = normal(count, 2 * inter, hidden) * hidden**-0.5
    down = normal(count, hidden, inter) * inter**-0.5
    x, weights = normal(tokens, hidden), torch.rand(tokens, top_k, device="cuda")
    popularity = torch.rand(count - 1, device="cuda") ** 3  # no token chooses the last expert
    ids = (
        (torch.rand(tokens, count - 1, device="cuda") * popularity)
        .topk(top_k)
        .indices.to(torch.int32)
    )
    expected = torch.zeros(tokens, hidden, dtype=torch.float64, device="cuda")
    for e in range(count - 1):
        token, choice = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token].double() @ gate_up[e].double().T).chunk(2, -1)
        part = (torch.nn.functional.silu(gate) * up) @ down[e].double().T
        expected.index_add_(0, token, part * weights[token, choice, None].double())
    out = run_experts(x, gate_up, down, weights, ids).sum()
    assert relative_error(out, expected) < 1e-2
    assert torch.equal(out, run_experts(x, gate_up, down, weights, ids).sum())

    scale = normal(hidden)
    residual = normal(tokens, hidden)
    parts = run_experts(x, gate_up, down, weights, ids)
    normed, total = rms_norm(parts.values, scale, 1e-6, residual, parts.weights)
    expected_normed, expected_total = rms_norm(out, scale, 1e-6, residual)
    assert torch.equal(total, expected_total)
    # The squares are added in another order.
    torch.testing.assert_close(normed, expected_normed, rtol=2**-7, atol=0)

    inputs = torch.randn_like(x), weights.clone(), ids.roll(1, 1).contiguous()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_experts(inputs[0], gate_up, down, *inputs[1:]).sum()
    graph.replay()
    for place, value in zip(inputs, (x, weights, ids), strict=True):
        place.copy_(value)
    graph.replay()
    assert torch.equal(captured, out)


@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "inter"), [(66, 8, 2048, 1408), (162, 8, 5120, 192)]
)
def test_every_tile_of_the_table(experts: int, top_k: int, hidden: int, inter: int) -> None:
    """The shapes of V2-Lite on one rank and of V2 on eight."""
    torch.manual_seed(0)
    gate_up = normal(experts, 2 * inter, hidden) * hidden**-0.5
    down = normal(experts, hidden, inter) * inter**-0.5
    bounds = list_tiles(experts, top_k, hidden, inter)
    assert len(bounds) > 10, "these shapes are in tiles.json"
    for tokens in sorted({min(bound, 16384) for bound in bounds}):
        x, weights = normal(tokens, hidden), torch.rand(tokens, top_k, device="cuda")
        ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices.to(torch.int32)
        out, expected = (
            f(x, gate_up, down, weights, ids).sum() for f in (run_experts, run_experts_ref)
        )
        assert relative_error(out, expected.double()) < 1e-2, f"{tokens} tokens"


@pytest.mark.parametrize("tokens", [130, 700, 3001])
def test_gathered_rows_are_the_copied_ones(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for Hopper gathers rows itself, or they are copied before: the bits are equal."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper")
    torch.manual_seed(tokens)
    count, hidden, inter, top_k = 18, 1024, 328, 6
    gate_up = normal(count, 2 * inter, hidden) * hidden**-0.5
    down = normal(count, hidden, inter) * inter**-0.5
    x, weights = normal(tokens, hidden), torch.rand(tokens, top_k, device="cuda")
    ids = torch.rand(tokens, count, device="cuda").topk(top_k).indices.to(torch.int32)
    gathering = make_hopper_tiles(hidden, inter, itemsize=2)
    compare_with_copied_rows(
        gathering, lambda: run_experts(x, gate_up, down, weights, ids).values, monkeypatch
    )


def compare_with_copied_rows(
    gathering: Tiles, run: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gathering.gate_up.gathers
    copying = gathering._replace(gate_up=gathering.gate_up._replace(gathers=False))
    outputs = []
    for tiles in (gathering, copying):
        monkeypatch.setattr("minidcp.kernels.tiles.list_tiles", lambda *_, t=tiles: {1: t})
        outputs.append(run())
    assert torch.equal(*outputs)


def test_experts_in_float32() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(10, 2048, device="cuda"), torch.rand(10, 6, device="cuda")
    gate_up = torch.randn(66, 2 * 1408, 2048, device="cuda") * 2048**-0.5
    down = torch.randn(66, 2048, 1408, device="cuda") * 1408**-0.5
    ids = torch.rand(10, 66, device="cuda").topk(6).indices.to(torch.int32)
    out = run_experts(x, gate_up, down, weights, ids).sum()
    gate, up = torch.einsum("th,teoh->teo", x.double(), gate_up[ids.long()].double()).chunk(2, -1)
    parts = torch.einsum(
        "tei,tehi->teh", torch.nn.functional.silu(gate) * up, down[ids.long()].double()
    )
    assert relative_error(out, (parts * weights[..., None].double()).sum(1)) < 1e-5


@pytest.mark.parametrize("tokens", [1, 7, 500])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("count", "groups", "shared"), [(8, 4, 2), (160, 8, 0), (64, 1, 3), (256, 8, 1)]
)
def test_route(
    checkpoint: Oracle,
    count: int,
    groups: int,
    shared: int,
    tokens: int,
    has_bias: bool,
    normalise: bool,
) -> None:
    torch.manual_seed(tokens)
    config = ModelConfig.from_hf(checkpoint.path)
    sizes = dict(
        n_routed_experts=count,
        n_group=groups,
        topk_group=max(1, groups // 2),
        num_experts_per_tok=3,
    )
    config = replace(config, norm_topk_prob=normalise, sigmoid_router=has_bias, **sizes)
    logits = torch.randn(tokens, count, device="cuda") * 4
    bias = 7 + torch.rand(count, device="cuda") if has_bias else None
    for ours, theirs in zip(
        route(logits, config, shared, bias), route_ref(logits, config, shared, bias), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_token_without_numbers_stays_among_the_experts(checkpoint: Oracle) -> None:
    config = replace(
        ModelConfig.from_hf(checkpoint.path), n_routed_experts=160, n_group=8, topk_group=3
    )
    ids = route(torch.full((3, 160), torch.nan, device="cuda"), config, 2)[1]
    assert (ids >= 0).all() and (ids < 162).all()
    assert all(len(row.unique()) == ids.shape[1] for row in ids)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 65])
@pytest.mark.parametrize(
    ("heads", "dim_in", "dim_out"),
    [(16, 128, 512), (16, 512, 128), (1, 2048, 3648), (1, 5120, 160), (3, 200, 40)],
)
def test_multiply(tokens: int, heads: int, dim_in: int, dim_out: int) -> None:
    torch.manual_seed(tokens)
    x, weight = normal(tokens, heads, dim_in), normal(heads, dim_out, dim_in)
    expected = torch.einsum("thi,hoi->tho", x.double(), weight.double())
    for w in (weight, weight.mT.contiguous().mT):
        assert relative_error(multiply_by_head(x, w), expected) < 4e-3
        exact = multiply_by_head(x, w, torch.empty(tokens, heads, dim_out, device="cuda"))
        assert relative_error(exact, expected) < 1e-5
