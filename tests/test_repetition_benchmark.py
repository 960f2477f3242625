"""benchmarks/repetition.py with the demo model: its tasks, and equal tokens with drafts."""

from __future__ import annotations

import json

import pytest
import repetition
from eval_accuracy import DEMO

ROOM = "--device cpu --dtype float32 --ranks threads --max-model-len 1024 --max-num-seqs 4"


def run(monkeypatch: pytest.MonkeyPatch, flags: str) -> int:
    monkeypatch.setattr("sys.argv", ["repetition.py", str(DEMO), *ROOM.split(), *flags.split()])
    return repetition.main()


def test_tasks_are_answered_with_drafts_and_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--tasks again,retrieval --batch 2 --questions 2 --rounds 1 --longest 256"
    assert run(monkeypatch, flags) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["task"], row["batch"]) for row in result["rows"]] == [
        ("again", 2),
        ("retrieval", 2),
    ]
    for row in result["rows"]:
        assert 0 <= row["accepted_drafts"] <= row["drafts"]
        assert row["tokens_per_step"] >= 1
        assert min(row["tokens_per_second"], row["tokens_per_second_without_drafts"]) > 0


def test_the_answer_to_a_problem_asked_again_is_in_its_prompt() -> None:
    for prompt in repetition.make_word_prompts("again", 5):
        solved, question = prompt.rsplit("Question: ", 1)
        assert f"Question: {question}" in solved


def test_an_edited_question_differs_from_a_solved_one_in_one_number() -> None:
    for prompt in repetition.make_word_prompts("edited", 5):
        *solved, question = prompt.split("Question: ")
        words = question.split()
        changes = [
            sum(a != b for a, b in zip(text.split(), words, strict=False)) for text in solved[1:]
        ]
        assert question not in "".join(solved)
        assert min(changes) == 1


def test_an_unknown_task_is_an_error_that_names_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--tasks again,agian") == 2
    assert "--tasks again,agian" in (error := capsys.readouterr().err) and "retrieval" in error
