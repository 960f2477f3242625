"""Ranks and servers that die: every request in flight ends with an error that says so, processes
end, nothing hangs and nothing is left. And two engines at once, which must not meet.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from checkpoints import make_checkpoint
from servers import Server, wait_until

from minidcp import LLM, SamplingParams
from minidcp.batch import StepPlan
from minidcp.engine.executor import EngineDeadError
from minidcp.worker.model_runner import ModelRunner

SECONDS = 10.0  # the time in which all consequences of a fault must show
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=8000, temperature=0.0, ignore_eos=True)  # takes minutes

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks for processes in /proc"
)


def read_stat(pid: int | str) -> tuple[str, int]:
    """A process's state and its parent, or ("gone", 0) if the process does not exist."""
    try:
        # The command's name stands in parentheses, and can have any character in it.
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return "gone", 0
    return state, int(parent)


def is_alive(pid: int) -> bool:
    return read_stat(pid)[0] not in ("gone", "Z", "X")


def is_tracker(pid: int) -> bool:
    """Whether this is the process that Python keeps after a use of multiprocessing."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(parent: int) -> list[int]:
    """Processes started by `parent`, oldest first, with zombies that it did not wait for."""
    pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return sorted(pid for pid in pids if read_stat(pid)[1] == parent and not is_tracker(pid))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults")
    make_checkpoint(path, "v2", max_position_embeddings=8192)
    return path


@pytest.fixture
def server(checkpoint: Path, tmp_path: Path) -> Iterator[Server]:
    server = Server(
        checkpoint, tmp_path, "--ranks", "processes", "--tp-size", "2", "--dcp-size", "2"
    )
    try:
        server.wait_until_healthy()
        yield server
    finally:
        server.kill()


@contextmanager
def within_seconds() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SECONDS


class InFlight:
    """Two running requests to a server, one that streams. Futures have their results."""

    def __init__(self, url: str, max_tokens: int = 8000) -> None:
        body = dict(prompt=[5, 6, 7], max_tokens=max_tokens, ignore_eos=True)
        self.endpoint, self.body = f"{url}/v1/completions", body
        self.lines: list[str] = []
        self.threads = ThreadPoolExecutor(2)
        self.whole: Future[httpx.Response] = self.threads.submit(
            httpx.post, self.endpoint, json=body, timeout=60
        )
        self.streamed = self.threads.submit(self.stream)
        wait_until(lambda: len(self.lines) >= 5, 30, "the stream has not begun")
        wait_until(
            lambda: httpx.get(f"{url}/load").json()["running"] == 2,
            30,
            "the other request has not come",
        )

    def stream(self) -> None:
        with httpx.stream(
            "POST", self.endpoint, json=self.body | {"stream": True}, timeout=60
        ) as response:
            self.lines.extend(line for line in response.iter_lines() if line)


@needs_proc
def test_a_rank_that_is_killed_ends_its_requests_and_the_server(server: Server) -> None:
    ranks = children_of(server.process.pid)
    assert len(ranks) == 2
    requests = InFlight(server.url)
    assert not requests.whole.done()

    with within_seconds():
        os.kill(ranks[1], signal.SIGKILL)
        requests.streamed.result(SECONDS)
        answer = requests.whole.result(SECONDS)
        assert server.process.wait(SECONDS) == 1
    assert requests.lines[-1] == "data: [DONE]"
    error = json.loads(requests.lines[-2].removeprefix("data: "))["error"]
    assert "rank 1: its process ended (exit code -9)" in error["message"]
    assert error["code"] == 503
    assert answer.status_code == 503
    assert answer.json()["error"] == error
    assert not any(map(is_alive, ranks))
    assert "rank 1: its process ended" in server.stderr.read_text()


@needs_proc
def test_a_rank_that_is_killed_while_nothing_runs_ends_the_server(server: Server) -> None:
    ranks = children_of(server.process.pid)
    with within_seconds():
        os.kill(ranks[0], signal.SIGKILL)
        assert server.process.wait(SECONDS) == 1
    assert not any(map(is_alive, ranks))
    assert "rank 0: its process ended" in server.stderr.read_text()


@needs_proc
def test_ranks_end_with_a_server_that_is_killed(server: Server) -> None:
    ranks = children_of(server.process.pid)
    requests = InFlight(server.url)
    server.process.kill()
    wait_until(lambda: not any(map(is_alive, ranks)), SECONDS, "ranks are left")
    for future in (requests.streamed, requests.whole):
        assert isinstance(future.exception(SECONDS), httpx.TransportError)


@needs_proc
def test_a_rank_that_is_killed_ends_generate(checkpoint: Path) -> None:
    llm = LLM(str(checkpoint), device="cpu", ranks="processes", tp_size=2, dcp_size=2)
    ranks = children_of(os.getpid())
    assert len(ranks) == 2

    def kill() -> float:
        wait_until(lambda: llm.engine.stats.steps > 3, 30, "nothing runs")
        os.kill(ranks[0], signal.SIGKILL)
        return time.monotonic()

    with llm, ThreadPoolExecutor(1) as thread:
        killed = thread.submit(kill)
        with pytest.raises(EngineDeadError, match=r"rank 0: its process ended \(exit code -9\)"):
            llm.generate([[5, 6, 7], [8, 9]], ENDLESS)
        assert time.monotonic() - killed.result() < SECONDS
        assert children_of(os.getpid()) == []
        with within_seconds(), pytest.raises(EngineDeadError, match="rank 0"):
            llm.generate([5], GREEDY)
        assert llm.engine.requests == {}


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), ValueError("boom"), ZeroDivisionError("boom")]
)
def test_an_exception_in_one_ranks_step_ends_generate(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """The error says which rank and what happened. The place in the code is only logged."""
    execute = ModelRunner.execute

    def fail(self: ModelRunner, plan: StepPlan) -> object:
        if self.state.tp.rank == 1 and plan.num_decode:
            raise error
        return execute(self, plan)

    monkeypatch.setattr(ModelRunner, "execute", fail)
    with LLM(str(checkpoint), device="cpu", ranks="threads", tp_size=4, dcp_size=2) as llm:
        with (
            within_seconds(),
            pytest.raises(EngineDeadError, match=f"^{re.escape(f'rank 1: {error!r}')}$"),
        ):
            llm.generate([[5, 6, 7], [8, 9]], ENDLESS)
        assert "rank 1 has failed" in caplog.text and "in fail\n    raise error" in caplog.text
        assert not [t.name for t in threading.enumerate() if t.name.startswith("rank ")]
        with pytest.raises(EngineDeadError, match="boom"):
            llm.generate([5], GREEDY)


@needs_proc
def test_a_rank_that_is_killed_ends_the_loading(checkpoint: Path) -> None:
    def kill() -> None:
        wait_until(lambda: len(children_of(os.getpid())) == 2, 30, "no processes have been started")
        os.kill(children_of(os.getpid())[1], signal.SIGKILL)

    with ThreadPoolExecutor(1) as thread:
        killed = thread.submit(kill)
        with within_seconds(), pytest.raises(EngineDeadError, match="rank 1: its process ended"):
            LLM(str(checkpoint), device="cpu", ranks="processes", tp_size=2)
        killed.result()
    assert children_of(os.getpid()) == []


def at_once(*calls: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


@needs_proc
def test_two_engines_at_once(checkpoint: Path) -> None:
    """Two engines start and run at the same time. One keeps working when the other is closed."""
    prompts = [[5, 6, 7], [8, 9], list(range(2, 100))]

    def start() -> LLM:
        return LLM(str(checkpoint), device="cpu", ranks="processes", tp_size=2, dcp_size=2)

    def complete(llm: LLM) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]

    with LLM(str(checkpoint), device="cpu", ranks="threads") as alone:
        expected = complete(alone)
    one, other = at_once(start, start)
    with one, other:
        assert len(children_of(os.getpid())) == 4
        assert at_once(lambda: complete(one), lambda: complete(other)) == [expected, expected]
        one.close()
        assert complete(other) == expected
        with pytest.raises(EngineDeadError, match="closed"):
            complete(one)
    assert children_of(os.getpid()) == []
