"""Speculative decoding on a GPU: the demo model's answers are those of steps of one token."""

from __future__ import annotations

import pytest
from accuracy_matrix import list_engines, run_matrix
from backends import GPU_BACKENDS
from eval_accuracy import DEMO, make_questions
from transformers import AutoTokenizer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("drafts", [1, 3, 7])
def test_the_demo_model_answers_alike(backend: str, drafts: int) -> None:
    """With CUDA graphs and without. Word problems repeat the words of the examples before them."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    questions = make_questions(tokenizer, "words", 10)
    common = dict(max_model_len=1024, num_blocks=1024, max_num_seqs=8)
    engines = list_engines([], [backend], [], [True, False], ranks=1)
    speculate = dict(speculative_method="ngram", num_speculative_tokens=drafts)
    engines = {name: options | speculate for name, options in engines.items()}
    for cell in run_matrix(str(DEMO), engines, common, questions, [1, 8]):
        assert cell.summary["words"]["differ"] == 0, f"{cell.name} at {cell.concurrency}"
        assert cell.summary["words"]["accuracy"] == 1.0, f"{cell.name} at {cell.concurrency}"
