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
from multiprocessing.connection import Client, Connection, Listener, Pipe
from typing import NoReturn

import torch.distributed as dist

from minidcp.batch import StepPlan
from minidcp.config import EngineConfig, ModelConfig
from minidcp.engine.model_runner import StepResult
from minidcp.engine.worker import Command, Failed, InitCache, Ready, Report, run_rank, serve_connection
from minidcp.parallel.state import build_thread_states, init_process_state

STOP_SECONDS = 5.0  # for ranks to leave by themselves before they are killed


class EngineDeadError(RuntimeError):
    """A rank ended; every request in flight is lost and the engine takes no more."""


class Executor(ABC):
    """The driver's end of all ranks. Steps are answered in the order they were submitted."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig) -> None:
        self.config, self.model_config = config, model_config
        self.reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self.held: deque[Report] = deque()  # taken from `reports`, but not yet asked for
        self.failure: str | None = None

    @abstractmethod
    def send(self, command: Command) -> None:
        """Hand a command to every rank."""

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
        self.inboxes: list[queue.SimpleQueue[Command]] = [queue.SimpleQueue() for _ in states]

        def run(rank: int) -> None:
            get = self.inboxes[rank].get
            if not run_rank(rank, config, model_config, lambda _: states[rank], get, self.reports.put):
                self.break_barriers()

        ranks = range(config.tp_size)
        self.threads = [threading.Thread(target=run, args=(r,), name=f"rank {r}", daemon=True) for r in ranks]
        for thread in self.threads:
            thread.start()

    def break_barriers(self) -> None:
        for rendezvous in self.rendezvous:
            rendezvous.barrier.abort()

    def send(self, command: Command) -> None:
        for inbox in self.inboxes:
            inbox.put(command)

    def stop(self, kill: bool) -> None:
        if kill:
            self.break_barriers()
        self.send(None)
        for thread in self.threads:
            thread.join(STOP_SECONDS)


class ConnectedExecutor(Executor):
    """Ranks at the other end of connections, each read by a thread; a closed one means a dead rank."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig) -> None:
        super().__init__(config, model_config)
        self.connections: dict[int, Connection] = {}

    def connect(self, rank: int, connection: Connection) -> None:
        self.connections[rank] = connection
        connection.send((self.config, self.model_config))

        def read() -> None:
            try:
                report: Report = (rank, Ready())
                while not isinstance(report[1], Failed):
                    report = connection.recv()
                    self.reports.put(report)
            except (EOFError, OSError):
                self.reports.put((rank, Failed(self.describe_end(rank), died=True)))
            except Exception as error:
                self.reports.put(
                    (rank, Failed(f"rank {rank}: its report cannot be read ({error!r})", died=True))
                )

        threading.Thread(target=read, name=f"reports of rank {rank}", daemon=True).start()

    def describe_end(self, rank: int) -> str:
        return f"rank {rank}: its process ended"

    def send(self, command: Command) -> None:
        for connection in self.connections.values():
            with contextlib.suppress(OSError):  # the connection's reader reports the end
                connection.send(command)


class ProcessExecutor(ConnectedExecutor):
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
        for connection in self.connections.values():
            connection.close()


class TorchrunExecutor(ConnectedExecutor):
    """Ranks are torchrun's: this process is the driver and, in a thread, rank 0; the others connect here."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig) -> None:
        super().__init__(config, model_config)
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        store, size = rendezvous_store(), config.tp_size
        key = os.urandom(32)
        with Listener((os.environ["MASTER_ADDR"], 0), backlog=size, authkey=key) as listener:
            store.set("minidcp/control", f"{listener.address[1]} {key.hex()}")

            def run() -> None:
                run_rank(
                    0,
                    config,
                    model_config,
                    lambda device: init_process_state(config.parallel, config.comm, device),
                    self.inbox.get,
                    self.reports.put,
                )

            self.thread = threading.Thread(target=run, name="rank 0", daemon=True)
            self.thread.start()
            for _ in range(size - 1):
                connection = listener.accept()
                self.connect(connection.recv(), connection)

    def send(self, command: Command) -> None:
        super().send(command)
        self.inbox.put(command)

    def stop(self, kill: bool) -> None:
        if not kill:
            self.send(None)
            self.thread.join(STOP_SECONDS)
        for connection in self.connections.values():
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
    code = serve_connection(connection, rank)
    sys.stdout.flush()
    os._exit(code)


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
