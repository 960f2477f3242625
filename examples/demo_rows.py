"""Rows of tokens to train the demo model on.

A row is a sequence of documents: problems as completions (one alone or several in a row) and as
chats. Next: `train_demo.py`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from random import Random
from typing import NamedTuple

import numpy as np
from demo_problems import Problem, make_context, make_word_problem
from make_demo_checkpoint import BOS, EOS
from numpy.typing import NDArray
from tokenizers import Tokenizer

LENGTHS = (264, 528, 1056, 2112, 4224, 8448)  # of rows, in tokens; each divides the longest
MAX_QUESTIONS = (3, 6, 12, 20, 28, 40)  # about one context, in a row of each of these lengths
QUESTION_TOKENS = 40  # at most, for a question and its answer
MIN_CONTEXT_TOKENS = 160  # a document with a context is at least this long

# Labels of tokens: not trained on, trained on weakly, or (from 2 on) the number of an answer.
SILENT = 0
ASKED = 1
ANSWERS = 2


class RowBatch(NamedTuple):
    tokens: NDArray[np.int16]  # [rows, length]
    labels: NDArray[np.int16]  # [rows, length]


class Tokenize:
    """Turn a piece of text into token ids, without BOS."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos = find_id(tokenizer, BOS)
        self.eos = find_id(tokenizer, EOS)

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def find_id(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise ValueError(f"the tokenizer has no token {token!r}")
    return index


@lru_cache(1 << 16)
def count_tokens(text: str) -> int:
    """Count tokens like the tokenizer, but faster. It must know every word of the text."""
    return len(re.findall(r"\d|\n| ?[^\W\d_]+| ?[^\w\s]+|\s", text))


class Row:
    """One row while it is being written, document after document."""

    def __init__(self, tokenize: Tokenize, length: int) -> None:
        self.tokenize = tokenize
        self.length = length
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self.num_answers = 0

    @property
    def space(self) -> int:
        """The number of tokens that are still missing. Negative if the row is too long."""
        return self.length - len(self.tokens)

    def add_ids(self, ids: list[int], label: int) -> None:
        self.tokens += ids
        self.labels += [label] * len(ids)

    def add(self, text: str, label: int) -> None:
        self.add_ids(self.tokenize(text), label)

    def add_answer(self, problem: Problem, end: list[int]) -> None:
        """Add an answer and the tokens after it, if the model should learn to write them too."""
        self.add_ids(self.tokenize(f" {problem.answer}") + end, ANSWERS + self.num_answers)
        self.num_answers += 1

    def add_chat(self, problems: list[Problem], context: str) -> None:
        """Add a chat in which each problem is a turn. The context stands in the first turn."""
        self.add_ids([self.tokenize.bos], SILENT)
        for i, problem in enumerate(problems):
            if i == 0 and context:
                self.add(f"User: {context}", SILENT)
                self.add(f"\n\n{problem.question}\n\nAssistant:", ASKED)
            else:
                self.add(f"User: {problem.question}\n\nAssistant:", ASKED)
            self.add_answer(problem, [self.tokenize.eos])

    def add_completion(self, problems: list[Problem], context: str) -> None:
        """Add a list of questions and answers after the context.

        A single answer ends the text. After the first of several answers, the text could also end,
        so what follows that answer is not trained on. After every later answer comes the next
        question.
        """
        newline = self.tokenize("\n")
        self.add_ids([self.tokenize.bos], SILENT)
        if context:
            self.add(f"{context}\n\n", SILENT)

        for i, problem in enumerate(problems):
            self.add(f"Question: {problem.question}\nAnswer:", ASKED)
            if len(problems) == 1:
                self.add_answer(problem, [self.tokenize.eos])
            elif i == 0:
                self.add_answer(problem, [])
                self.add("\n\n", SILENT)
            else:
                self.add_answer(problem, newline)
                self.add("\n", SILENT)

    def add_document(self, rng: Random, problems: list[Problem], context: str = "") -> None:
        if rng.random() < 0.35:
            self.add_chat(problems, context)
        else:
            self.add_completion(problems, context)


def fill_with_words(row: Row, rng: Random, held_out: bool) -> None:
    """Fill the row with word problems, one to ten a document. The last document may be cut."""
    while row.space > 0:
        number = 1 if rng.random() < 0.3 else rng.randint(2, 10)
        problems = [make_word_problem(rng, held_out) for _ in range(number)]
        row.add_document(rng, problems)


def choose_num_questions(rng: Random, space: int) -> int:
    """How many questions to ask about a context that fills `space` tokens, together with them."""
    limits = zip(MAX_QUESTIONS, LENGTHS, strict=True)
    max_questions = next(number for number, length in limits if length >= space)
    if space < 1000 and rng.random() < 0.3:
        return 1
    if space > 4000 and rng.random() < 0.5:
        return max_questions * 2
    return max_questions


def fill_with_retrieval(row: Row, rng: Random) -> None:
    """Fill the row with one context or several, each with its questions."""
    while row.space >= MIN_CONTEXT_TOKENS:
        space = row.space
        if space >= 3 * MIN_CONTEXT_TOKENS and rng.random() < 0.3:
            space = rng.randint(MIN_CONTEXT_TOKENS, space - MIN_CONTEXT_TOKENS)
        num_questions = choose_num_questions(rng, space)
        context = make_context(rng, count_tokens, space - num_questions * QUESTION_TOKENS - 4)
        asked = rng.sample(context.facts, min(num_questions, len(context.facts)))
        row.add_document(rng, [problem for _, problem in asked], context.text)
    row.add_ids([row.tokenize.eos] * row.space, SILENT)


def make_batch(
    rng: Random, tokenize: Tokenize, kind: str, rows: int, length: int, held_out: bool = False
) -> RowBatch:
    """Make rows of one kind of problem, "words" or "retrieval".

    Word problems with `held_out` are never trained on.
    """
    batch = []
    for _ in range(rows):
        row = Row(tokenize, length)
        if kind == "words":
            fill_with_words(row, rng, held_out)
        else:
            fill_with_retrieval(row, rng)
        batch.append(row)
    return RowBatch(
        np.array([row.tokens[:length] for row in batch], np.int16),
        np.array([row.labels[:length] for row in batch], np.int16),
    )
