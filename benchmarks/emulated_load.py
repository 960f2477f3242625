"""The load of `serving_emulated.py`: clients that send random prompts and measure latencies."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from step_times import GREEDY

from minidcp.engine.engine import LLMEngine


@dataclass(frozen=True)
class Row:
    """One concurrency. Latencies are in ms: (mean, median, 99th percentile)."""

    concurrency: int
    requests: int
    output_tokens_per_s: float
    ttft_ms: tuple[float, float, float]
    itl_ms: tuple[float, float, float]
    preemptions: int
    seconds: float


def draw_load(
    args: argparse.Namespace, count: int, vocab_size: int
) -> Iterator[tuple[list[int], int]]:
    """Draw prompts, and the number of tokens that each one gets.

    Lengths are uniform within the spread. Every setup gets the same load.
    """
    rng = random.Random(args.seed)
    spread = args.spread / 100
    for _ in range(count):
        prompt_length = round(args.input_len * rng.uniform(1 - spread, 1 + spread))
        num_tokens = round(args.output_len * rng.uniform(1 - spread, 1 + spread))
        prompt = rng.choices(range(vocab_size), k=max(1, prompt_length))
        yield prompt, max(1, num_tokens)


class Clients:
    """Clients that each send their next request when they have the answer to the one before.

    Attributes:
        num_tokens: by request, the number of tokens that it shall get.
        times: by request, when it was sent and when each of its tokens came.
    """

    def __init__(
        self,
        engine: LLMEngine,
        now: Callable[[], float],
        load: Iterator[tuple[list[int], int]],
        name: str,
    ) -> None:
        self.engine = engine
        self.now = now
        self.load = load
        self.name = name
        self.num_tokens: dict[str, int] = {}
        self.times: dict[str, list[float]] = {}

    def send(self) -> None:
        """Send the next request, if there is one."""
        prompt, num_tokens = next(self.load, (None, 0))
        if prompt is None:
            return
        request_id = f"{self.name}-{len(self.times)}"
        self.num_tokens[request_id] = num_tokens
        self.times[request_id] = [self.now()]
        self.engine.add_request(request_id, prompt, replace(GREEDY, max_tokens=num_tokens))

    def run(self, concurrency: int) -> None:
        """Send all requests and wait for their answers.

        Raises:
            RuntimeError: A request was lost, or got another number of tokens than it wants.
        """
        for _ in range(concurrency):
            self.send()
        while self.engine.has_work:
            for delta in self.engine.step():
                self.times[delta.request_id].append(self.now())
                if delta.finish_reason is not None:
                    self.send()

        lost = []
        for request_id, num_tokens in self.num_tokens.items():
            if len(self.times[request_id]) != num_tokens + 1:
                lost.append(request_id)
        if lost:
            raise RuntimeError(f"requests without all their tokens: {lost}")


def run_load(
    engine: LLMEngine, now: Callable[[], float], args: argparse.Namespace, concurrency: int
) -> Row:
    """Serve the load at one concurrency."""
    count = max(args.least, args.rounds * concurrency)
    load = draw_load(args, count, engine.model_config.vocab_size)
    clients = Clients(engine, now, load, name=f"{concurrency}")
    preemptions_before = engine.scheduler.num_preemptions
    start = now()
    clients.run(concurrency)
    seconds = now() - start

    times = clients.times.values()
    ttft = np.array([request_times[1] - request_times[0] for request_times in times])
    itl = np.concatenate([np.diff(request_times[1:]) for request_times in times])
    return Row(
        concurrency=concurrency,
        requests=len(times),
        output_tokens_per_s=round(sum(clients.num_tokens.values()) / seconds, 2),
        ttft_ms=summarize(ttft),
        itl_ms=summarize(itl),
        preemptions=engine.scheduler.num_preemptions - preemptions_before,
        seconds=round(seconds, 3),
    )


def summarize(seconds: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Mean, median and 99th percentile in ms."""
    if len(seconds) == 0:  # there is nothing between tokens if every request gets only one
        return 0.0, 0.0, 0.0
    median, p99 = np.percentile(seconds, [50, 99])
    return (
        round(float(seconds.mean()) * 1e3, 3),
        round(float(median) * 1e3, 3),
        round(float(p99) * 1e3, 3),
    )
