"""Decode speed of the whole engine, and the share of the time that is spent outside the model.

    python benchmarks/decode.py examples/demo-model --device cpu --ranks threads -tp 8 -dcp 8

Tokens/s are printed with and without the time of the prompts. Each batch ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from minidcp.cli import add_engine_flags, engine_config, parse_counts
from minidcp.config import flag, require
from minidcp.engine.engine import LLMEngine
from minidcp.request import SamplingParams


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
    parser.add_argument("--output-len", type=int, default=64, help="decode steps to measure")
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
    engine = LLMEngine(engine_config(args))
    try:
        for batch in batches:
            measure(engine, batch, args.input_len, args.output_len)
    finally:
        engine.close()


def add_requests(engine: LLMEngine, batch: int, input_len: int, max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    vocab_size = engine.model_config.vocab_size
    for i in range(batch):
        prompt = [(i * 7919 + j * 104729) % vocab_size for j in range(input_len)]
        engine.add_request(str(i), prompt, params)


def measure(engine: LLMEngine, batch: int, input_len: int, output_len: int) -> None:
    """Decode one batch and print its speed."""
    max_tokens = output_len + 2
    prefill_start = time.perf_counter()
    add_requests(engine, batch, input_len, max_tokens)

    # Prefill and the first decode steps, until every request has a token.
    started: set[str] = set()
    while len(started) < batch:
        started.update(delta.request_id for delta in engine.step())

    stats = engine.stats
    tokens_before = stats.generated_tokens
    steps_before = stats.steps
    model_seconds_before = stats.step_seconds
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    end = time.perf_counter()

    seconds = end - start
    tokens = stats.generated_tokens - tokens_before
    steps = stats.steps - steps_before
    share_outside = 1 - (stats.step_seconds - model_seconds_before) / seconds
    rate = tokens / seconds
    rate_with_prompts = batch * max_tokens / (end - prefill_start)
    step_ms = seconds / steps * 1e3

    config = engine.config
    result = {
        "tp_size": config.tp_size,
        "dcp_size": config.dcp_size,
        "dcp_comm_backend": config.dcp_comm_backend,
        "batch": batch,
        "tokens_per_second": round(rate, 1),
        "tokens_per_second_with_prompts": round(rate_with_prompts, 1),
        "step_ms": round(step_ms, 2),
        "share_outside_model": round(share_outside, 4),
    }
    ranks = f"tp {config.tp_size}, dcp {config.dcp_size} ({config.dcp_comm_backend})"
    print(f"{ranks}, batch {batch}, ranks as {config.ranks}:")
    print(f"  {rate:8.1f} tokens/s; {rate_with_prompts:.1f} with the time of the prompts")
    print(f"  {step_ms:8.2f} ms per step")
    print(f"  {share_outside:8.2%} of the time outside the model")
    print(json.dumps(result))


if __name__ == "__main__":
    raise SystemExit(main())
