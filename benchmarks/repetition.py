"""Speculative decoding by prompt lookup where answers repeat their prompts, with the demo model.

    python benchmarks/repetition.py examples/demo-model --device cpu --batch 1,4

The tasks: a word problem that is among the five solved ones before it (`again`), the same with one
number changed (`edited`), facts from a text (`retrieval`), and a new word problem (`words`), whose
answer is nowhere in the prompt. One engine answers them with drafts and without, in turn, and the
tokens must be equal. Before what is measured it has answered all of them both ways: so the prompts
are in the prefix cache, and it knows how long steps take. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minidcp.cli import add_engine_flags, engine_config, parse_counts
from minidcp.config import flag, require
from minidcp.engine.engine import LLMEngine
from minidcp.request import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo_problems import Problem, make_word_problem
from eval_accuracy import MAX_TOKENS, SHOTS, find_ends, make_questions, render

TASKS = ("again", "edited", "retrieval", "words")
SEED = 24


@dataclass
class Tally:
    """What rounds of the same prompts took, and the answers of the last one by prompt."""

    seconds: float = 0.0
    tokens: int = 0
    rows: int = 0  # of all steps, one for each request that got tokens
    drafts: int = 0
    accepted_drafts: int = 0
    answers: dict[str, list[int]] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a request in a step, the first one of its answer included."""
        return self.tokens / self.rows


def make_word_prompts(task: str, number: int) -> Iterator[str]:
    """Solved word problems, and one to solve."""
    rng = Random(f"{SEED} {task}")
    for _ in range(number):
        solved = [make_word_problem(rng, held_out=False) for _ in range(SHOTS)]
        problem = make_word_problem(rng, held_out=True)
        if task == "edited":
            while "/" in problem.answer:  # the quotient would not be a whole number any more
                problem = make_word_problem(rng, held_out=True)
        if task != "words":
            solved[rng.randrange(SHOTS)] = problem
        if task == "edited":
            problem = change_number(problem)
        yield "".join(render(p, with_answer=True) for p in solved) + render(problem)


def change_number(problem: Problem) -> Problem:
    """Raise the last number of a question by one. The answer stays what it was, and is wrong."""
    *_, last = re.finditer(r"\d+", problem.question)
    changed = str(int(last.group()) + 1)
    question = problem.question[: last.start()] + changed + problem.question[last.end() :]
    return Problem(question, problem.answer, problem.result)


def make_prompts(
    tokenizer: PreTrainedTokenizerBase, task: str, number: int, longest: int
) -> list[list[int]]:
    if task == "retrieval":
        return [question.prompt for question in make_questions(tokenizer, task, number, longest)]
    return [tokenizer.encode(text) for text in make_word_prompts(task, number)]


def answer_all(
    engine: LLMEngine, prompts: list[list[int]], batch: int, params: SamplingParams, tally: Tally
) -> None:
    """Have every prompt answered, `batch` at a time, and add to the tally."""
    stats = engine.stats
    drafts_before, accepted_before = stats.drafts, stats.accepted_drafts
    answers: dict[str, list[int]] = {}
    num_added = 0
    start = time.perf_counter()
    while engine.has_work or num_added < len(prompts):
        while len(engine.requests) < batch and num_added < len(prompts):
            engine.add_request(str(num_added), prompts[num_added], params)
            num_added += 1
        deltas = engine.step()
        tally.rows += len({delta.request_id for delta in deltas})
        for delta in deltas:
            answers.setdefault(delta.request_id, []).extend(delta.token_ids)
    tally.seconds += time.perf_counter() - start
    tally.tokens += sum(map(len, answers.values()))
    tally.drafts += stats.drafts - drafts_before
    tally.accepted_drafts += stats.accepted_drafts - accepted_before
    tally.answers = answers


def measure(
    engine: LLMEngine, prompts: list[list[int]], batch: int, params: SamplingParams, rounds: int
) -> tuple[Tally, Tally]:
    """Answer without drafts and with them, in turn. The first round of each does not count."""
    drafter = engine.scheduler.drafter
    for num_rounds in (1, rounds):
        plain, drafted = Tally(), Tally()
        for _ in range(num_rounds):
            engine.scheduler.drafter = None
            answer_all(engine, prompts, batch, params, plain)
            engine.scheduler.drafter = drafter
            answer_all(engine, prompts, batch, params, drafted)
            assert drafted.answers == plain.answers, "drafts have changed tokens"
    return plain, drafted


def report(task: str, batch: int, plain: Tally, drafted: Tally) -> dict[str, Any]:
    """Print a line of the table; returns it as JSON has it."""
    print(
        f"{task:<10} {batch:>5} {plain.rate:>9.1f} {drafted.rate:>9.1f} "
        f"{drafted.rate / plain.rate:>6.2f} {drafted.tokens_per_step:>11.2f} "
        f"{drafted.accepted_drafts:>8} of {drafted.drafts}",
        flush=True,
    )
    return {
        "task": task,
        "batch": batch,
        "tokens": drafted.tokens,
        "tokens_per_second_without_drafts": round(plain.rate, 1),
        "tokens_per_second": round(drafted.rate, 1),
        "tokens_per_step": round(drafted.tokens_per_step, 3),
        "drafts": drafted.drafts,
        "accepted_drafts": drafted.accepted_drafts,
    }


def run(args: argparse.Namespace) -> None:
    """Measure every task. Raises ValueError for an error of the user."""
    batches = parse_counts("batch", args.batch)
    tasks = args.tasks.split(",")
    unknown = sorted(set(tasks) - set(TASKS))
    known = f"unknown: {', '.join(unknown)}; known: {', '.join(TASKS)}"
    require(not unknown, f"--tasks {args.tasks}: {known}")
    for name in ("questions", "rounds"):
        value = getattr(args, name)
        require(value >= 1, f"{flag(name)} {value}: must be at least 1")

    engine = LLMEngine(engine_config(args, speculative_method="ngram"))
    tokenizer = AutoTokenizer.from_pretrained(engine.config.model)
    params = SamplingParams(
        max_tokens=MAX_TOKENS, temperature=0.0, stop_token_ids=find_ends(tokenizer)
    )
    print("task       batch   tokens/s with drafts  ratio  tokens/step  accepted drafts")
    rows = []
    try:
        for task in tasks:
            prompts = make_prompts(tokenizer, task, args.questions, args.longest)
            for batch in batches:
                tallies = measure(engine, prompts, batch, params, args.rounds)
                rows.append(report(task, batch, *tallies))
    finally:
        engine.close()
    print(json.dumps({"questions": args.questions, "rounds": args.rounds, "rows": rows}))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_flags(parser)
    add = parser.add_argument
    add("--batch", default="1,4", help="questions at a time, rising and separated by commas")
    add("--tasks", default=",".join(TASKS), help="tasks, separated by commas")
    add("--questions", type=int, default=16, help="number of questions of each task")
    add("--longest", type=int, default=1024, help="longest retrieval prompt, in tokens")
    add("--rounds", type=int, default=3, help="how often each question counts")
    args = parser.parse_args()
    try:
        run(args)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
