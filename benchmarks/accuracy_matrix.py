"""Does every way to run the demo model answer alike? TP, and DCP with each exchange, back-end and policy.

    python benchmarks/accuracy_matrix.py examples/demo-model --questions 200

Eight ranks may share one GPU; start NVIDIA's MPS first. Each engine is asked one question at a time and many
together, with CUDA graphs and without, and compared with one rank. The last line is JSON.
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
CACHE_TOKENS = 320_000  # at most, that fit in the KV cache of a DCP group


@dataclass(frozen=True)
class Cell:
    """One engine's answers at one concurrency, against the answers of one rank."""

    name: str
    concurrency: int
    seconds: float
    summary: dict[str, dict[str, Any]]

    def agrees_with(self, base: Cell) -> bool:
        """Every accuracy is within the base's 95 % interval."""
        return all(row["low"] <= self.summary[k]["accuracy"] <= row["high"] for k, row in base.summary.items())


def list_engines(
    exchanges: list[str], backends: list[str], policies: list[str], graphs: list[bool], ranks: int = RANKS
) -> dict[str, dict[str, Any]]:
    """Names and options: plain TP with each back-end, and DCP over all ranks in every combination."""
    engines: dict[str, dict[str, Any]] = {}
    for graph, backend in product(graphs, backends):
        end = f"{backend} {'graphs' if graph else 'eager'}"
        common = {"tp_size": ranks, "attention_backend": backend, "cuda_graph": graph}
        engines[f"tp{ranks} {end}"] = common | {"dcp_size": 1}
        for exchange, policy in product(exchanges, policies):
            own = {"dcp_size": ranks, "dcp_comm_backend": exchange, "exchange_policy": policy}
            engines[f"dcp{ranks} {exchange} {policy} {end}"] = common | own
    return engines


def ask(
    model: str,
    options: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    concurrencies: list[int],
) -> Iterator[tuple[int, list[Answer], float]]:
    """The engine's answers at each concurrency, and the seconds that they took."""
    with LLM(model, **options) as llm:
        complete = use_engine(llm, find_ends(tokenizer))
        for concurrency in concurrencies:
            start = time.perf_counter()
            answers = answer_all(tokenizer, questions, complete, concurrency)
            yield concurrency, answers, time.perf_counter() - start


def run_matrix(
    model: str,
    engines: dict[str, dict[str, Any]],
    common: dict[str, Any],
    questions: list[Question],
    concurrencies: list[int],
) -> Iterator[Cell]:
    """One rank's cells, which are the reference, then the others' as they are done. At each concurrency the
    reference is one rank at the last of them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = list(ask(model, common | ONE_RANK, tokenizer, questions, concurrencies))
    reference = base[-1][1]
    for concurrency, answers, seconds in base:
        yield Cell("tp1", concurrency, seconds, summarize(answers, reference))
    for name, options in engines.items():
        for concurrency, answers, seconds in ask(model, common | options, tokenizer, questions, concurrencies):
            yield Cell(name, concurrency, seconds, summarize(answers, reference))


def size_cache(options: dict[str, Any], tokens: int, block_size: int) -> dict[str, Any]:
    """The options with a cache for so many tokens, but at least a block for each request that may run."""
    return options | {"num_blocks": 64 + min(tokens, CACHE_TOKENS) // (block_size * options["dcp_size"])}


def format_cell(cell: Cell) -> str:
    parts = [f"{cell.name:<36} {cell.concurrency:>4}"]
    for row in cell.summary.values():
        drift = "-" if row["drift"] is None else f"{row['drift']:.1e}"
        parts.append(f"{row['accuracy']:.3f} ({row['low']:.3f}–{row['high']:.3f}) {row['differ']:>3} {drift:>7}")
    return "  ".join([*parts, f"{cell.seconds:>6.1f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO), help="the demo checkpoint")
    parser.add_argument("--questions", type=int, default=200, help="of each kind")
    parser.add_argument("--longest", type=int, default=8192, help="tokens of a retrieval prompt")
    parser.add_argument("--concurrency", default="1,64", help="questions asked together, by commas")
    parser.add_argument("--exchanges", default="ag_rs,a2a,p2p")
    parser.add_argument("--backends", default="fa3,triton")
    parser.add_argument("--policies", default="wide,narrow")
    parser.add_argument("--graphs", default="on,off")
    parser.add_argument("--only", default="", help="a regular expression that an engine's name must match")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--prefill-strategy", default="auto", help="gather_kv: takes less memory on a CPU")
    parser.add_argument("--ranks", default="auto", help="threads: on a CPU")
    args = parser.parse_args()

    exchanges, backends, policies = (x.split(",") for x in (args.exchanges, args.backends, args.policies))
    engines = list_engines(exchanges, backends, policies, [g == "on" for g in args.graphs.split(",")])
    concurrencies = [int(c) for c in args.concurrency.split(",")]
    tokens = max(concurrencies) * (args.longest + 256)
    engines = {
        name: size_cache(options, tokens, args.block_size)
        for name, options in engines.items()
        if re.search(args.only, name)
    }
    common = size_cache(ONE_RANK, tokens, args.block_size) | {
        "block_size": args.block_size,
        "ranks": args.ranks,
        "prefill_strategy": args.prefill_strategy,
        "max_num_seqs": max(concurrencies),
        "max_model_len": args.longest + 256,
        "prefix_cache": False,  # every cell computes all of its prompts itself
    }
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    questions = [q for kind in KINDS for q in make_questions(tokenizer, kind, args.questions, args.longest)]

    kinds = ", ".join(KINDS)
    print(f"engine; at a time; {kinds}: accuracy (95 % interval), answers unlike one rank's, largest")
    print("difference in log-probability of those alike; seconds")
    cells: list[Cell] = []
    for cell in run_matrix(args.model, engines, common, questions, concurrencies):
        cells.append(cell)
        verdict = "" if cell.agrees_with(cells[0]) else "  OUTSIDE one rank's interval"
        print(format_cell(cell) + verdict, flush=True)
    outside = [f"{c.name} at {c.concurrency}" for c in cells if not c.agrees_with(cells[0])]
    result = {
        "questions": args.questions,
        "outside": outside,
        "cells": [{"name": c.name, "concurrency": c.concurrency, **c.summary} for c in cells],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
