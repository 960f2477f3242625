"""Matrices in FP8: how they are rounded, and how experts lie in memory."""

from __future__ import annotations

import pytest
import torch
from accuracy_matrix import list_engines, run_matrix
from eval_accuracy import DEMO, make_questions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

from minidcp.kernels.experts import run_experts_ref
from minidcp.kernels.fp8 import (
    Fp8Stack,
    allocate_stack,
    join_rows,
    put_into_stack,
    quantize_ref,
    quantize_weight,
)

# e4m3 has 3 bits behind the leading one, and 2^-9 as its smallest value. Of 448, its largest:
LARGEST_ERROR = 2**-4
SMALLEST_STEP = 2**-9 / 448


@settings(deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 300),
    block=st.sampled_from([8, 32, 128]),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 1000),
)
def test_every_value_is_near(rows: int, width: int, block: int, exponent: int, seed: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    quantised = quantize_ref(x, block)
    assert quantised.values.shape == x.shape
    assert quantised.scales.shape == (-(-width // block), rows)
    for first in range(0, width, block):
        part = x[:, first : first + block]
        error = (quantised.dequantize()[:, first : first + block] - part).abs()
        largest = part.abs().amax(1, keepdim=True)
        assert (error <= LARGEST_ERROR * part.abs() + SMALLEST_STEP * largest).all()


def test_zeros_stay_zeros() -> None:
    assert torch.equal(quantize_ref(torch.zeros(2, 256)).dequantize(), torch.zeros(2, 256))


def make_matrices(count: int, rows: int, columns: int) -> list[Tensor]:
    return [torch.randn(rows, columns) for _ in range(count)]


def make_stack(matrices: list[Tensor]) -> Fp8Stack:
    stack = allocate_stack(len(matrices), quantize_weight(matrices[0]))
    for index, matrix in enumerate(matrices):
        put_into_stack(stack, index, quantize_weight(matrix))
    assert isinstance(stack, Fp8Stack)
    return stack


@pytest.mark.parametrize(("columns", "block"), [(256, 128), (192, 64), (96, 32), (24, 8)])
def test_a_stack_holds_the_matrices(columns: int, block: int) -> None:
    """Its blocks divide the columns, so that every tile is whole."""
    matrices = make_matrices(3, 16, columns)
    stack = make_stack(matrices)
    assert stack.block == block
    assert stack.shape == (3, 16, columns)
    expected = torch.stack([quantize_weight(matrix).dequantize() for matrix in matrices])
    assert torch.equal(stack.dequantize(), expected)


def test_rows_can_be_joined_and_chosen() -> None:
    first, second = make_matrices(2, 6, 160)
    joined = join_rows(quantize_weight(first), quantize_weight(second))
    expected = quantize_weight(torch.cat([first, second]))
    assert torch.equal(joined.dequantize(), expected.dequantize())
    order = torch.tensor([3, 1, 8])
    assert torch.equal(joined[order].dequantize(), expected.dequantize()[order])
    assert torch.equal(joined[2:9].dequantize(), expected.dequantize()[2:9])


def test_experts_round_what_they_multiply() -> None:
    torch.manual_seed(0)
    gate_up, down = make_matrices(4, 64, 160), make_matrices(4, 160, 32)
    x, weights = torch.randn(5, 160), torch.rand(5, 2)
    ids = torch.rand(5, 4).topk(2).indices.to(torch.int32)
    actual = run_experts_ref(x, make_stack(gate_up), make_stack(down), weights, ids).sum()

    rounded = quantize_ref(x).dequantize()
    for token in range(5):
        expected = torch.zeros(160)
        for choice in range(2):
            expert = int(ids[token, choice])
            both = quantize_weight(gate_up[expert]).dequantize() @ rounded[token]
            h = torch.nn.functional.silu(both[:32]) * both[32:]
            h = quantize_ref(h[None]).dequantize()[0]
            out = quantize_weight(down[expert]).dequantize() @ h
            expected += weights[token, choice] * out
        torch.testing.assert_close(actual[token], expected, atol=1e-4, rtol=1e-4)


def test_the_demo_model_in_fp8_on_every_layout() -> None:
    """With DCP and without, four ranks give the same tokens. One rank's blocks are others, so an
    answer may differ there."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    questions = make_questions(tokenizer, "words", 2)
    common = dict(
        device="cpu",
        dtype="float32",
        quantization="fp8",
        ranks="threads",
        max_model_len=1024,
        num_blocks=256,
        max_num_seqs=8,
    )
    engines = list_engines(["a2a"], ["reference"], ["narrow"], [False], ranks=4)
    cells = list(run_matrix(str(DEMO), engines, common, questions, [8], base=engines.popitem()))
    assert len(cells) == 2
    for cell in cells:
        row = cell.summary["words"]
        assert row["differ"] == 0, cell.name
        # What lies in the middle of two e4m3 values may be rounded to either.
        assert row["drift"] < 1e-2, cell.name
        assert row["accuracy"] == 1.0, cell.name
