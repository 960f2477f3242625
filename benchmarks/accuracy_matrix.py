"""Does the demo model answer alike with TP, and with DCP, each exchange, back-end and policy?

    python benchmarks/accuracy_matrix.py examples/demo-model --questions 200

Each engine runs with CUDA graphs and without. It is asked one question at a time and many together,
and its answers are compared with those of one rank. Eight ranks may share one GPU; start NVIDIA's
MPS first. The last line is JSON.

    python benchmarks/accuracy_matrix.py --tp-size 4 --speculative-method ngram

speculates in all engines but that one rank, whose answers must not change by that.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minidcp import LLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from eval_accuracy import (
    DEMO,
    Answer,
    Question,
    answer_all,
    find_ends,
    make_questions,
    summarize,
    use_engine,
)

RANKS = 8
ONE_RANK = {"tp_size": 1, "dcp_size": 1}
KINDS = ("words", "retrieval")
MAX_CACHE_TOKENS = 320_000  # in the KV cache of a DCP group; larger caches may not fit

Options = dict[str, Any]  # options of an engine


@dataclass(frozen=True)
class Cell:
    """The answers of one engine at one concurrency, compared with those of one rank."""

    name: str
    concurrency: int
    seconds: float
    summary: dict[str, dict[str, Any]]  # as `eval_accuracy.summarize` returns it
    accepted_drafts: int = 0  # tokens of these answers that were drafts

    def agrees_with(self, base: Cell) -> bool:
        """Whether every accuracy is within the 95 % interval of the base."""
        for kind, row in base.summary.items():
            if not row["low"] <= self.summary[kind]["accuracy"] <= row["high"]:
                return False
        return True


def list_engines(
    exchanges: list[str],
    backends: list[str],
    policies: list[str],
    graphs: list[bool],
    ranks: int = RANKS,
) -> dict[str, Options]:
    """Names and options of all engines.

    There is plain TP with each back-end, and DCP over all ranks in every combination.
    """
    engines: dict[str, Options] = {}
    for graph, backend in product(graphs, backends):
        suffix = f"{backend} {'graphs' if graph else 'eager'}"
        engines[f"tp{ranks} {suffix}"] = {
            "tp_size": ranks,
            "attention_backend": backend,
            "cuda_graph": graph,
            "dcp_size": 1,
        }
        for exchange, policy in product(exchanges, policies):
            engines[f"dcp{ranks} {exchange} {policy} {suffix}"] = {
                "tp_size": ranks,
                "attention_backend": backend,
                "cuda_graph": graph,
                "dcp_size": ranks,
                "dcp_comm_backend": exchange,
                "exchange_policy": policy,
            }
    return engines


def ask(
    model: str,
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    concurrencies: list[int],
) -> Iterator[tuple[int, list[Answer], float, int]]:
    """Ask one engine. Yields each concurrency, its answers, the seconds that they took, and how
    many drafts were accepted in them."""
    with LLM(model, **options) as llm:
        complete = use_engine(llm, find_ends(tokenizer))
        for concurrency in concurrencies:
            start = time.perf_counter()
            accepted_before = llm.engine.stats.accepted_drafts
            answers = answer_all(tokenizer, questions, complete, concurrency)
            accepted = llm.engine.stats.accepted_drafts - accepted_before
            yield concurrency, answers, time.perf_counter() - start, accepted


def run_matrix(
    model: str,
    engines: dict[str, Options],
    common: Options,
    questions: list[Question],
    concurrencies: list[int],
    base: tuple[str, Options] = ("tp1", ONE_RANK),
) -> Iterator[Cell]:
    """Yield the cells of the base, and then those of the other engines as they are done.

    All cells are compared with the answers of the base at the last concurrency.
    """
    matrix = Matrix(model, common, questions, concurrencies, base)
    yield from matrix.base_cells
    for name, options in engines.items():
        yield from matrix.compare(name, options)


class Matrix:
    """Asks the base, and then one engine after another."""

    def __init__(
        self,
        model: str,
        common: Options,
        questions: list[Question],
        concurrencies: list[int],
        base: tuple[str, Options] = ("tp1", ONE_RANK),
    ) -> None:
        self.model = model
        self.common = common
        self.questions = questions
        self.concurrencies = concurrencies
        self.tokenizer = AutoTokenizer.from_pretrained(model)

        name, options = base
        asked = list(self.ask(options))
        _, self.reference, *_ = asked[-1]
        self.base_cells = [self.summarize(name, *asked_at) for asked_at in asked]

    def summarize(
        self, name: str, concurrency: int, answers: list[Answer], seconds: float, accepted: int
    ) -> Cell:
        return Cell(name, concurrency, seconds, summarize(answers, self.reference), accepted)

    def ask(self, options: Options) -> Iterator[tuple[int, list[Answer], float, int]]:
        merged = {**self.common, **options}
        return ask(self.model, merged, self.tokenizer, self.questions, self.concurrencies)

    def compare(self, name: str, options: Options) -> Iterator[Cell]:
        """The cells of one engine, as they are done."""
        for asked_at in self.ask(options):
            yield self.summarize(name, *asked_at)


def size_cache(dcp_size: int, tokens: int, block_size: int) -> int:
    """Blocks of a cache for `tokens` tokens, with at least one for each of 64 running requests."""
    return 64 + min(tokens, MAX_CACHE_TOKENS) // (block_size * dcp_size)


def format_cell(cell: Cell) -> str:
    parts = [f"{cell.name:<36} {cell.concurrency:>4}"]
    for row in cell.summary.values():
        drift = "-" if row["drift"] is None else f"{row['drift']:.1e}"
        accuracy = f"{row['accuracy']:.3f} ({row['low']:.3f}–{row['high']:.3f})"
        parts.append(f"{accuracy} {row['differ']:>3} {drift:>7}")
    parts.append(f"{cell.seconds:>6.1f} {cell.accepted_drafts:>6}")
    return "  ".join(parts)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", default=str(DEMO), help="the demo checkpoint")
    add("--questions", type=int, default=200, help="number of questions of each kind")
    add("--longest", type=int, default=8192, help="longest retrieval prompt, in tokens")
    add("--concurrency", default="1,64", help="questions asked at a time, separated by commas")
    add("--exchanges", default="ag_rs,a2a,p2p", help="exchanges, separated by commas")
    add("--backends", default="fa3,triton", help="attention back-ends, separated by commas")
    add("--policies", default="wide,narrow", help="exchange policies, separated by commas")
    add("--graphs", default="on,off", help="CUDA graphs: on, off, or both with a comma")
    add("--only", default="", help="run engines whose name matches this regular expression")
    add("--block-size", type=int, default=16)
    add("--prefill-strategy", default="auto", help="gather_kv takes less memory on a CPU")
    add("--ranks", default="auto", help="use threads on a CPU")
    add("--quantization", default="auto", help="fp8, or none")
    add("--speculative-method", default="none", help="ngram; one rank has none, to compare with")
    add("--tp-size", type=int, default=RANKS, help="ranks of the engines that are compared")
    add("--device", default="auto", help="cpu, cuda, or auto")
    return parser.parse_args(argv)


def make_engines(args: argparse.Namespace) -> tuple[dict[str, Options], Options]:
    """The engines to compare, and the options that all of them have in common."""
    concurrencies = [int(c) for c in args.concurrency.split(",")]
    max_model_len = args.longest + 256
    tokens = max(concurrencies) * max_model_len
    common = {
        "device": args.device,
        "num_blocks": size_cache(1, tokens, args.block_size),
        "block_size": args.block_size,
        "ranks": args.ranks,
        "prefill_strategy": args.prefill_strategy,
        "quantization": args.quantization,
        "max_num_seqs": max(concurrencies),
        "max_model_len": max_model_len,
        "prefix_cache": False,  # every cell computes all of its prompts
    }
    all_engines = list_engines(
        args.exchanges.split(","),
        args.backends.split(","),
        args.policies.split(","),
        [graphs == "on" for graphs in args.graphs.split(",")],
        args.tp_size,
    )
    engines = {}
    for name, options in all_engines.items():
        if re.search(args.only, name):
            num_blocks = size_cache(options["dcp_size"], tokens, args.block_size)
            own = {"num_blocks": num_blocks, "speculative_method": args.speculative_method}
            engines[name] = {**options, **own}
    return engines, common


def draw_questions(args: argparse.Namespace) -> list[Question]:
    """The questions of every kind."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    questions = []
    for kind in KINDS:
        questions += make_questions(tokenizer, kind, args.questions, args.longest)
    return questions


def main() -> None:
    args = parse_args()
    engines, common = make_engines(args)
    concurrencies = [int(c) for c in args.concurrency.split(",")]
    questions = draw_questions(args)

    print("Columns: engine; questions at a time;")
    print(
        f"for {' and '.join(KINDS)}: accuracy (95 % interval), answers with other tokens than one"
    )
    print("rank's, largest difference in log-probability of answers with the same tokens;")
    print("seconds; drafts that were accepted.")
    cells: list[Cell] = []
    for cell in run_matrix(args.model, engines, common, questions, concurrencies):
        cells.append(cell)
        verdict = "" if cell.agrees_with(cells[0]) else "  OUTSIDE one rank's interval"
        print(format_cell(cell) + verdict, flush=True)

    outside = [
        f"{cell.name} at {cell.concurrency}" for cell in cells if not cell.agrees_with(cells[0])
    ]
    result = {
        "questions": args.questions,
        "outside": outside,
        "cells": [
            {
                "name": cell.name,
                "concurrency": cell.concurrency,
                "accepted_drafts": cell.accepted_drafts,
                **cell.summary,
            }
            for cell in cells
        ],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
