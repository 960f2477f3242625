"""The ranks as the driver sees them: start them, send every one the same commands, hear reports. They are threads of
this process, processes started here, or torchrun's. What a rank does is in `worker.py`."""

import contextlib
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Client, Connection, Listener, Pipe
from multiprocessing.reduction import ForkingPickler
from typing import NoReturn, TypeVar

import torch.distributed as dist

from minidcp.config import EngineConfig
from minidcp.engine.model_runner import StepResult
from minidcp.engine.worker import Command, Failed, Ready, serve_and_exit, serve_rank
from minidcp.model_config import ModelConfig
from minidcp.parallel.state import ParallelState, build_thread_states

R = TypeVar("R", Ready, StepResult)
STOP_SECONDS = 5.0  # for ranks to leave by themselves before they are killed


class EngineDeadError(RuntimeError):
    """A rank ended; every request in flight is lost and the engine takes no more."""


class Executor:
    """The driver's end of all ranks: a connection to each, which a thread reads; a closed one means a dead rank.
    Steps are answered in the order they were submitted. Under torchrun, ranks other than 0 do not return."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig) -> None:
        self.config, self.model_config = config, model_config
        self.connections: list[Connection] = []
        self.reports: queue.SimpleQueue[Ready | StepResult | Failed] = queue.SimpleQueue()
        self.failures: queue.SimpleQueue[Failed] = queue.SimpleQueue()  # once more, to be seen before their turn
        self.failure: str | None = None
        self.threads: list[threading.Thread] = []  # that are ranks
        self.barriers: list[threading.Barrier] = []  # at which they wait for each other
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        starts = {"threads": self.start_threads, "processes": self.start_processes, "torchrun": self.accept_torchrun}
        starts[config.ranks]()

    def start_threads(self) -> None:
        """For the CPU. A rank that fails breaks the barriers its peers wait at."""
        states, self.barriers = build_thread_states(self.config.tp_size, self.config.dcp_size)
        for rank, state in enumerate(states):
            self.start_thread(rank, state)

    def start_processes(self) -> None:
        """On this machine; they end when this process does, however it ends."""
        # As torchrun's agent does: host the store (the system picks the port); the ranks find it in their environment.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        level = logging.getLogger("minidcp").getEffectiveLevel()
        for rank in range(self.config.tp_size):
            ours, theirs = Pipe()
            env = os.environ | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.config.tp_size))
            env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.store.port), TORCHELASTIC_USE_AGENT_STORE="True")
            env |= dict(GLOO_SOCKET_IFNAME="lo", MINIDCP_LOG_LEVEL=str(level))
            start = "from minidcp.engine.worker import main; main()"
            command = [sys.executable, "-c", start, str(theirs.fileno())]
            self.processes[rank] = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()])
            theirs.close()
            self.connect(rank, ours)

    def accept_torchrun(self) -> None:
        """Rank 0's process is the driver and, in a thread, a rank; the others serve it, and end when it does."""
        host, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
        store = dist.PrefixStore("minidcp", dist.TCPStore(host, port, is_master=False))  # torchrun's
        if not is_driver():
            control, secret = store.get("minidcp/control").decode().split()
            connection = Client((host, int(control)), authkey=bytes.fromhex(secret))
            connection.send(rank)
            serve_and_exit(rank, connection)
        size, key = self.config.tp_size, os.urandom(32)
        with Listener((host, 0), backlog=size, authkey=key) as listener:
            store.set("minidcp/control", f"{listener.address[1]} {key.hex()}")
            self.start_thread(0)
            for _ in range(size - 1):
                connection = listener.accept()
                self.connect(connection.recv(), connection)

    def start_thread(self, rank: int, state: ParallelState | None = None) -> None:
        """Have rank `rank` in a thread of this process; without a state it joins other processes."""
        ours, theirs = Pipe()

        def run() -> None:
            with theirs:
                if not serve_rank(rank, theirs, state, own_process=False):
                    for barrier in self.barriers:
                        barrier.abort()

        self.threads.append(threading.Thread(target=run, name=f"rank {rank}", daemon=True))
        self.threads[-1].start()
        self.connect(rank, ours)

    def connect(self, rank: int, connection: Connection) -> None:
        self.connections.append(connection)
        connection.send((self.config, self.model_config))

        def read() -> None:
            try:
                with connection:
                    while not isinstance(report := connection.recv(), Failed):
                        self.reports.put(report)
            except (EOFError, OSError):
                code = "unknown"
                with contextlib.suppress(KeyError, subprocess.TimeoutExpired):  # it is not ours, or has not ended yet
                    code = str(self.processes[rank].wait(1.0))
                report = Failed(f"rank {rank}: its process ended (exit code {code})", died=True)
            except Exception as error:
                report = Failed(f"rank {rank}: its report cannot be read ({error!r})", died=True)
            self.failures.put(report)
            self.reports.put(report)

        threading.Thread(target=read, name=f"reports of rank {rank}", daemon=True).start()

    def send(self, command: Command) -> None:
        message = ForkingPickler.dumps(command)
        for connection in self.connections:
            with contextlib.suppress(OSError):  # the connection's reader reports the end
                connection.send_bytes(message)

    def receive(self, kind: type[R]) -> R:
        """The oldest report not received yet, unless a rank has ended."""
        report = self.reports.get()
        if isinstance(report, Failed):
            self.fail()
        assert isinstance(report, kind)
        return report

    def wait_ready(self) -> list[Ready]:
        """One Ready per rank. ValueError: they found the checkpoint or an option wrong; EngineDeadError: one ended."""
        return [self.receive(Ready) for _ in range(self.config.tp_size)]

    def submit(self, command: Command) -> None:
        """Hand a command to every rank, unless one has ended."""
        self.check()
        self.send(command)

    def collect(self) -> StepResult:
        """The result of the oldest step not collected yet. Raises EngineDeadError if a rank ended."""
        self.check()
        return self.receive(StepResult)

    def check(self) -> None:
        """Raise EngineDeadError if a rank has ended."""
        if self.failure is not None:
            raise EngineDeadError(self.failure)
        if not self.failures.empty():
            self.fail()

    def fail(self) -> NoReturn:
        """One rank's end makes its peers fail too: find the cause among their reports, end all, raise."""
        first = cause = self.failures.get()
        deadline = time.monotonic() + 1.0
        while not (cause.died or cause.user_error):
            try:
                cause = self.failures.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                cause = first
                break
        self.failure = cause.reason
        self.stop(kill=True)
        if cause.user_error:
            raise ValueError(cause.reason)
        raise EngineDeadError(cause.reason)

    def close(self) -> None:
        if self.failure is None:
            self.failure = "the engine is closed"
            self.stop(kill=False)

    def stop(self, kill: bool) -> None:
        """End every rank: politely, or at once because one has failed."""
        for barrier in self.barriers if kill else ():
            barrier.abort()
        if not kill or self.config.ranks == "threads":  # which cannot be killed
            self.send(None)
            for thread in self.threads:
                thread.join(STOP_SECONDS)
        deadline = time.monotonic() + (0 if kill else STOP_SECONDS)
        for process in self.processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for connection in self.connections if self.config.ranks == "torchrun" else ():
            # Ends its process, whatever that waits for. To close it is its reader's, which may be about to.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)


def is_driver() -> bool:
    """False in torchrun's processes other than rank 0: those serve as ranks, and do nothing else."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
