"""What the HTTP server costs by itself: tokens/s through it at many streams, with an engine that yields at once, or
after as long as a GPU's step takes.

    python benchmarks/http_server.py --streams 256 --tokens 256
    python benchmarks/http_server.py --streams 512 --tokens 100 --step-ms 5

Server and client are one process each, so two cores are what it needs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import uvicorn

from minidcp.config import EngineConfig, ServeConfig
from minidcp.request import FinishReason, OutputDelta, SamplingParams


@dataclass
class InstantEngine:
    """As much of LLMEngine as the server uses; every step gives every request a token."""

    config: EngineConfig = field(default_factory=lambda: EngineConfig("instant", max_num_seqs=4096))
    tokenizer: None = None
    max_model_len: int = 1 << 20
    step_seconds: float = 0.0
    observe: object = None
    left: dict[str, int] = field(default_factory=dict)
    scheduler: Any = field(default_factory=lambda: SimpleNamespace(running=[], waiting=[]))
    executor: Any = field(default_factory=lambda: SimpleNamespace(check=lambda: None))

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    def add_request(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        self.left[request_id] = params.max_tokens or 1

    def validate(self, tokens: list[int], params: SamplingParams) -> None: ...

    def step(self) -> list[OutputDelta]:
        time.sleep(self.step_seconds)
        deltas = []
        for request_id in list(self.left):
            self.left[request_id] -= 1
            reason = None if self.left[request_id] else FinishReason.LENGTH
            deltas.append(OutputDelta(request_id, " word", (5,), reason))
            if reason is not None:
                del self.left[request_id]
        return deltas

    def abort(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.left.pop(request_id, None)

    def kv_tokens(self) -> tuple[list[int], list[int]]:
        return [], []

    def close(self) -> None: ...


def serve(ready: Connection, step_seconds: float) -> None:
    from minidcp_server.app import create_app, listen
    from minidcp_server.async_engine import AsyncEngine

    engine: Any = InstantEngine(step_seconds=step_seconds)
    app = create_app(AsyncEngine(lambda: engine, ServeConfig(), "instant"))
    listening = listen("127.0.0.1", 0)
    ready.send(listening.getsockname()[1])
    uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[listening])


async def stream(port: int, tokens: int) -> tuple[int, int]:
    """Events of a completion, and bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": tokens, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    received = await reader.read(-1)
    writer.close()
    return received.count(b"data: {"), len(received)


async def run(port: int, streams: int, tokens: int) -> tuple[float, int, int]:
    start = time.perf_counter()
    results = await asyncio.gather(*(stream(port, tokens) for _ in range(streams)))
    return time.perf_counter() - start, sum(r[0] for r in results), sum(r[1] for r in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256, help="clients at once")
    parser.add_argument("--tokens", type=int, default=256, help="of each")
    parser.add_argument("--step-ms", type=float, default=0.0, help="how long the engine waits in each step")
    args = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(theirs, args.step_ms * 1e-3), daemon=True
    )
    process.start()
    port = ours.recv()
    asyncio.run(run(port, 8, 8))
    seconds, events, size = asyncio.run(run(port, args.streams, args.tokens))
    process.terminate()
    assert events == args.streams * args.tokens, f"{events} events"
    result = {"streams": args.streams, "tokens_per_second": events / seconds, "us_per_token": seconds / events * 1e6}
    print(f"{args.streams} streams of {args.tokens} tokens: {events / seconds:,.0f} tokens/s, "
          f"{seconds / events * 1e6:.0f} µs and {size / events:.0f} bytes a token")  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
