"""What speaks to servers in tests: clients, a server process, and the application in this process.
The fixtures here are for test modules that say `pytest_plugins = ["servers"]`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tokenizers import Tokenizer

from minidcp import EngineConfig
from minidcp.config import ServeConfig
from minidcp.engine.engine import LLMEngine
from minidcp.engine.listener import StepListener
from minidcp_server.app import create_app
from minidcp_server.async_engine import AsyncEngine

PROMPT = "Once upon a time"
LENGTH = 16
BOS = 0
CONTEXT = 8192  # of the demo checkpoint
# With other tests on few cores, threads that wait for each other are ten times slower.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
ORDINARY_SECONDS = 0.06  # for the work of measure_slowness
LONG = dict(max_tokens=6000)  # takes a minute or more if the client does not leave
# Fields that the openai client sends only as extra fields of the body.
EXTRA = (
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "max_completion_tokens",
    "stop_token_ids",
    "top_k",
)


def measure_slowness() -> float:
    """How many times as long as an ordinary core this one takes now, with all else that runs on
    this machine. At least 1. Takes a fifth of a second on an ordinary core."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        total = 0
        for i in range(1_000_000):
            total += i * i % 7
        seconds.append(time.perf_counter() - start)
    return max(1.0, statistics.mean(seconds) / ORDINARY_SECONDS)


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a state. The seconds are those of an ordinary machine; a slow or busy one gets as
    many more as it is slower."""
    start = time.monotonic()
    slowness = 1.0
    while not condition():
        waited = time.monotonic() - start
        if waited > seconds * slowness:
            slowness = max(slowness, measure_slowness())
            assert waited <= seconds * slowness, f"after {waited:.1f} s: {what}"
        time.sleep(0.02)


@contextmanager
def obeying_ctrl_c() -> Iterator[None]:
    """Processes started here end by SIGINT. Those of a script's background jobs, such as
    `make test &`, would ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class Server:
    """`minidcp serve` in a process of its own. Its output goes to files."""

    def __init__(self, checkpoint: Path, logs: Path, *flags: str) -> None:
        self.stdout, self.stderr = logs / "stdout", logs / "stderr"
        command = [Path(sysconfig.get_path("scripts"), "minidcp"), "serve", checkpoint]
        with self.stdout.open("w") as out, self.stderr.open("w") as err:
            command += ["--device", "cpu", "--port", "0", *flags]
            with obeying_ctrl_c():
                self.process = subprocess.Popen(
                    command, stdout=out, stderr=err, env=os.environ | ONE_THREAD
                )
        self.url = ""

    def wait_until_healthy(self) -> None:
        wait_until(self.is_healthy, 120, "the server is not healthy")

    def is_healthy(self) -> bool:
        assert self.process.poll() is None, self.stderr.read_text()
        found = re.search(r" on (http://\S+) ", self.stdout.read_text())
        if found is None:
            return False
        self.url = found[1]
        return httpx.get(f"{self.url}/health").status_code == 200

    def stop(self) -> int:
        """Send SIGTERM. Returns the exit code."""
        self.process.terminate()
        return self.wait(20)

    def wait(self, seconds: float) -> int:
        """Wait for the end of the process. Returns the exit code."""
        wait_until(lambda: self.process.poll() is not None, seconds, "the server has not ended")
        return self.process.wait()

    def accepts_connections(self) -> bool:
        url = httpx.URL(self.url)
        try:
            socket.create_connection((url.host, url.port)).close()
        except ConnectionRefusedError:
            return False
        return True

    def kill(self) -> None:
        """End the process, whatever happened before."""
        self.process.kill()
        self.process.wait()


@contextmanager
def serve(checkpoint: Path, logs: Path, *flags: str) -> Iterator[Server]:
    """A healthy server, which must not have logged a traceback at the end."""
    server = Server(checkpoint, logs, *flags)
    try:
        server.wait_until_healthy()
        yield server
        assert "Traceback" not in server.stderr.read_text()
    finally:
        server.kill()


@dataclass
class Api:
    """A server at `url` that serves the checkpoint `model`."""

    url: str
    model: str

    def __post_init__(self) -> None:
        self.options = dict(base_url=f"{self.url}/v1", api_key="x", max_retries=0, timeout=60)
        self.client = openai.OpenAI(**self.options)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def body(self, prompt: object = PROMPT, **fields: object) -> dict[str, Any]:
        """A greedy completion of LENGTH tokens, unless `fields` say otherwise."""
        defaults = dict(
            model=self.model, prompt=prompt, max_tokens=LENGTH, temperature=0, ignore_eos=True
        )
        return defaults | fields

    def arguments(self, prompt: object, fields: dict[str, object]) -> dict[str, Any]:
        body = self.body(prompt, **fields)
        return body | dict(extra_body={name: body.pop(name) for name in EXTRA if name in body})

    def complete(self, prompt: object = PROMPT, **fields: object) -> Completion:
        return self.client.completions.create(**self.arguments(prompt, fields))

    async def complete_async(self, prompt: object = PROMPT, **fields: object) -> Completion:
        async with openai.AsyncOpenAI(**self.options) as client:
            return await client.completions.create(**self.arguments(prompt, fields))

    def stream(self, prompt: object = PROMPT, **fields: object) -> list[Completion]:
        return list(self.client.completions.create(**self.arguments(prompt, fields), stream=True))

    def chat(self, messages: object, **fields: object) -> ChatCompletion:
        return self.client.chat.completions.create(**self.chat_arguments(messages, fields))

    def chat_stream(self, messages: object, **fields: object) -> list[ChatCompletionChunk]:
        arguments = self.chat_arguments(messages, fields)
        return list(self.client.chat.completions.create(**arguments, stream=True))

    def chat_arguments(self, messages: object, fields: dict[str, object]) -> dict[str, Any]:
        arguments = self.arguments(None, fields) | dict(messages=messages)
        del arguments["prompt"]
        return arguments

    def post(self, body: object, path: str = "/v1/completions") -> httpx.Response:
        """Post any JSON, also what httpx would refuse: NaN, and halves of surrogate pairs."""
        return self.post_bytes(json.dumps(body).encode(), path)

    def post_bytes(self, content: bytes, path: str = "/v1/completions") -> httpx.Response:
        return self.http.post(path, content=content, headers={"Content-Type": "application/json"})


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    script = Path(__file__).parents[1] / "examples" / "make_demo_checkpoint.py"
    subprocess.run([sys.executable, script, directory], check=True, capture_output=True)
    return directory


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo / "tokenizer.json"))


def check_error(
    response: httpx.Response, status: int, words: str, param: str | None = None
) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert error["param"] == param
    assert error["code"] == status
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


@dataclass
class Local:
    """The application on one rank. At most two requests run at a time; the others wait."""

    engine: LLMEngine
    api: Api

    def num_unfinished(self) -> int:
        return len(self.engine.scheduler.waiting) + len(self.engine.scheduler.running)

    def is_idle(self) -> bool:
        blocks = self.engine.blocks
        return (
            self.num_unfinished() == 0
            and not self.engine.requests
            and len(blocks.live) == 0
            and len(blocks.free) + len(blocks.cached) == blocks.num_blocks
        )

    @contextmanager
    def expect_leaving(self) -> Iterator[None]:
        """For a body that starts LONG requests and leaves: they must run, and end soon after."""
        wait_until(self.is_idle, 5, "requests of another test are left")
        before = self.engine.stats.generated_tokens
        yield
        wait_until(self.is_idle, 3, "the requests' blocks are not free")
        assert 0 < self.engine.stats.generated_tokens - before < LONG["max_tokens"] / 10

    def is_busy(self, requests: int) -> bool:
        return self.num_unfinished() == requests and len(self.engine.blocks.live) > 0


@pytest.fixture(scope="module")
def local(demo: Path) -> Iterator[Local]:
    with run_local(demo, ServeConfig()) as local:
        yield local


@contextmanager
def run_local(demo: Path, options: ServeConfig, **engine_options: Any) -> Iterator[Local]:
    engine_options = dict(device="cpu", ranks="threads", max_num_seqs=2) | engine_options
    engine = LLMEngine(EngineConfig(str(demo), **engine_options))

    def make(listener: StepListener) -> LLMEngine:
        engine.listener = listener
        return engine

    app = create_app(AsyncEngine(make, options, str(demo)))
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, 10, "uvicorn has not started")
    host, port = server.servers[0].sockets[0].getsockname()
    yield Local(engine, Api(f"http://{host}:{port}", str(demo)))
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()
    assert not any(thread.name in ("engine", "rank 0") for thread in threading.enumerate())
