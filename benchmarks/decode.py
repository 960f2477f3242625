"""Decode speed of the whole engine, and the share of the time that is spent outside the model.

    python benchmarks/decode.py examples/demo-model --device cpu --ranks threads -tp 8 -dcp 8
    python benchmarks/decode.py MODEL --speculative-method ngram --acceptance 0,0.3,0.6,0.9

Measured are the steps in which all requests decode: from the last request's first token to the
first request's end. Tokens/s of the whole run, prompts included, are printed too. Each batch ends
with a line of JSON. With --acceptance every batch runs once without drafts, and then with drafts
that are right with each of these probabilities: they are taken from the first run, and some are
made wrong. Tokens are then sampled at the highest temperature: noise alone decides, which is the
same in both runs. What is most likely can differ, where a step of several tokens rounds otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time

from minidcp.cli import add_engine_flags, engine_config, parse_counts
from minidcp.config import flag, require
from minidcp.engine.drafter import Drafter
from minidcp.engine.engine import LLMEngine
from minidcp.engine.proposers import Proposer
from minidcp.request import Request, SamplingParams

NOISE_ALONE = 100.0  # a temperature at which logits decide nothing


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_flags(parser)
    parser.add_argument(
        "--batch",
        default="8",
        help="batch sizes, rising and separated by commas: requests that decode together",
    )
    parser.add_argument("--input-len", type=int, default=64, help="prompt tokens per request")
    parser.add_argument(
        "--output-len", type=int, default=64, help="answers have two more tokens than this"
    )
    parser.add_argument(
        "--acceptance", default="", help="probabilities that a draft is right, see above"
    )
    args = parser.parse_args()
    try:
        run(args)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Measure every batch. Raises ValueError for an error of the user."""
    batches = parse_counts("batch", args.batch)
    for name in ("input_len", "output_len"):
        value = getattr(args, name)
        require(value >= 1, f"{flag(name)} {value}: must be at least 1")
    rates = parse_rates(args.acceptance)
    require(
        not rates or args.speculative_method != "none",
        f"--acceptance {args.acceptance}: needs --speculative-method",
    )
    engine = LLMEngine(engine_config(args))
    learning = engine.scheduler.drafter
    temperature = NOISE_ALONE if rates else 0.0
    try:
        for batch in batches:
            if rates:
                engine.scheduler.drafter = None
            answers = measure(engine, batch, args.input_len, args.output_len, temperature)
            for rate in rates:
                assert learning is not None
                known = KnownAnswers(learning.proposer, answers, rate)
                engine.scheduler.drafter = Drafter(
                    known, learning.most, learning.max_tokens, learning.times
                )
                measure(engine, batch, args.input_len, args.output_len, temperature, rate)
    finally:
        engine.close()


def parse_rates(text: str) -> list[float]:
    try:
        rates = [float(rate) for rate in text.split(",") if rate]
    except ValueError:
        rates = [-1.0]
    is_possible = all(0 <= rate <= 1 for rate in rates)
    require(is_possible, f"--acceptance {text}: must be probabilities from 0 to 1, such as 0,0.6")
    return rates


class KnownAnswers:
    """Knows the answers, and makes some drafts wrong. The ranks go on to make theirs if they do."""

    def __init__(self, real: Proposer, answers: dict[str, list[int]], rate: float) -> None:
        self.num_predicted = real.num_predicted
        self.answers = answers
        self.rate = rate
        self.random = random.Random(0)

    def begin_step(self) -> None:
        pass

    def drop(self, request: Request) -> None:
        pass

    def propose(self, request: Request, count: int) -> list[int]:
        num_done = request.num_outputs + request.num_in_flight
        return self.find(request, num_done, count)

    def guess(self, request: Request) -> int | None:
        guesses = self.find(request, request.num_outputs, 1)
        return guesses[0] if guesses and self.num_predicted == 0 else None

    def find(self, request: Request, place: int, count: int) -> list[int]:
        drafts = self.answers[request.request_id][place : place + count]
        return [token if self.random.random() < self.rate else abs(token - 1) for token in drafts]


def add_requests(
    engine: LLMEngine, batch: int, input_len: int, max_tokens: int, temperature: float
) -> None:
    vocab_size = engine.model_config.vocab_size
    for i in range(batch):
        prompt = [(i * 7919 + j * 104729) % vocab_size for j in range(input_len)]
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, seed=i, ignore_eos=True
        )
        engine.add_request(str(i), prompt, params)


def measure(
    engine: LLMEngine,
    batch: int,
    input_len: int,
    output_len: int,
    temperature: float = 0.0,
    acceptance: float | None = None,
) -> dict[str, list[int]]:
    """Decode one batch and print its speed. Returns the tokens by request id."""
    max_tokens = output_len + 2
    prefill_start = time.perf_counter()
    add_requests(engine, batch, input_len, max_tokens, temperature)

    # Prefill and the first decode steps, until every request has a token.
    answers: dict[str, list[int]] = {}
    has_ended = False
    while len(answers) < batch:
        has_ended |= step(engine, answers)
    require(
        not has_ended,
        f"--output-len {output_len}: with {batch} prompts of {input_len} tokens the first request "
        f"ends before the last one begins; more tokens are needed",
    )

    stats = engine.stats
    tokens_before = stats.generated_tokens
    steps_before = stats.steps
    model_seconds_before = stats.step_seconds
    start = time.perf_counter()
    drafts_before = stats.drafts
    accepted_before = stats.accepted_drafts
    while not has_ended:
        has_ended = step(engine, answers)
    seconds = time.perf_counter() - start
    tokens = stats.generated_tokens - tokens_before
    steps = stats.steps - steps_before
    drafts = stats.drafts - drafts_before
    accepted_drafts = stats.accepted_drafts - accepted_before
    share_outside = 1 - (stats.step_seconds - model_seconds_before) / seconds

    while engine.has_work:
        step(engine, answers)
    end = time.perf_counter()
    rate = tokens / seconds
    rate_with_prompts = batch * max_tokens / (end - prefill_start)
    step_ms = seconds / steps * 1e3

    config = engine.config
    result = {
        "tp_size": config.tp_size,
        "dcp_size": config.dcp_size,
        "dcp_comm_backend": config.dcp_comm_backend,
        "cache_tokens": engine.blocks.num_blocks * engine.blocks.tokens_per_block,
        "batch": batch,
        "tokens_per_second": round(rate, 1),
        "tokens_per_second_with_prompts": round(rate_with_prompts, 1),
        "step_ms": round(step_ms, 2),
        "share_outside_model": round(share_outside, 4),
    }
    if acceptance is not None:
        result["acceptance"] = acceptance
        result["drafts"] = drafts
        result["accepted_drafts"] = accepted_drafts
    ranks = f"tp {config.tp_size}, dcp {config.dcp_size} ({config.dcp_comm_backend})"
    drafted = "" if acceptance is None else f", drafts are right with {acceptance}"
    print(f"{ranks}, batch {batch}, ranks as {config.ranks}{drafted}:")
    print(f"  {rate:8.1f} tokens/s; {rate_with_prompts:.1f} with the time of the prompts")
    print(f"  {step_ms:8.2f} ms per step")
    print(f"  {share_outside:8.2%} of the time outside the model")
    print(json.dumps(result))
    return answers


def step(engine: LLMEngine, answers: dict[str, list[int]]) -> bool:
    """Make a step and collect its tokens. Returns whether a request ended."""
    has_ended = False
    for delta in engine.step():
        answers.setdefault(delta.request_id, []).extend(delta.token_ids)
        has_ended |= delta.finish_reason is not None
    return has_ended


if __name__ == "__main__":
    raise SystemExit(main())
