"""256 streaming clients send 2,000 requests, fewer on a slow machine. A third of these leave early.
All others are complete and equal to a run alone, nothing leaks, and probes are answered in time."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx
import pytest
from servers import BOS, Server, measure_slowness, wait_until

pytest_plugins = ["servers"]

CLIENTS, REQUESTS, TOKENS = 256, 2000, 8
MIN_REQUESTS = 2 * CLIENTS  # on the slowest machines
PROBE_SECONDS = 0.1  # for 99 of 100 probes


def read_rss(pid: int) -> int:
    """The resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


async def stream(
    host: str, port: int, prompt: list[int], max_tokens: int, leave_after: int | None
) -> list[str]:
    """The texts of a completion's events. The client leaves after `leave_after` of them."""
    reader, writer = await asyncio.open_connection(host, port)
    body = json.dumps(
        dict(prompt=prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True, stream=True)
    ).encode()
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n".encode()
    )
    writer.write(b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + body)
    texts: list[str] = []
    try:
        while (line := await reader.readline()) and (
            leave_after is None or len(texts) < leave_after
        ):
            if line.startswith(b"data: {"):
                texts.append(json.loads(line[6:])["choices"][0]["text"])
            elif line.startswith(b"data: [DONE]"):
                return texts
        assert leave_after is not None, "the stream has no end"
        return texts
    finally:
        writer.close()


def list_solo(url: str) -> dict[tuple[int, ...], list[str]]:
    """Prompts whose tokens rounding cannot change, with the texts of their events when alone."""
    rng, solo = random.Random(0), {}
    host, port = httpx.URL(url).host, httpx.URL(url).port
    while len(solo) < 40:
        prompt = [BOS, *(rng.randrange(5, 300) for _ in range(rng.randint(1, 60)))]
        body = dict(prompt=prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=2)
        tops = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0][
            "logprobs"
        ]
        best = [sorted(top.values())[-2:] for top in tops["top_logprobs"]]
        if all(len(pair) == 2 and pair[1] - pair[0] > 1e-2 for pair in best):
            solo[tuple(prompt)] = asyncio.run(stream(host, port, prompt, TOKENS, None))
    return solo


@pytest.mark.timeout(1800)  # where it hangs; it takes half a minute on two ordinary cores
def test_load(demo: Path, tmp_path: Path) -> None:
    server = Server(demo, tmp_path, "--tp-size", "2", "--dcp-size", "2", "--num-blocks", "600")
    try:
        server.wait_until_healthy()
        slowness = measure_slowness()
        num_requests = max(MIN_REQUESTS, int(REQUESTS / slowness))
        solo = list_solo(server.url)
        spawn = multiprocessing.get_context("spawn")
        results, done = spawn.Queue(), spawn.Event()
        prober = spawn.Process(target=probe, args=(server.url, results, done), daemon=True)
        prober.start()
        rss = asyncio.run(drive(server, solo, num_requests))
        done.set()
        latencies = sorted(results.get(timeout=20 * slowness))
        prober.join(10 * slowness)
        with httpx.Client(base_url=server.url) as client:
            wait_until(lambda: client.get("/load").json()["running"] == 0, 10, "requests are left")
            load = client.get("/load").json()
        blocks = load["kv_blocks"]
        assert load["waiting"] == 0 == blocks["live"]
        assert blocks["cached"] + blocks["free"] == blocks["total"]
        assert len(latencies) > 50
        p50, p99 = (latencies[int(len(latencies) * share)] for share in (0.5, 0.99))
        print(
            f"{num_requests} requests. /health, {len(latencies)} times: {p50:.4f} s in the median, "
            f"{p99:.4f} s at the 99th percentile"
        )
        assert p99 < PROBE_SECONDS or p99 < PROBE_SECONDS * max(slowness, measure_slowness())
        assert rss[-1] < rss[len(rss) // 2] + (16 << 20), "memory grows"
        assert "Traceback" not in server.stderr.read_text()
    finally:
        server.kill()


async def drive(
    server: Server, solo: dict[tuple[int, ...], list[str]], num_requests: int
) -> list[int]:
    """Send so many requests. Returns the server's memory over time."""
    host, port = httpx.URL(server.url).host, httpx.URL(server.url).port
    rng, rss = random.Random(1), []
    left = num_requests
    prompts = list(solo)

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            prompt, count = rng.choice(prompts), rng.randint(1, TOKENS)
            leave_after = rng.randint(0, 3) if rng.random() < 1 / 3 else None
            texts = await stream(host, port, list(prompt), count, leave_after)
            expected = solo[prompt][:count]
            complete = len(texts) == count
            assert complete or leave_after is not None
            kept = texts[:-1] if complete else texts
            assert kept == expected[: len(kept)]
            # The last text may also have a character that a next token would have completed.
            assert not complete or texts[-1].startswith(expected[-1])
            if left % 50 == 0:
                rss.append(read_rss(server.process.pid))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return rss


def probe(url: str, results: multiprocessing.Queue[list[float]], done: Event) -> None:
    """Measure how long /health takes, in a process of its own: the clients' event loop is busy."""
    latencies = []
    with httpx.Client(base_url=url) as http:
        while not done.is_set():
            start = time.perf_counter()
            assert http.get("/health").status_code == 200
            latencies.append(time.perf_counter() - start)
            time.sleep(0.02)
    results.put(latencies)
