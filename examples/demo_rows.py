"""Rows of tokens to train the demo model on: problems as completions, after others, and as chats."""

from __future__ import annotations

import re
from functools import lru_cache
from random import Random
from typing import NamedTuple

import numpy as np
from demo_problems import Problem, make_context, make_word_problem
from demo_tokenizer import BOS, EOS
from numpy.typing import NDArray
from tokenizers import Tokenizer

LENGTHS = (264, 528, 1056, 2112, 4224, 8448)  # of rows; each divides the longest
QUESTIONS = (3, 6, 12, 20, 28, 40)  # asked about a context in a row of that length, at most
QUESTION_TOKENS = 40  # and its answer's, at most
SILENT, ASKED, ANSWERS = 0, 1, 2  # labels: not trained on; weakly; from 2 on the number of an answer


class RowBatch(NamedTuple):
    tokens: NDArray[np.int16]  # [rows, length]
    labels: NDArray[np.int16]  # [rows, length]


class Tokenize:
    """Token ids of a piece of text, without BOS."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos = find_id(tokenizer, BOS), find_id(tokenizer, EOS)

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
    """As the tokenizer does where it knows every word, and much faster."""
    return len(re.findall(r"\d|\n| ?[^\W\d_]+| ?[^\w\s]+|\s", text))


class Row:
    """One row while it is written, document after document."""

    def __init__(self, tokenize: Tokenize, length: int) -> None:
        self.tokenize, self.length = tokenize, length
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self.answers = 0

    @property
    def left(self) -> int:
        return self.length - len(self.tokens)

    def add_ids(self, ids: list[int], label: int) -> None:
        self.tokens += ids
        self.labels += [label] * len(ids)

    def add(self, text: str, label: int) -> None:
        self.add_ids(self.tokenize(text), label)

    def add_answer(self, problem: Problem, end: list[int]) -> None:
        """With what must follow it, where that is known."""
        self.add_ids(self.tokenize(f" {problem.answer}") + end, ANSWERS + self.answers)
        self.answers += 1

    def add_chat(self, problems: list[Problem], context: str) -> None:
        eos = [self.tokenize.eos]
        self.add_ids([self.tokenize.bos], SILENT)
        for i, problem in enumerate(problems):
            if i == 0 and context:
                self.add(f"User: {context}", SILENT)
                self.add(f"\n\n{problem.question}\n\nAssistant:", ASKED)
            else:
                self.add(f"User: {problem.question}\n\nAssistant:", ASKED)
            self.add_answer(problem, eos)

    def add_completion(self, problems: list[Problem], context: str) -> None:
        """A lone answer ends the text. The first of several could do so too: what follows it is not trained
        on. After the others comes the next question."""
        newline = self.tokenize("\n")
        self.add_ids([self.tokenize.bos], SILENT)
        self.add(context and f"{context}\n\n", SILENT)
        for i, problem in enumerate(problems):
            self.add(f"Question: {problem.question}\nAnswer:", ASKED)
            if len(problems) == 1:
                self.add_answer(problem, [self.tokenize.eos])
            else:
                self.add_answer(problem, newline if i else [])
                self.add("\n" if i else "\n\n", SILENT)

    def add_document(self, rng: Random, problems: list[Problem], context: str = "") -> None:
        (self.add_chat if rng.random() < 0.35 else self.add_completion)(problems, context)


def fill_with_words(row: Row, rng: Random, held_out: bool) -> None:
    while row.left > 0:
        size = 1 if rng.random() < 0.3 else rng.randint(2, 10)
        row.add_document(rng, [make_word_problem(rng, held_out) for _ in range(size)])


def fill_with_retrieval(row: Row, rng: Random) -> None:
    """One context that fills the row, or several that do."""
    shortest = 160
    while row.left >= shortest:
        space = row.left
        if space >= 3 * shortest and rng.random() < 0.3:
            space = rng.randint(shortest, space - shortest)
        most = next(n for n, length in zip(QUESTIONS, LENGTHS, strict=True) if length >= space)
        if space < 1000:
            wanted = 1 if rng.random() < 0.3 else most
        else:
            wanted = most * 2 if space > 4000 and rng.random() < 0.5 else most
        context = make_context(rng, count_tokens, space - wanted * QUESTION_TOKENS - 4)
        asked = rng.sample(context.facts, min(wanted, len(context.facts)))
        row.add_document(rng, [problem for _, problem in asked], context.text)
    row.add_ids([row.tokenize.eos] * row.left, SILENT)


def make_batch(rng: Random, tokenize: Tokenize, kind: str, rows: int, length: int, held_out: bool = False) -> RowBatch:
    """Rows of one kind of problem. `held_out` ones are never trained on."""
    done = []
    for _ in range(rows):
        row = Row(tokenize, length)
        if kind == "words":
            fill_with_words(row, rng, held_out)
        else:
            fill_with_retrieval(row, rng)
        done.append(row)
    return RowBatch(
        np.array([row.tokens[:length] for row in done], np.int16),
        np.array([row.labels[:length] for row in done], np.int16),
    )
