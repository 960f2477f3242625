"""How a server starts and stops: signals to all of its processes, exit codes, output that nobody
takes, and the address that it prints."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkpoints import make_checkpoint
from servers import ONE_THREAD, wait_until
from test_console import needs_dev_full
from test_faults import InFlight, children_of, is_alive, needs_proc

from minidcp_server.listening import find_reachable_host, format_url, listen

MINIDCP = [str(Path(sysconfig.get_path("scripts"), "minidcp"))]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stopping")
    make_checkpoint(path, "v2", max_position_embeddings=8192)
    return path


class Process:
    """`minidcp serve` in a process group of its own."""

    def __init__(self, launcher: list[str], checkpoint: Path, *flags: str, **options: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [*launcher, "serve", str(checkpoint), "--device", "cpu", "--port", str(port)]
        self.process = subprocess.Popen(
            [*command, *flags], start_new_session=True, env=os.environ | ONE_THREAD, **options
        )

    def get_health(self) -> int:
        """The status of /health, or 0 if nobody listens."""
        assert self.process.poll() is None, f"the server ended: {self.process.returncode}"
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code
        except httpx.TransportError:
            return 0

    def wait_until_healthy(self) -> None:
        wait_until(lambda: self.get_health() == 200, 120, "the server is not healthy")

    def signal_group(self, number: int) -> None:
        os.killpg(self.process.pid, number)


@contextmanager
def start(launcher: list[str], checkpoint: Path, *flags: str, **options: Any) -> Iterator[Process]:
    server = Process(launcher, checkpoint, *flags, **options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.signal_group(signal.SIGKILL)
            server.process.wait()


@needs_proc
@pytest.mark.parametrize(
    ("launcher", "code"),
    [
        (MINIDCP, 0),
        # It signals its processes, and exits with 1 after a signal whatever they do.
        ([*TORCHRUN, "-m", "minidcp"], 1),
    ],
    ids=["processes", "torchrun"],
)
def test_running_requests_end_when_every_process_is_signalled(
    checkpoint: Path, launcher: list[str], code: int
) -> None:
    flags = ["--tp-size", "2", "--dcp-size", "2"]
    with start(launcher, checkpoint, *flags, stderr=subprocess.DEVNULL) as server:
        server.wait_until_healthy()
        processes = children_of(server.process.pid)
        assert len(processes) == 2
        # Enough to be seen, and done within the 30 s that torchrun gives its processes.
        requests = InFlight(server.url, max_tokens=250)
        server.signal_group(signal.SIGTERM)

        answer = requests.whole.result(60)
        requests.streamed.result(60)
        assert answer.json()["usage"]["completion_tokens"] == 250
        assert len(requests.lines) == 251 and requests.lines[-1] == "data: [DONE]"
        assert server.process.wait(30) == code
        wait_until(lambda: not any(map(is_alive, processes)), 10, "ranks are left")


@needs_proc
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_server_that_is_loading(checkpoint: Path, number: int, code: int) -> None:
    """The ranks are still importing torch then. They do not outlive the server."""
    with start(MINIDCP, checkpoint, "--tp-size", "2", stdout=subprocess.PIPE) as server:
        wait_until(lambda: server.get_health() == 503, 120, "nobody listens")
        wait_until(lambda: len(children_of(server.process.pid)) == 2, 60, "there are no ranks")
        ranks = children_of(server.process.pid)
        server.process.send_signal(number)
        output, _ = server.process.communicate(timeout=20)  # ranks have the same pipe
        assert b"Serving" not in output
        assert server.process.returncode == code
        wait_until(lambda: not any(map(is_alive, ranks)), 5, "ranks are left")


@needs_dev_full
@pytest.mark.parametrize("sink", ["full disk", "pipe without a reader"])
def test_output_that_nobody_takes_hurts_nobody(checkpoint: Path, sink: str) -> None:
    _, write_end = os.pipe()
    if sink == "full disk":
        write_end = os.open("/dev/full", os.O_WRONLY)
    with start(MINIDCP, checkpoint, stdout=write_end, stderr=write_end) as server:
        server.wait_until_healthy()
        with httpx.Client(base_url=server.url, timeout=20) as client:
            for _ in range(40):  # entries in the access log: more than a pipe holds
                client.get("/health", headers={"x-request-id": "x" * 4000})
            body = dict(prompt=[5, 6, 7], max_tokens=5, ignore_eos=True)
            assert client.post("/v1/completions", json=body).status_code == 200
        server.process.terminate()
        assert server.process.wait(20) == 0


@pytest.mark.parametrize(("host", "family"), [("0.0.0.0", socket.AF_INET), ("::", socket.AF_INET6)])
def test_the_curl_that_is_printed_works_from_other_machines(host: str, family: int) -> None:
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("needs IPv6")
    with listen(host, 0) as listening:
        reachable = find_reachable_host(listening, host)
        assert reachable not in ("0.0.0.0", "::")
        port = listening.getsockname()[1]
        url = httpx.URL(format_url(reachable, port))
        with socket.create_connection((url.host, url.port), 5):
            listening.accept()[0].close()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
            except OSError:
                pytest.skip("this machine has no network")
            assert reachable == probe.getsockname()[0]


def test_the_curl_names_the_host_that_was_given() -> None:
    with listen("127.0.0.1", 0) as listening:
        assert find_reachable_host(listening, "127.0.0.1") == "127.0.0.1"
        assert find_reachable_host(listening, "localhost") == "localhost"
