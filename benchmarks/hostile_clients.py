"""What well-behaved clients notice of hostile ones, on a server that runs already.

    minidcp serve examples/demo-model --device cpu --max-num-seqs 64
    python benchmarks/hostile_clients.py http://localhost:8000 --seconds 600

56 clients stream completions all the time. For half of the time 8 more clients do the same; for the
other half these 8 send the most expensive requests that they can. The gaps between tokens of the 56
are compared. Every answer of theirs must be complete.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from typing import Any
from urllib.parse import urlsplit

NUM_CLIENTS = 56
NUM_OTHERS = 8  # hostile in the second half
OUTPUT_LEN = 64
MILLION = 1_000_000


@dataclass
class Gaps:
    """What the clients of one half have seen. Seconds."""

    gaps: list[list[float]] = field(default_factory=list)  # for each client
    completions: int = 0
    codes: Counter[str] = field(default_factory=Counter)  # the answers to hostile requests

    def percentile(self, share: float) -> float:
        values = sorted(gap for gaps in self.gaps for gap in gaps)
        return values[int(len(values) * share)]

    def worst_p99(self) -> float:
        """The 99th percentile of the client for whom it is largest."""
        return max(sorted(gaps)[int(len(gaps) * 0.99)] for gaps in self.gaps if gaps)


def make_hostile_bodies(context: int) -> Iterator[tuple[str, str, bytes]]:
    """Names, paths and bodies, again and again."""

    def encode(name: str, path: str, **fields: Any) -> tuple[str, str, bytes]:
        return name, path, json.dumps(fields).encode()

    completions = "/v1/completions"
    max_tokens = min(context - 100, 200)
    bodies = [
        encode("wrong stops", completions, prompt="x", stop=[{}] * 90_000),
        encode("wrong prompts", completions, prompt=[{"a": 1}] * 40_000),
        encode("16 MB of wrong stops", completions, prompt="x", stop=[1] * 8 * MILLION),
        encode("wrong messages", "/v1/chat/completions", messages=[{}] * 90_000),
        encode("wrong tokens", "/detokenize", tokens=["x"] * 900_000),
        encode("tokens without end", "/detokenize", tokens=[5] * 900_000),
        encode("16 MB of text", "/tokenize", prompt="word " * (16 * MILLION // 5)),
        encode(
            "200,000 stops", completions, prompt="x", stop=[f"stop {i}" for i in range(200_000)]
        ),
        encode(
            "log-probabilities",
            completions,
            prompt=[5, 6],
            logprobs=20,
            max_tokens=max_tokens,
            ignore_eos=True,
        ),
        encode(
            "bytes that never settle",
            completions,
            prompt=[5, 6],
            max_tokens=max_tokens,
            ignore_eos=True,
            stream=True,
            logit_bias={"200": 100},  # the same token again and again,
        ),
        encode(
            "biases times n",
            completions,
            prompt=[5, 6],
            n=32,
            max_tokens=2,
            logit_bias={str(i): i / 1000 for i in range(1000)},
        ),
        encode(
            "biases that are too many", completions, logit_bias={str(i): 0 for i in range(50_000)}
        ),
    ]
    while True:
        yield from bodies


async def post(host: str, port: int, path: str, body: bytes) -> str:
    """Send one body and read the whole answer; returns the status."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 24)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n")
        writer.write(body)
        await writer.drain()
        status = await reader.readline()
        while await reader.read(1 << 16):
            pass
        return status.split()[1].decode() if status else "closed"
    except ConnectionError:
        return "closed"
    finally:
        writer.close()


def attack(host: str, port: int, context: int, stop: Event, results: Any) -> None:
    """Eight clients that send hostile bodies without a pause, in a process of their own."""
    codes: Counter[str] = Counter()
    slowest: dict[str, float] = {}

    async def attacker(number: int) -> None:
        bodies = make_hostile_bodies(context)
        for _ in range(number):
            next(bodies)  # so that they do not all send the same
        while not stop.is_set():
            name, path, body = next(bodies)
            start = time.perf_counter()
            code = await post(host, port, path, body)
            codes[f"{name}: {code}"] += 1
            slowest[name] = max(slowest.get(name, 0.0), time.perf_counter() - start)

    async def run() -> None:
        await asyncio.gather(*(attacker(number) for number in range(NUM_OTHERS)))

    asyncio.run(run())
    results.put((codes, slowest))


async def stream(host: str, port: int, rng: random.Random, gaps: list[float]) -> bool:
    """One completion. Adds the gaps between its events; returns whether it is complete."""
    fields = dict(
        prompt=[rng.randrange(5, 300) for _ in range(rng.randint(4, 40))],
        max_tokens=OUTPUT_LEN,
        temperature=0,
        ignore_eos=True,
        stream=True,
    )
    body = json.dumps(fields).encode()
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    writer.write(
        head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + body
    )
    num_events = 0
    is_done = False
    last = 0.0
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            is_done = True
        elif line.startswith(b"data: {"):
            now = time.perf_counter()
            if num_events > 0:
                gaps.append(now - last)
            last = now
            num_events += 1
    writer.close()
    return is_done and num_events == OUTPUT_LEN


async def run_clients(host: str, port: int, num_clients: int, seconds: float) -> Gaps:
    """Clients that stream one completion after the other."""
    found = Gaps(gaps=[[] for _ in range(num_clients)])
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            if not await stream(host, port, rng, found.gaps[number]):
                raise SystemExit(f"client {number}: an answer is not complete")
            found.completions += 1

    await asyncio.gather(*(client(number) for number in range(num_clients)))
    return found


def measure(url: str, seconds: float) -> tuple[Gaps, Gaps, dict[str, float]]:
    """Both halves: 64 well-behaved clients, then 56 of them and 8 hostile ones."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
        context = json.load(response)["data"][0]["max_model_len"]
    host = urlsplit(url).hostname or "localhost"
    port = urlsplit(url).port or 80

    asyncio.run(run_clients(host, port, NUM_CLIENTS + NUM_OTHERS, min(seconds / 10, 5)))
    alone = asyncio.run(run_clients(host, port, NUM_CLIENTS + NUM_OTHERS, seconds / 2))
    alone.gaps = alone.gaps[:NUM_CLIENTS]

    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    results: Any = spawn.Queue()
    arguments = (host, port, context, stop, results)
    attackers = spawn.Process(target=attack, args=arguments, daemon=True)
    attackers.start()
    together = asyncio.run(run_clients(host, port, NUM_CLIENTS, seconds / 2))
    stop.set()
    together.codes, slowest = results.get(timeout=600)
    attackers.join()
    return alone, together, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=600)
    args = parser.parse_args()
    alone, together, slowest = measure(args.url.rstrip("/"), args.seconds)

    print("| gap between tokens, ms | median | p99 | p99, worst client | longest | completions |")
    print("|---|---|---|---|---|---|")
    for name, found in (("64 clients", alone), ("56, and 8 hostile ones", together)):
        median = statistics.median(gap for gaps in found.gaps for gap in gaps)
        values = (median, found.percentile(0.99), found.worst_p99(), found.percentile(1 - 1e-9))
        cells = " | ".join(f"{1e3 * value:.1f}" for value in values)
        print(f"| {name} | {cells} | {found.completions} |")
    print()
    for name, count in sorted(together.codes.items()):
        seconds = slowest[name.rsplit(":", 1)[0]]
        print(f"{name}, {count} times; the slowest of these bodies took {seconds:.2f} s")


if __name__ == "__main__":
    main()
