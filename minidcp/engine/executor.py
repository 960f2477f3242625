"""The ranks as the driver sees them: start them, send every one the same commands, hear reports.

Three ways to have ranks: threads of this process, processes started here, processes started by
torchrun. What a rank does is in `worker.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, Pipe
from multiprocessing.reduction import ForkingPickler
from typing import NoReturn

import torch.distributed as dist

from minidcp.batch import StepPlan
from minidcp.config import EngineConfig
from minidcp.engine.model_runner import StepResult
from minidcp.engine.worker import (
    Command,
    Failed,
    InitCache,
    Join,
    Ready,
    join_processes,
    serve_and_exit,
    serve_rank,
)
from minidcp.model_config import ModelConfig
from minidcp.parallel.state import build_thread_states

Report = Ready | StepResult | Failed
STOP_SECONDS = 5.0  # for ranks to leave by themselves before they are killed


class EngineDeadError(RuntimeError):
    """A rank ended; every request in flight is lost and the engine takes no more."""


class Executor(ABC):
    """The driver's end of all ranks: a connection to each, which a thread reads; a closed one means a dead
    rank. Steps are answered in the order they were submitted."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig) -> None:
        self.config, self.model_config = config, model_config
        self.connections: list[Connection] = []
        self.reports: queue.SimpleQueue[tuple[int, Report]] = queue.SimpleQueue()
        self.held: deque[tuple[int, Report]] = deque()  # taken from `reports`, but not yet asked for
        self.failure: str | None = None

    def connect(self, rank: int, connection: Connection) -> None:
        self.connections.append(connection)
        connection.send((self.config, self.model_config))

        def read() -> None:
            report: Report | None = None
            try:
                with connection:
                    while not isinstance(report, Failed):
                        report = connection.recv()
                        self.reports.put((rank, report))
            except (EOFError, OSError):
                self.reports.put((rank, Failed(self.describe_end(rank), died=True)))
            except Exception as error:
                reason = f"rank {rank}: its report cannot be read ({error!r})"
                self.reports.put((rank, Failed(reason, died=True)))

        threading.Thread(target=read, name=f"reports of rank {rank}", daemon=True).start()

    def start_thread(self, rank: int, join: Join, after: Callable[[bool], None]) -> threading.Thread:
        """Have rank `rank` in a thread of this process; at its end, `after` hears whether all was well."""
        ours, theirs = Pipe()

        def run() -> None:
            with theirs:
                after(serve_rank(rank, theirs, join, own_process=False))

        thread = threading.Thread(target=run, name=f"rank {rank}", daemon=True)
        thread.start()
        self.connect(rank, ours)
        return thread

    def describe_end(self, rank: int) -> str:
        return f"rank {rank}: its process ended"

    def send(self, command: Command) -> None:
        """Hand a command to every rank."""
        message = ForkingPickler.dumps(command)
        for connection in self.connections:
            with contextlib.suppress(OSError):  # the connection's reader reports the end
                connection.send_bytes(message)

    @abstractmethod
    def stop(self, kill: bool) -> None:
        """End every rank: politely, or at once because one has failed."""

    def submit(self, plan: StepPlan) -> None:
        self.check()
        self.send(plan)

    def collect(self) -> StepResult:
        """The result of the oldest step not collected yet.

        Raises:
            EngineDeadError: a rank ended.
        """
        self.check()
        _, report = self.held.popleft() if self.held else self.reports.get()
        if isinstance(report, Failed):
            self.fail(report)
        assert isinstance(report, StepResult)
        return report

    def wait_ready(self) -> list[Ready]:
        """One Ready per rank.

        Raises:
            ValueError: the ranks found the checkpoint or the configuration wrong.
            EngineDeadError: a rank ended.
        """
        ready: dict[int, Ready] = {}
        while len(ready) < self.config.tp_size:
            rank, report = self.reports.get()
            if isinstance(report, Failed):
                self.fail(report)
            assert isinstance(report, Ready)
            ready[rank] = report
        return [ready[rank] for rank in sorted(ready)]

    def init_cache(self, num_blocks: int) -> None:
        self.send(InitCache(num_blocks))
        self.wait_ready()

    def check(self) -> None:
        """Raise EngineDeadError if a rank has ended; for moments when no result is awaited."""
        if self.failure is not None:
            raise EngineDeadError(self.failure)
        while not self.reports.empty():
            item = self.reports.get()
            if isinstance(item[1], Failed):
                self.fail(item[1])
            self.held.append(item)

    def fail(self, first: Failed) -> NoReturn:
        """One rank's end makes its peers fail too: find the cause among the reports, end all, raise."""
        failures = [first]
        deadline = time.monotonic() + 1.0
        while not any(f.died or f.user_error for f in failures) and (left := deadline - time.monotonic()) > 0:
            try:
                _, report = self.reports.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(report, Failed):
                failures.append(report)
        cause = next((f for f in failures if f.died or f.user_error), first)
        self.failure = cause.reason
        self.stop(kill=True)
        if cause.user_error:
            raise ValueError(cause.reason)
        raise EngineDeadError(cause.reason)

    def close(self) -> None:
        if self.failure is None:
            self.failure = "the engine is closed"
            self.stop(kill=False)


class ThreadExecutor(Executor):
    """Ranks are threads: for the CPU. One that fails breaks the barriers its peers wait at."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig) -> None:
        super().__init__(config, model_config)
        states, self.rendezvous = build_thread_states(config.parallel)
        self.threads = [
            self.start_thread(rank, lambda _, __, state=state: state, self.after)  # type: ignore[misc]
            for rank, state in enumerate(states)
        ]

    def after(self, ok: bool) -> None:
        if not ok:
            for rendezvous in self.rendezvous:
                rendezvous.barrier.abort()

    def stop(self, kill: bool) -> None:
        self.after(not kill)
        self.send(None)
        for thread in self.threads:
            thread.join(STOP_SECONDS)


class ProcessExecutor(Executor):
    """Ranks are processes of this machine, started here; they end when this process does, however it ends."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig) -> None:
        super().__init__(config, model_config)
        size = config.tp_size
        # As torchrun's agent does: host the store, and let the ranks find it in their environment. The
        # operating system picks the port.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(size):
            ours, theirs = Pipe()
            env = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "GLOO_SOCKET_IFNAME": "lo",
                "MINIDCP_LOG_LEVEL": str(logging.getLogger("minidcp").getEffectiveLevel()),
            }
            start = "from minidcp.engine.worker import main; main()"
            command = [sys.executable, "-c", start, str(theirs.fileno())]
            self.processes[rank] = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()])
            theirs.close()
            self.connect(rank, ours)

    def describe_end(self, rank: int) -> str:
        try:
            code: object = self.processes[rank].wait(1.0)
        except subprocess.TimeoutExpired:
            code = "unknown"
        return f"rank {rank}: its process ended (exit code {code})"

    def stop(self, kill: bool) -> None:
        if not kill:
            self.send(None)
        deadline = time.monotonic() + (0 if kill else STOP_SECONDS)
        for process in self.processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for connection in self.connections:
            connection.close()


class TorchrunExecutor(Executor):
    """Ranks are torchrun's: this process is the driver and, in a thread, rank 0; the others connect here."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig) -> None:
        super().__init__(config, model_config)
        store, size = rendezvous_store(), config.tp_size
        key = os.urandom(32)
        with Listener((os.environ["MASTER_ADDR"], 0), backlog=size, authkey=key) as listener:
            store.set("minidcp/control", f"{listener.address[1]} {key.hex()}")
            self.thread = self.start_thread(0, join_processes, lambda _: None)
            for _ in range(size - 1):
                connection = listener.accept()
                self.connect(connection.recv(), connection)

    def stop(self, kill: bool) -> None:
        if not kill:
            self.send(None)
            self.thread.join(STOP_SECONDS)
        for connection in self.connections:
            connection.close()  # ends its process, whatever that waits for


def rendezvous_store() -> dist.Store:
    """torchrun's store, under a prefix of our own."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore("minidcp", dist.TCPStore(host, port, is_master=False))


def serve_torchrun_rank() -> NoReturn:
    """Be one of torchrun's ranks other than 0 until the driver ends; this process ends with it."""
    port, key = rendezvous_store().get("minidcp/control").decode().split()
    connection = Client((os.environ["MASTER_ADDR"], int(port)), authkey=bytes.fromhex(key))
    rank = int(os.environ["RANK"])
    connection.send(rank)
    serve_and_exit(rank, connection)


def is_driver() -> bool:
    """False in torchrun's processes other than rank 0: those serve as ranks, and do nothing else."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def start_executor(config: EngineConfig, model_config: ModelConfig) -> Executor:
    """Start the ranks as `config.ranks` says. Under torchrun, ranks other than 0 do not return."""
    if config.ranks == "threads":
        return ThreadExecutor(config, model_config)
    if config.ranks == "processes":
        return ProcessExecutor(config, model_config)
    if not is_driver():
        serve_torchrun_rank()
    return TorchrunExecutor(config, model_config)
