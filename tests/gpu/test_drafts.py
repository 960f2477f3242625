"""Speculative decoding on a GPU: the demo model's answers are those of steps of one token."""

from __future__ import annotations

import pytest
from accuracy_matrix import Matrix, list_engines, run_matrix
from backends import GPU_BACKENDS
from eval_accuracy import DEMO, make_questions
from transformers import AutoTokenizer

pytestmark = pytest.mark.gpu
COMMON = dict(max_model_len=1024, num_blocks=1024, max_num_seqs=8)
LAYOUTS: dict[str, dict[str, object]] = {
    "2x2": dict(tp_size=2, dcp_size=2),
    "4x2": dict(tp_size=4, dcp_size=2, dcp_comm_backend="a2a"),
    "4x4": dict(tp_size=4, dcp_size=4, dcp_comm_backend="ag_rs", exchange_policy="narrow"),
}


def speculate(count: int) -> dict[str, object]:
    return dict(speculative_method="ngram", num_speculative_tokens=count)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("drafts", [1, 3, 7])
def test_the_demo_model_answers_alike(backend: str, drafts: int) -> None:
    """With CUDA graphs and without. Word problems repeat the words of the examples before them."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    questions = make_questions(tokenizer, "words", 10)
    engines = list_engines([], [backend], [], [True, False], ranks=1)
    engines = {name: options | speculate(drafts) for name, options in engines.items()}
    for cell in run_matrix(str(DEMO), engines, COMMON, questions, [1, 8]):
        assert cell.summary["words"]["differ"] == 0, f"{cell.name} at {cell.concurrency}"
        assert cell.summary["words"]["accuracy"] == 1.0, f"{cell.name} at {cell.concurrency}"


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    """The answers of one rank without drafts."""
    questions = make_questions(AutoTokenizer.from_pretrained(DEMO), "words", 20)
    return Matrix(str(DEMO), COMMON, questions, [8])


@pytest.mark.parametrize("name", LAYOUTS)
def test_many_ranks_answer_as_one_without_drafts(matrix: Matrix, name: str) -> None:
    for cell in matrix.compare(name, LAYOUTS[name] | speculate(3)):
        assert cell.summary["words"]["differ"] == 0
        assert cell.summary["words"]["accuracy"] == 1.0
