"""Clients that hold a connection without using it: that read nothing, send nothing, or have sent
all they have to send. They speak through plain sockets to the server that `minidcp serve` runs."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from servers import LONG, Api, Local, wait_until

from minidcp import EngineConfig
from minidcp.config import ServeConfig
from minidcp.engine.engine import LLMEngine
from minidcp.engine.listener import StepListener
from minidcp_server import connection
from minidcp_server.async_engine import AsyncEngine
from minidcp_server.listening import listen
from minidcp_server.serve import Server

pytest_plugins = ["servers"]
SOON = 60  # seconds; how long a state may take to come on a slow machine
SMALL = 4096  # bytes; buffers of sockets


@dataclass
class Running(Local):
    server: Server
    async_engine: AsyncEngine

    @property
    def connections(self) -> set[Any]:
        return self.server.server_state.connections

    def is_sending_paused(self) -> bool:
        return any(item.flow.write_paused for item in list(self.connections))

    def connect(self) -> socket.socket:
        """A client's socket, whose system takes in little that the client does not read."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        client.settimeout(SOON)
        url = self.api.http.base_url
        client.connect((url.host, url.port))
        return client

    def send(self, **fields: object) -> socket.socket:
        """The socket of a client that has sent a request for a completion."""
        client = self.connect()
        client.sendall(write_request(self.api.body([5, 6], **fields)))
        return client


def write_request(body: object) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + content


def read_answer(client: socket.socket) -> bytes:
    """The body of the answer."""
    response = http.client.HTTPResponse(client)
    response.begin()
    assert response.status == 200
    return response.read()


def is_closed(client: socket.socket) -> bool:
    """Whether the server has closed the connection, and all that it sent is read."""
    client.setblocking(False)
    try:
        return client.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@pytest.fixture(scope="module")
def engine(demo: Path) -> Iterator[LLMEngine]:
    engine = LLMEngine(EngineConfig(str(demo), device="cpu", ranks="threads", max_num_seqs=4))
    yield engine
    LLMEngine.close(engine)


@contextmanager
def run_server(engine: LLMEngine, **options: float) -> Iterator[Running]:
    """The server with these options, and an engine that outlives it."""

    def make(listener: StepListener) -> LLMEngine:
        engine.listener = listener
        return engine

    config = ServeConfig(shutdown_timeout=0, max_num_queued_requests=2, **options)
    async_engine = AsyncEngine(make, config, "demo")
    with listen("127.0.0.1", 0) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        server = Server(async_engine)
        server.config.timeout_graceful_shutdown = 1
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listening]))
        thread.start()
        wait_until(lambda: server.started and async_engine.has_loaded, SOON, "it has not started")
        port = listening.getsockname()[1]
        running = Running(engine, Api(f"http://127.0.0.1:{port}", "demo"), server, async_engine)
        try:
            yield running
            wait_until(running.is_idle, SOON, "requests are left")
        finally:
            server.should_exit = True
            thread.join(SOON)
            assert not thread.is_alive()
            engine.abort(*list(engine.requests))  # where a test has failed
            while engine.has_work:
                engine.step()


@pytest.fixture
def running(
    engine: LLMEngine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    monkeypatch.setattr(engine, "close", lambda: None)
    with run_server(engine, **request.param) as running:
        yield running


def with_options(**options: float) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("running", [options], indirect=True, ids=[""])


@with_options(send_timeout=0)
def test_places_are_free_when_requests_end(running: Running) -> None:
    """Six requests fill all places. They end, and nobody reads their answers."""
    with running.send(n=6, max_tokens=100, stream=True, logprobs=20) as client:
        wait_until(lambda: running.is_busy(6), SOON, "they do not run")
        assert running.api.post(running.api.body()).status_code == 503
        wait_until(running.is_idle, SOON, "they do not end")
        wait_until(lambda: not running.async_engine.streams, SOON, "their places are taken")
        assert running.api.complete([5], n=6).usage.completion_tokens == 6 * 16
        assert not is_closed(client)
        client.settimeout(SOON)
        events = read_answer(client).split(b"\n\n")
        assert len(events) == 6 * 100 + 2 and events[-2] == b"data: [DONE]"


@with_options(send_timeout=0, request_timeout=4)
def test_the_timeout_of_requests_that_nobody_reads(running: Running) -> None:
    with running.send(n=4, stream=True, logprobs=20, **LONG):
        wait_until(running.is_sending_paused, SOON, "everything can be sent")
        assert running.is_busy(4)
        wait_until(running.is_idle, SOON, "they do not end")
        assert not running.async_engine.streams


@with_options(send_timeout=0.5)
@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_do_not_read_are_closed_on(running: Running, stream: bool) -> None:
    with running.send(n=2, max_tokens=100, stream=stream, logprobs=20):
        wait_until(lambda: running.is_busy(2), SOON, "they do not run")
        wait_until(lambda: not running.connections, SOON, "the connection is open")
        wait_until(running.is_idle, SOON, "they do not end")


@with_options(send_timeout=0.5)
def test_the_end_of_an_answer_that_is_not_read(running: Running) -> None:
    """The server has written all of it, and waits only for the client."""
    with running.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        wait_until(lambda: running.connections, SOON, "it is not connected")
        wait_until(lambda: not running.connections, SOON, "the connection is open")


@with_options(send_timeout=1)
def test_slow_readers_get_everything(running: Running) -> None:
    with running.send(n=2, max_tokens=100, logprobs=20) as client:
        wait_until(lambda: running.is_busy(2), SOON, "they do not run")
        wait_until(running.is_idle, SOON, "they do not end")
        time.sleep(0.3)
        response = http.client.HTTPResponse(client)
        response.begin()
        content = b""
        start = time.monotonic()
        while time.monotonic() - start < 1.5:  # longer than the timeout
            content += response.read(5000)
            time.sleep(0.05)
        content += response.read()
        assert len(content) == int(response.headers["content-length"])
        logprobs = json.loads(content)["choices"][1]["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == 100


@with_options(receive_timeout=0.5)
@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HT", write_request({})[:-1]])
def test_clients_that_send_no_whole_request_are_closed_on(running: Running, sent: bytes) -> None:
    with running.connect() as client:
        client.sendall(sent)
        wait_until(lambda: running.connections, SOON, "it is not connected")
        wait_until(lambda: is_closed(client), SOON, "the connection is open")
        wait_until(lambda: not running.connections, SOON, "the connection is known")


@with_options(receive_timeout=0.5)
def test_headers_that_trickle_in(running: Running) -> None:
    with running.connect() as client, pytest.raises((BrokenPipeError, ConnectionResetError)):
        client.sendall(b"GET /health HTTP/1.1\r\n")
        for _ in range(200):
            client.sendall(b"X: y\r\n")
            time.sleep(0.1)


@with_options(receive_timeout=0.5)
def test_connections_in_use_stay_open(running: Running) -> None:
    """One is used again and again, and one waits for an answer that takes longer."""
    with running.send(max_tokens=150) as waiting:
        probe = http.client.HTTPConnection("127.0.0.1", running.api.http.base_url.port)
        probe.connect()
        own_port = probe.sock.getsockname()[1]
        for _ in range(8):
            probe.request("GET", "/health")
            assert probe.getresponse().read() == b""
            time.sleep(0.2)
        assert probe.sock.getsockname()[1] == own_port
        probe.close()
        assert json.loads(read_answer(waiting))["usage"]["completion_tokens"] == 150


@with_options(receive_timeout=0.5)
def test_idle_connections_stay_open_for_the_next_request(running: Running) -> None:
    """The time that a request may take to arrive begins with its first byte."""
    probe = http.client.HTTPConnection("127.0.0.1", running.api.http.base_url.port)
    for _ in range(2):
        probe.request("GET", "/health")
        assert probe.getresponse().read() == b""
        time.sleep(1.5)
        assert not is_closed(probe.sock)
        probe.sock.settimeout(SOON)
    probe.sock.sendall(b"GET /health HT")
    wait_until(lambda: is_closed(probe.sock), SOON, "the connection is open")


@with_options(keep_alive_timeout=1)
def test_idle_connections_are_closed_in_the_end(running: Running) -> None:
    probe = http.client.HTTPConnection("127.0.0.1", running.api.http.base_url.port)
    probe.request("GET", "/health")
    assert probe.getresponse().read() == b""
    wait_until(lambda: is_closed(probe.sock), SOON, "the connection is open")
    wait_until(lambda: not running.connections, SOON, "the connection is known")


def test_idle_connections_outlive_those_of_proxies() -> None:
    """Load balancers keep theirs for 60 seconds. Whoever closes first must not be the server."""
    assert ServeConfig().keep_alive_timeout > 60


def test_more_silent_connections_than_there_is_room_for(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest are closed, and none that has a request."""
    monkeypatch.setattr(engine, "close", lambda: None)
    monkeypatch.setattr(connection, "count_descriptors", lambda: 16)
    with run_server(engine) as running, running.send(max_tokens=300) as used:
        silent = [running.connect() for _ in range(30)]
        wait_until(lambda: all(map(is_closed, silent[:15])), SOON, "the oldest are open")
        assert running.api.http.get("/health").status_code == 200
        assert not is_closed(silent[-1])
        assert json.loads(read_answer(used))["usage"]["completion_tokens"] == 300
        for client in silent:
            client.close()


@with_options()
def test_idle_connections_make_room(running: Running) -> None:
    probe = http.client.HTTPConnection("127.0.0.1", running.api.http.base_url.port)
    probe.request("GET", "/health")
    assert probe.getresponse().read() == b""
    (idle,) = running.connections
    wait_until(lambda: idle.wait is not None and idle.wait[0] == connection.IDLE, SOON, "not idle")
    running.async_engine.loop.call_soon_threadsafe(connection.close_idle, [idle], 1)
    wait_until(lambda: is_closed(probe.sock), SOON, "the connection is open")


@with_options()
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("delay", [0, 0.2])
def test_half_closed_connections_get_their_answer(
    running: Running, stream: bool, delay: float
) -> None:
    with running.send(max_tokens=100, stream=stream) as client:
        time.sleep(delay)
        client.shutdown(socket.SHUT_WR)
        content = read_answer(client)
        assert client.recv(1) == b""  # no second request can come
    if stream:
        assert content.count(b"data: {") == 100 and content.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(content)["usage"]["completion_tokens"] == 100


@with_options()
def test_half_closed_without_a_request(running: Running) -> None:
    for sent in (b"", write_request({})[:-1]):
        with running.connect() as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""


@with_options()
@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_free_everything(running: Running, stream: bool) -> None:
    """Four requests run and one waits. All clients leave."""
    before = running.engine.stats.generated_tokens
    clients = [running.send(stream=stream, **LONG) for _ in range(5)]
    wait_until(lambda: running.is_busy(5), SOON, "they do not run")
    for client in reversed(clients):  # first the one that waits
        client.close()
        wait_until(lambda: running.num_unfinished() < len(clients), SOON, "it is still there")
        clients.pop()
    wait_until(running.is_idle, SOON, "they are still there")
    assert running.engine.stats.generated_tokens - before < LONG["max_tokens"]


@with_options()
def test_a_client_of_http_1_0_that_leaves(running: Running) -> None:
    """Proxies speak HTTP/1.0 to servers, and an interim response would confuse them."""
    request = write_request(running.api.body([5, 6], **LONG)).replace(b"HTTP/1.1", b"HTTP/1.0")
    with running.connect() as client:
        client.sendall(request)
        wait_until(lambda: running.is_busy(1), SOON, "it does not run")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    wait_until(running.is_idle, SOON, "it is still there")


@with_options()
def test_pipelined_requests_before_the_half_close(running: Running) -> None:
    requests = [running.api.body([5, n], max_tokens=20) for n in (6, 7)]
    with ThreadPoolExecutor(2) as threads:
        expected = list(threads.map(lambda body: running.api.post(body).json(), requests))
    with running.connect() as client:
        client.sendall(b"".join(map(write_request, requests)))
        client.shutdown(socket.SHUT_WR)
        content = b""
        while received := client.recv(65536):
            content += received
    texts = [json.dumps(answer["choices"][0]["text"], ensure_ascii=False) for answer in expected]
    first, second = (content.index(text.encode()) for text in texts)
    assert first < second
