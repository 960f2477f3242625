"""The cost of the HTTP server itself: tokens/s through many streams, without a model behind it.

    python benchmarks/http_server.py --streams 256 --tokens 256
    python benchmarks/http_server.py --streams 512 --tokens 100 --step-ms 5

The engine gives every request a token at once, or after --step-ms as a GPU would. Server and client
are one process each, so the benchmark needs two CPU cores. The last line is JSON.
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
from minidcp.engine.limits import Limits
from minidcp.request import FinishReason, OutputDelta, SamplingParams


@dataclass
class InstantEngine:
    """The part of LLMEngine that the server uses. Every step gives every request a token."""

    config: EngineConfig = field(default_factory=lambda: EngineConfig("instant", max_num_seqs=4096))
    tokenizer: None = None
    max_model_len: int = 1 << 20
    step_seconds: float = 0.0
    limits: Limits = field(default_factory=lambda: Limits(1 << 20, 1 << 20, False))
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)  # tokens to come, by request
    scheduler: Any = field(default_factory=lambda: SimpleNamespace(running=[], waiting=[]))
    executor: Any = field(default_factory=lambda: SimpleNamespace(check=lambda: None))

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    def add_request(
        self, request_id: str, prompt: list[int], params: SamplingParams, group: str
    ) -> None:
        self.left[request_id] = params.max_tokens or 1

    def validate(self, tokens: list[int], params: SamplingParams) -> None: ...

    def step(self) -> list[OutputDelta]:
        time.sleep(self.step_seconds)
        deltas = []
        for request_id in list(self.left):
            self.left[request_id] -= 1
            reason = None
            if self.left[request_id] == 0:
                reason = FinishReason.LENGTH
                del self.left[request_id]
            deltas.append(OutputDelta(request_id, " word", (5,), reason))
        return deltas

    def abort(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.left.pop(request_id, None)

    def kv_tokens(self) -> tuple[list[int], list[int]]:
        return [], []

    def close(self) -> None: ...


def serve(ready: Connection, step_seconds: float) -> None:
    """Run the server in this process, and send its port through `ready`."""
    # Imported here, so that the client's process does not load the server.
    from minidcp_server.app import create_app
    from minidcp_server.async_engine import AsyncEngine
    from minidcp_server.listening import listen

    engine: Any = InstantEngine(step_seconds=step_seconds)
    app = create_app(AsyncEngine(lambda _: engine, ServeConfig(), "instant"))
    socket = listen("127.0.0.1", 0)
    ready.send(socket.getsockname()[1])
    uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[socket])


async def stream(port: int, tokens: int) -> tuple[int, int]:
    """Stream one completion. Returns the numbers of events and of bytes that were received."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": tokens, "stream": True})
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Host: x",
        f"Content-Length: {len(body)}",
        "Connection: close",
        "Content-Type: application/json",
    ]
    head = "\r\n".join(lines)
    writer.write(f"{head}\r\n\r\n{body}".encode())
    received = await reader.read(-1)
    writer.close()
    return received.count(b"data: {"), len(received)


async def run(port: int, streams: int, tokens: int) -> tuple[float, int, int]:
    """Stream completions at the same time. Returns seconds, events and bytes of all of them."""
    start = time.perf_counter()
    results = await asyncio.gather(*(stream(port, tokens) for _ in range(streams)))
    seconds = time.perf_counter() - start
    num_events = sum(events for events, _ in results)
    num_bytes = sum(size for _, size in results)
    return seconds, num_events, num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=256, help="number of streams at a time")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per stream")
    parser.add_argument("--step-ms", type=float, default=0.0, help="time of an engine step")
    args = parser.parse_args()
    result = measure(args.streams, args.tokens, args.step_ms)
    print(
        f"{args.streams} streams of {args.tokens} tokens: "
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['us_per_token']:.0f} µs and "
        f"{result['bytes_per_token']:.0f} bytes per token"
    )
    print(json.dumps(result))


def measure(streams: int, tokens: int, step_ms: float) -> dict[str, float]:
    """Start a server in a process of its own, and stream from it."""
    own_end, server_end = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(server_end, step_ms * 1e-3), daemon=True
    )
    process.start()
    server_end.close()  # so that a server that fails ends the wait for its port
    port = own_end.recv()
    asyncio.run(run(port, 8, 8))  # warm-up
    seconds, num_events, num_bytes = asyncio.run(run(port, streams, tokens))
    process.terminate()
    process.join()

    assert num_events == streams * tokens, f"{num_events} events"
    return {
        "streams": streams,
        "tokens_per_second": num_events / seconds,
        "us_per_token": seconds / num_events * 1e6,
        "bytes_per_token": num_bytes / num_events,
    }


if __name__ == "__main__":
    main()
