"""How ranks that are processes meet: torchrun's control connections, and who else could connect."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist
from checkpoints import make_checkpoint
from servers import wait_until
from test_faults import children_of, needs_proc

from minidcp import LLM
from minidcp.engine import control, executor
from minidcp.engine.control import CONTROL_KEY, accept_ranks, connect_to_driver
from minidcp.engine.executor import EngineDeadError, host_store

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", HOST)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def find_port(store: dist.Store) -> int:
    wait_until(lambda: store.check([CONTROL_KEY]), 5, "the driver does not listen")
    return int(store.get(CONTROL_KEY).split()[0])


def test_ranks_get_through_among_strangers(threads: ThreadPoolExecutor) -> None:
    store = dist.HashStore()
    driver = threads.submit(accept_ranks, store, HOST, 4, 20.0)
    port = find_port(store)
    silent = [socket.create_connection((HOST, port)) for _ in range(3)]
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x14" + b"x" * 20, b"\xff" * 100):
        with socket.create_connection((HOST, port)) as stranger:
            stranger.sendall(noise)
    ranks = [threads.submit(connect_to_driver, store, HOST, rank) for rank in (3, 1, 2)]
    ends = {rank: future.result(10) for rank, future in zip((3, 1, 2), ranks, strict=True)}

    connections = driver.result(10)
    assert sorted(connections) == [1, 2, 3]
    for rank, connection in connections.items():
        connection.send(("load", rank))
        assert ends[rank].recv() == ("load", rank)
        with socket.socket(fileno=os.dup(connection.fileno())) as line:
            assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert line.getsockname()[0] == HOST
    assert not store.check([CONTROL_KEY])  # the key is gone, and nobody listens any more
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port))
    for stranger in silent:
        stranger.close()


def test_an_established_connection_may_be_silent_for_long(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the handshake has a time limit."""
    monkeypatch.setattr(control, "HANDSHAKE_SECONDS", 1)
    store = dist.HashStore()
    driver = threads.submit(accept_ranks, store, HOST, 2, 20.0)
    rank_end = connect_to_driver(store, HOST, 1)
    driver_end = driver.result(10)[1]

    def receive_late(connection: Connection, peer: Connection) -> object:
        received = threads.submit(connection.recv)
        time.sleep(1.5)
        assert not received.done()
        peer.send("late")
        return received.result(5)

    assert receive_late(rank_end, driver_end) == "late"


def test_ranks_that_are_missing_are_named(threads: ThreadPoolExecutor) -> None:
    store = dist.HashStore()
    driver = threads.submit(accept_ranks, store, HOST, 4, 1.0)
    rank_end = connect_to_driver(store, HOST, 2)
    message = r"^rank 1, 3: did not connect to 127.0.0.1:\d+ within 1 s"
    with pytest.raises(TimeoutError, match=message):
        driver.result(10)
    with pytest.raises(EOFError):  # rank 2 does not wait for ever
        rank_end.recv()
    assert not store.check([CONTROL_KEY])


def test_a_rank_comes_only_once_and_must_exist(threads: ThreadPoolExecutor) -> None:
    store = dist.HashStore()
    driver = threads.submit(accept_ranks, store, HOST, 3, 20.0)
    first = connect_to_driver(store, HOST, 1)
    for wrong in (1, 0, 3):
        refused = connect_to_driver(store, HOST, wrong)
        with pytest.raises(EOFError):
            refused.recv()
    second = connect_to_driver(store, HOST, 2)
    for rank, connection in driver.result(10).items():
        connection.send(rank)
    assert (first.recv(), second.recv()) == (1, 2)


def test_a_rank_does_not_listen_to_an_impostor(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has not the key cannot send a rank its pickles; nor can silence hold it up."""
    monkeypatch.setattr(control, "HANDSHAKE_SECONDS", 1)
    store = dist.HashStore()
    threads.submit(accept_ranks, store, HOST, 2, 2.0)
    port = find_port(store)
    store.set(CONTROL_KEY, f"{port} {bytes(32).hex()}")
    with pytest.raises(ConnectionError, match=r"rank 1: cannot connect to 127\.0\.0\.1"):
        connect_to_driver(store, HOST, 1)
    with socket.create_server((HOST, 0)) as silent:
        store.set(CONTROL_KEY, f"{silent.getsockname()[1]} {bytes(32).hex()}")
        with pytest.raises(ConnectionError, match=r"rank 1: cannot connect to 127\.0\.0\.1"):
            connect_to_driver(store, HOST, 1)


def test_an_address_of_another_node_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"MASTER_ADDR '192\.0\.2\.77': rank 0 cannot"):
        accept_ranks(dist.HashStore(), "192.0.2.77", 2, 1.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("control")
    make_checkpoint(path, "v2")
    return path


def test_a_rank_that_never_comes_ends_the_start(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's rank 1 is lost before it connects."""
    store = host_store()  # as torchrun's agent has one
    monkeypatch.setattr(executor, "accept_ranks", partial(accept_ranks, seconds=0.5))
    torchrun = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_PORT=store.port)
    for name, value in torchrun.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    with pytest.raises(EngineDeadError, match=r"^rank 1: did not connect to 127\.0\.0\.1"):
        LLM(str(checkpoint), device="cpu", tp_size=2)
    assert not any(thread.name == "rank 0" for thread in threading.enumerate())


def listening_addresses(pids: list[int]) -> set[str]:
    """Addresses on which these processes listen, as `ss` knows them."""
    output = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    addresses = set()
    for line in output.splitlines():
        if any(f"pid={pid}," in line for pid in pids):
            addresses.add(line.split()[3])
    return addresses


def has(command: str) -> bool:
    return any(Path(folder, command).exists() for folder in os.environ["PATH"].split(os.pathsep))


@pytest.mark.skipif(not has("ss"), reason="needs ss")
def test_sigterm_ends_a_rank_that_waits_for_the_driver(checkpoint: Path) -> None:
    """It waits in torch's store, where no signal handler of Python's can run."""
    store = host_store()
    torchrun = dict(RANK=1, LOCAL_RANK=1, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_PORT=store.port)
    env = {name: str(value) for name, value in torchrun.items()}
    command = [sys.executable, "-m", "minidcp", "serve", str(checkpoint), "--tp-size", "2"]
    rank = subprocess.Popen(
        [*command, "--device", "cpu"], env=os.environ | env | {"TORCHELASTIC_RUN_ID": "test"}
    )

    def is_connected() -> bool:
        list_clients = ["ss", "-Htnp", "dport", "=", f":{store.port}"]
        clients = subprocess.run(list_clients, capture_output=True, text=True, check=True).stdout
        return f"pid={rank.pid}," in clients

    try:
        wait_until(is_connected, 60, "the rank has not found the store")
        rank.terminate()
        assert rank.wait(20) == -signal.SIGTERM
    finally:
        rank.kill()


@needs_proc
@pytest.mark.skipif(not has("ss"), reason="needs ss")
def test_our_own_processes_listen_on_loopback_only(checkpoint: Path) -> None:
    before = listening_addresses([os.getpid()])
    with LLM(str(checkpoint), device="cpu", ranks="processes", tp_size=2, dcp_size=2):
        pids = [os.getpid(), *children_of(os.getpid())]
        addresses = listening_addresses(pids) - before
    assert len(addresses) >= 3  # the store, and Gloo's of both ranks
    assert {address.rpartition(":")[0] for address in addresses} == {HOST}
