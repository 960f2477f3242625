"""FP8 kernels in Triton's interpreter against their torch definitions.

When the interpreter rounds to e4m3 and a value reaches the next power of two, it halves the value.
So where results are rounded here, some are wrong. On GPUs none are: tests/gpu/test_fp8_products.py.
The kernel for few rows is in Gluon, which has no interpreter: here they go to that for more rows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minidcp.kernels import DeviceProperties, dense, experts, fp8, grouped, norm, tiles

HALVED = 0.05  # the share of values that may be
E4M3_MAX = 448.0


def make_exact(rows: int, width: int) -> Tensor:
    """Rows that FP8 holds exactly, with scales that are powers of two: another for each block."""
    x = torch.randn(rows, width).to(fp8.E4M3).float()
    x[:, :: fp8.BLOCK] = E4M3_MAX
    num_blocks = -(-width // fp8.BLOCK)
    scales = 2.0 ** torch.randint(-3, 4, (rows, num_blocks))
    return x * scales.repeat_interleave(fp8.BLOCK, 1)[:, :width]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def make_stack(count: int, rows: int, columns: int) -> fp8.Stack:
    matrices = [fp8.quantize_weight(torch.randn(rows, columns) / 8) for _ in range(count)]
    stack = fp8.allocate_stack(count, matrices[0])
    for index, matrix in enumerate(matrices):
        fp8.put_into_stack(stack, index, matrix)
    return stack


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
@pytest.mark.parametrize(("rows", "columns"), [(96, 160), (40, 256), (17, 32)])
def test_dense(tokens: int, rows: int, columns: int) -> None:
    """Odd numbers of outputs, and blocks of 32 and of 128."""
    torch.manual_seed(0)
    weight = fp8.quantize_weight(torch.randn(rows, columns))
    x = make_exact(tokens, columns)
    expected = x.double() @ weight.dequantize().double().T
    torch.testing.assert_close(dense.multiply(x, weight).double(), expected, atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("tokens", [2, 3])
def test_dense_of_rows_that_are_part_of_others(tokens: int) -> None:
    weight = fp8.quantize_weight(torch.randn(40, 128))
    x = make_exact(tokens, 192)[:, :128]
    expected = x.double() @ weight.dequantize().double().T
    torch.testing.assert_close(dense.multiply(x, weight).double(), expected, atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "bm", "is_sorted"), [(1, 16, False), (2, 16, False), (9, 16, False), (40, 32, True)]
)
def test_experts(tokens: int, bm: int, is_sorted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, inter = 288, 288
    gate_up, down = make_stack(5, 2 * inter, hidden), make_stack(5, hidden, inter)
    x, weights = make_exact(tokens, hidden) / 448, torch.rand(tokens, 3)
    ids = torch.rand(tokens, 4).topk(3).indices.to(torch.int32)  # none chooses the last expert

    tile = tiles.Tile(128, 128, 4, 3)
    given = tiles.Tiles(bm, is_sorted, tile, tile)
    monkeypatch.setattr(tiles, "list_tiles", lambda *shape: {tokens: given})
    if is_sorted:
        monkeypatch.setattr(grouped, "get_device_properties", lambda: DeviceProperties((9, 0)))
    expected = experts.run_experts_ref(x, gate_up, down, weights, ids).sum()
    actual = experts.run_experts(x, gate_up, down, weights, ids).sum()
    assert relative_error(actual, expected) < 0.15


@pytest.mark.parametrize("dim", [64, 100, 1536])
def test_the_norm_quantises(dim: int) -> None:
    torch.manual_seed(0)
    x, weight, residual = torch.randn(5, dim), torch.rand(dim) + 0.5, torch.randn(5, dim)
    actual, _ = norm.rms_norm(x, weight, 1e-6, residual, quantizes=True)
    assert isinstance(actual, fp8.Quantized)
    for quantized in (actual.fp8, fp8.quantize(actual.rows)):
        expected = fp8.quantize_ref(actual.rows)
        torch.testing.assert_close(quantized.scales, expected.scales)
        differ = quantized.values.float() != expected.values.float()
        assert differ.float().mean() < HALVED
