"""Products in FP8 on a GPU against their definition, computed in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy_matrix import list_engines, run_matrix
from eval_accuracy import DEMO, make_questions
from test_experts import compare_with_copied_rows
from torch import Tensor
from transformers import AutoTokenizer

from minidcp.kernels import dense
from minidcp.kernels.dense import multiply
from minidcp.kernels.experts import run_experts
from minidcp.kernels.fp8 import (
    Fp8Stack,
    Quantized,
    Stack,
    allocate_stack,
    put_into_stack,
    quantize,
    quantize_ref,
    quantize_weight,
)
from minidcp.kernels.norm import rms_norm
from minidcp.kernels.tiles import (
    choose_tiles,
    list_tiles,
    make_hopper_tiles,
    make_tiles_by_rule,
)

pytestmark = pytest.mark.gpu

# From 130 on, experts use the kernel for Hopper. At 130 its second group hardly ever has rows.
TOKENS = [1, 2, 3, 4, 8, 9, 40, 130, 700, 3000]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.isfinite().all()
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def make_stack(count: int, rows: int, columns: int) -> Stack:
    stack: Stack | None = None
    for index in range(count):
        matrix = quantize_weight(normal(rows, columns) * columns**-0.5)
        stack = stack or allocate_stack(count, matrix)
        put_into_stack(stack, index, matrix)
    assert isinstance(stack, Fp8Stack)
    return stack


def draw_ids(tokens: int, experts: int, top_k: int) -> Tensor:
    """No token chooses the last expert."""
    scores = torch.rand(tokens, experts - 1, device="cuda")
    return scores.topk(top_k).indices.to(torch.int32)


def run_defined(x: Tensor, gate_up: Stack, down: Stack, weights: Tensor, ids: Tensor) -> Tensor:
    """The experts, one after another."""
    inputs = quantize_ref(x).dequantize()
    wide_gate_up, wide_down = gate_up.dequantize(), down.dequantize()
    total = torch.zeros(len(x), wide_down.shape[1], device="cuda")
    for expert in ids.unique().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = (inputs[token] @ wide_gate_up[expert].T).chunk(2, -1)
        h = quantize_ref(F.silu(gate) * up).dequantize()
        part = h @ wide_down[expert].T
        total.index_add_(0, token, part * weights[token, choice, None])
    return total


# The last dims: blocks of 64 and of 32, and a last tile of outputs that is not full. On Hopper all
# but the first gather their rows.
@pytest.mark.parametrize(
    ("hidden", "inter"),
    [(2048, 1408), (5120, 192), (256, 96), (224, 160), (320, 384), (2048, 384)],
)
@pytest.mark.parametrize("tokens", TOKENS)
def test_experts(tokens: int, hidden: int, inter: int) -> None:
    """The bits are the same in a second run, and in a graph that ran with other inputs before."""
    torch.manual_seed(tokens)
    gate_up = make_stack(18, 2 * inter, hidden)
    down = make_stack(18, hidden, inter)
    x = normal(tokens, hidden)
    weights = torch.rand(tokens, 6, device="cuda")
    ids = draw_ids(tokens, 18, 6)
    out = run_experts(x, gate_up, down, weights, ids).sum()
    # Sums in another order round some values of h to their other neighbour.
    assert relative_error(out, run_defined(x, gate_up, down, weights, ids)) < 8e-3
    assert torch.equal(out, run_experts(x, gate_up, down, weights, ids).sum())

    inputs = torch.randn_like(x), weights.clone(), ids.roll(1, 1).contiguous()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_experts(inputs[0], gate_up, down, *inputs[1:]).sum()
    graph.replay()
    for place, value in zip(inputs, (x, weights, ids), strict=True):
        place.copy_(value)
    graph.replay()
    assert torch.equal(captured, out)


@pytest.mark.parametrize(("hidden", "inter"), [(2048, 1408), (5120, 768), (7168, 256), (160, 96)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_few_rows_and_many_experts(tokens: int, hidden: int, inter: int) -> None:
    """Tiles by rule, where each choice is a block of its own up to two or four tokens."""
    torch.manual_seed(tokens)
    is_direct = choose_tiles(tokens, 33, 2, hidden, inter, itemsize=1).bm == 1
    assert is_direct == (tokens <= 2 or inter <= 256)
    gate_up = make_stack(33, 2 * inter, hidden)
    down = make_stack(33, hidden, inter)
    x, weights = normal(tokens, hidden), torch.rand(tokens, 2, device="cuda")
    ids = draw_ids(tokens, 33, 2)
    expected = run_defined(x, gate_up, down, weights, ids)
    for given in (x, Quantized(x, quantize(x))):
        out = run_experts(given, gate_up, down, weights, ids).sum()
        assert relative_error(out, expected) < 8e-3


@pytest.mark.parametrize(("hidden", "inter"), [(2048, 1408), (224, 160)])
def test_sorted_experts_without_the_kernel_for_hopper(
    hidden: int, inter: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As newer GPUs multiply them."""
    torch.manual_seed(0)
    tiles = make_tiles_by_rule(3, inter, fp8=True)
    monkeypatch.setattr("minidcp.kernels.tiles.list_tiles", lambda *shape: tiles)
    gate_up, down = make_stack(18, 2 * inter, hidden), make_stack(18, hidden, inter)
    x, weights, ids = normal(700, hidden), torch.rand(700, 6, device="cuda"), draw_ids(700, 18, 6)
    out = run_experts(x, gate_up, down, weights, ids).sum()
    assert relative_error(out, run_defined(x, gate_up, down, weights, ids)) < 8e-3


@pytest.mark.parametrize("tokens", [130, 700, 3001])
def test_gathered_rows_are_the_copied_ones(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for Hopper gathers rows itself, or they are copied before: the bits are equal."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper")
    torch.manual_seed(tokens)
    hidden, inter = 1024, 384
    gate_up, down = make_stack(18, 2 * inter, hidden), make_stack(18, hidden, inter)
    x, weights = normal(tokens, hidden), torch.rand(tokens, 6, device="cuda")
    ids = draw_ids(tokens, 18, 6)
    gathering = make_hopper_tiles(hidden, inter, itemsize=1)
    compare_with_copied_rows(
        gathering, lambda: run_experts(x, gate_up, down, weights, ids).values, monkeypatch
    )


def test_every_tile_of_the_table() -> None:
    """The shape of V2-Lite on one rank."""
    torch.manual_seed(0)
    experts, top_k, hidden, inter = 66, 8, 2048, 1408
    gate_up = make_stack(experts, 2 * inter, hidden)
    down = make_stack(experts, hidden, inter)
    bounds = list_tiles(experts, top_k, hidden, inter, itemsize=1)
    assert len(bounds) > 10, "this shape is in tiles.json"
    for tokens in sorted({min(bound, 16384) for bound in bounds}):
        x, weights = normal(tokens, hidden), torch.rand(tokens, top_k, device="cuda")
        ids = draw_ids(tokens, experts, top_k)
        out = run_experts(x, gate_up, down, weights, ids).sum()
        error = relative_error(out, run_defined(x, gate_up, down, weights, ids))
        assert error < 8e-3, f"{tokens} tokens: {error:.1e}"


@pytest.mark.parametrize(("rows", "columns"), [(2112, 5120), (200, 192), (2048, 10944), (64, 32)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_dense(tokens: int, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By cuBLAS where it has the product, and by our kernels everywhere."""
    torch.manual_seed(tokens)
    weight = quantize_weight(normal(rows, columns) * columns**-0.5)
    x = normal(tokens, columns)
    expected = quantize_ref(x).dequantize() @ weight.dequantize().T
    place = x.new_empty(tokens, rows)
    assert multiply(x, weight, place) is place
    assert relative_error(place, expected) < 2.5e-3  # rounding to bf16
    assert torch.equal(multiply(x, weight), place)
    assert relative_error(multiply(Quantized(x, quantize(x)), weight), expected) < 2.5e-3

    monkeypatch.setattr(dense, "can_use_cublas", lambda weight, out: False)
    assert relative_error(multiply(x, weight), expected) < 2.5e-3


@pytest.mark.parametrize("dim", [96, 1536, 2048, 7168])
@pytest.mark.parametrize("tokens", [1, 3, 40, 700])
def test_the_norm_quantises_what_it_returns(tokens: int, dim: int) -> None:
    torch.manual_seed(tokens)
    x, residual, weight = normal(tokens, dim), normal(tokens, dim), normal(dim)
    normed, total = rms_norm(x, weight, 1e-6, residual, quantizes=True)
    assert isinstance(normed, Quantized)
    plain, plain_total = rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(total, plain_total)
    # The mean square may be added up in another order. The result is rounded twice.
    torch.testing.assert_close(normed.rows, plain, atol=0, rtol=2**-6)
    assert (normed.rows != plain).float().mean() < 1e-3
    for fp8 in (normed.fp8, quantize(normed.rows)):
        expected = quantize_ref(normed.rows)
        torch.testing.assert_close(fp8.scales, expected.scales)
        # A quotient that is almost a tie may be rounded to its other neighbour.
        differ = fp8.values.float() != expected.values.float()
        assert differ.float().mean() < 1e-3


def test_the_demo_model_answers_in_fp8() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    questions = make_questions(tokenizer, "words", 20)
    common = dict(max_model_len=1024, num_blocks=512, max_num_seqs=8, quantization="fp8")
    engines = list_engines([], ["triton"], [], [True, False], ranks=1)
    for cell in run_matrix(str(DEMO), engines, common, questions, [8]):
        assert cell.summary["words"]["accuracy"] > 0.9, cell.name
