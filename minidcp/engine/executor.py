"""The ranks as the driver sees them: start them, send all of them the same commands, hear reports.
What a rank does with a command is in `worker/worker.py`. Next: `engine.py`."""

import atexit
import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler
from typing import NoReturn, TypeVar

import torch.distributed as dist

from minidcp.batch import StepPlan, StepResult
from minidcp.engine.control import accept_ranks, connect_to_driver, find_host, open_store
from minidcp.engine.reports import Reports
from minidcp.engine.threads import join_all, raise_in_thread
from minidcp.machine import under_torchrun
from minidcp.model_config import ModelConfig
from minidcp.parallel.state import ParallelState, build_thread_states
from minidcp.resolve import ResolvedConfig
from minidcp.worker.worker import Command, Failed, Ready, serve_and_exit, serve_rank

R = TypeVar("R", Ready, StepResult)

STOP_SECONDS = 5.0  # how long ranks may take to leave by themselves before they are killed
CLOSED = "the engine is closed"

# What a rank's process runs. Its imports take seconds. Also in that time it leaves signals to the
# driver (`leave_signals_to_driver`), and ends when the driver does.
START_RANK = """
import os, select, signal, sys, threading
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)

def end_with_driver():
    poll = select.poll()
    poll.register(int(sys.argv[1]), 0)  # reports nothing but the end of the connection
    poll.poll()
    os._exit(1)

threading.Thread(target=end_with_driver, daemon=True).start()
from minidcp.worker.worker import main
main()
"""


class EngineDeadError(RuntimeError):
    """A rank ended. Every request in flight is lost, and the engine takes no more."""


class Executor:
    """The driver's end of all ranks, which has one connection to each of them.

        driver                                     every rank
        send ------- StepPlan, int, None --------> serve_commands
        receive <--- Ready, StepResult, Failed --- report

    config.ranks says what ranks are, and so what carries messages and how ranks find each other:

        ranks      connection                       ranks meet
        threads    pipe                             at barriers, in memory
        processes  pipe, inherited by the process   through a store that the driver hosts
        torchrun   socket; a pipe for rank 0        through torchrun's store

    A thread reads each connection. A connection that ends means a dead rank. Steps are answered in
    the order in which they were submitted. Under torchrun only the process of rank 0 has one; the
    others call `serve_torchrun_rank`.
    """

    def __init__(self, config: ResolvedConfig, model_config: ModelConfig) -> None:
        self.config = config
        self.model_config = model_config
        self.connections: list[Connection] = []
        self.reports = Reports()
        self.failure: str | None = None  # why no more commands are taken
        self.sending = threading.Lock()  # `close` may be called while another thread submits

        self.threads: list[threading.Thread] = []  # ranks that are threads
        self.barriers: list[threading.Barrier] = []  # where they wait for each other
        self.processes: dict[int, subprocess.Popen[bytes]] = {}  # ranks that were started here

        self.owner = os.getpid()
        atexit.register(self.close_at_exit)
        try:
            self.start_ranks()
        except BaseException:
            self.close()
            raise

    def start_ranks(self) -> None:
        if self.config.ranks == "threads":
            self.start_threads()
        elif self.config.ranks == "processes":
            self.start_processes()
        else:
            self.accept_torchrun()

    def start_threads(self) -> None:
        """Start ranks as threads of this process, for the CPU.

        A rank that fails breaks the barriers at which its peers wait.
        """
        states, self.barriers = build_thread_states(
            self.config.tp_size, self.config.dcp_size, self.config.dcp_comm_backend
        )
        for rank, state in enumerate(states):
            self.start_thread(rank, state)

    def start_thread(self, rank: int, state: ParallelState | None = None) -> None:
        """Start a rank as a thread of this process. Without a state it joins other processes."""
        own_end, rank_end = Pipe()

        def run() -> None:
            # `end_threads` may raise SystemExit here.
            with rank_end, contextlib.suppress(SystemExit):
                ok = serve_rank(rank, rank_end, state, own_process=False)
                if not ok:
                    self.abort_barriers()

        thread = threading.Thread(target=run, name=f"rank {rank}", daemon=True)
        thread.start()
        self.threads.append(thread)
        self.connect(rank, own_end)

    def start_processes(self) -> None:
        """Start ranks as processes on this machine. They end when this process ends, in any way."""
        # As torchrun's agent does: host the store (the system picks the port). The ranks find it in
        # their environment.
        self.store = host_store()
        for rank in range(self.config.tp_size):
            own_end, rank_end = Pipe()
            process = spawn_rank(rank, self.config.tp_size, self.store.port, rank_end)
            self.processes[rank] = process
            rank_end.close()
            self.connect(rank, own_end)

    def accept_torchrun(self) -> None:
        """Make the processes that torchrun started the ranks.

        This process, that of rank 0, is the driver and, in a thread, rank 0.
        """
        try:
            connections = accept_ranks(open_store(), find_host(), self.config.tp_size)
        except TimeoutError as error:
            raise EngineDeadError(str(error)) from None
        self.start_thread(0)
        for rank, connection in connections.items():
            self.connect(rank, connection)

    def connect(self, rank: int, connection: Connection) -> None:
        """Tell a rank what to load, and start to read what it reports."""
        self.connections.append(connection)
        connection.send((self.config, self.model_config))
        reader = threading.Thread(
            target=self.read_reports,
            args=(rank, connection),
            name=f"reports of rank {rank}",
            daemon=True,
        )
        reader.start()

    def read_reports(self, rank: int, connection: Connection) -> None:
        """Queue a rank's reports until it fails or its connection ends."""
        try:
            with connection:
                report = connection.recv()
                while not isinstance(report, Failed):
                    self.reports.put(report)
                    report = connection.recv()
            failure = report
        except (EOFError, OSError):
            code = self.get_exit_code(rank)
            failure = Failed(f"rank {rank}: its process ended (exit code {code})", died=True)
        except Exception as error:
            failure = Failed(f"rank {rank}: its report cannot be read ({error!r})", died=True)

        self.reports.put(failure)

    def get_exit_code(self, rank: int) -> str:
        if rank not in self.processes:  # it was not started here
            return "unknown"
        try:
            return str(self.processes[rank].wait(1.0))
        except subprocess.TimeoutExpired:  # it has closed the connection and goes on
            return "unknown"

    def wait_ready(self) -> list[Ready]:
        """One Ready per rank.

        Raises ValueError if ranks found the checkpoint or an option wrong, EngineDeadError if one
        ended.
        """
        return [self.receive(Ready) for _ in range(self.config.tp_size)]

    def submit(self, command: Command) -> None:
        """Send a command to every rank. Raises EngineDeadError if one has ended.

        If this is interrupted, the ranks may have different commands, so the engine ends.
        """
        self.check()
        try:
            self.send(command)
        except BaseException as error:
            self.failure = f"a command has not reached every rank ({error!r})"
            self.stop(kill=True)
            raise

    def collect(self, timeout: float = math.inf) -> StepResult:
        """Wait for the result of the oldest step that has not been collected yet.

        Raises EngineDeadError if a rank ended, or if there is no result for `timeout` seconds.
        """
        self.check()
        return self.receive(StepResult, timeout)

    def check(self) -> None:
        """Raise EngineDeadError if a rank has ended."""
        self.check_open()
        if self.reports.has_failure():
            self.fail()

    def check_open(self) -> None:
        if self.failure is not None:
            raise EngineDeadError(self.failure)

    def send(self, command: Command) -> None:
        message = ForkingPickler.dumps(command)
        message_for_others = message
        if isinstance(command, StepPlan) and command.masks:
            message_for_others = ForkingPickler.dumps(command.without_bits())
        if not self.sending.acquire(timeout=STOP_SECONDS):
            return  # `close` finds another thread stuck in here: the ranks can only be killed
        try:
            for rank, connection in enumerate(self.connections):
                with contextlib.suppress(OSError):  # the thread that reads it reports its end
                    connection.send_bytes(message if rank == 0 else message_for_others)
        finally:
            self.sending.release()

    def receive(self, kind: type[R], timeout: float = math.inf) -> R:
        """The oldest report that has not been received yet, unless a rank has ended."""
        report = self.reports.get(timeout)
        if isinstance(report, Failed):
            self.fail()
        assert isinstance(report, kind)
        return report

    def fail(self) -> NoReturn:
        """End all ranks, because one has failed, and raise the cause."""
        self.check_open()  # another thread may have closed it while this one waited
        cause = self.reports.find_cause()
        self.failure = cause.reason
        self.stop(kill=True)
        if cause.user_error:
            raise ValueError(cause.reason)
        raise EngineDeadError(cause.reason)

    def close(self) -> None:
        """End the ranks. Safe to call twice, after a failure, and while another thread waits."""
        if self.failure is None:
            self.failure = CLOSED
            self.reports.put(Failed(self.failure))  # wakes a thread that waits for a result
            self.stop(kill=False)

    def close_at_exit(self) -> None:
        """End ranks that nobody has closed, when the interpreter exits.

        A rank that is a thread, and still computes while the interpreter is torn down, would abort
        the process. So another Ctrl-C must not disturb this.
        """
        if os.getpid() != self.owner:  # a copy of the process that the user has forked
            return
        with contextlib.suppress(ValueError):  # only the main thread may do this
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.failure is None:
            self.failure = CLOSED
        self.stop(kill=False)  # even if `close` was called: then it was interrupted

    def stop(self, kill: bool) -> None:
        """End every rank: politely, or at once because one has failed."""
        if kill:
            self.abort_barriers()
        if not kill or self.config.ranks == "threads":
            self.send(None)
            self.end_threads()

        self.end_processes(0.0 if kill else STOP_SECONDS)
        if self.config.ranks == "torchrun":
            for connection in self.connections:
                shut_down(connection)
        atexit.unregister(self.close_at_exit)

    def end_threads(self) -> None:
        """Wait for the ranks that are threads to end, and make those end that compute too long."""
        join_all(self.threads, STOP_SECONDS)
        if not any(thread.is_alive() for thread in self.threads):
            return
        self.abort_barriers()
        for thread in self.threads:
            raise_in_thread(thread, SystemExit)
        join_all(self.threads, STOP_SECONDS)

    def abort_barriers(self) -> None:
        for barrier in self.barriers:
            barrier.abort()

    def end_processes(self, seconds: float) -> None:
        """Kill the processes that have not ended by themselves after so many seconds."""
        deadline = time.monotonic() + seconds
        for process in self.processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def host_store() -> dist.TCPStore:
    """A store for ranks on this machine. The system picks the port.

    Left to itself the store would listen on every interface, and it asks nobody for a password.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    host, port = listener.getsockname()
    return dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )


def spawn_rank(
    rank: int, world_size: int, store_port: int, connection: Connection
) -> subprocess.Popen[bytes]:
    """Start a process that serves as a rank. It inherits its end of the connection."""
    env = dict(os.environ)
    env["RANK"] = env["LOCAL_RANK"] = str(rank)
    env["WORLD_SIZE"] = str(world_size)
    env["MASTER_ADDR"] = "127.0.0.1"
    env["MASTER_PORT"] = str(store_port)
    env["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # rank 0 is not to host the store
    env["GLOO_SOCKET_IFNAME"] = "lo"
    env["NCCL_SOCKET_IFNAME"] = "=lo"
    env["MINIDCP_LOG_LEVEL"] = str(logging.getLogger("minidcp").getEffectiveLevel())

    descriptor = connection.fileno()
    command = [sys.executable, "-c", START_RANK, str(descriptor)]
    return subprocess.Popen(command, env=env, pass_fds=[descriptor])


def serve_torchrun_rank(model: str) -> NoReturn:
    """Connect to the driver, serve it as this process's rank, and end the process.

    `model` is what the user gave: a name on the hub is downloaded to this node too.
    """
    rank = int(os.environ["RANK"])
    try:
        connection = connect_to_driver(open_store(), find_host(), rank)
    except ConnectionError as error:
        raise SystemExit(f"minidcp: error: {error}") from None
    serve_and_exit(rank, connection, model)


def shut_down(connection: Connection) -> None:
    """End the process at the other end of a socket, whatever it is waiting for.

    Only the thread that reads the connection may close it, and may be about to: hence a duplicate.
    """
    with contextlib.suppress(OSError):
        duplicate = os.dup(connection.fileno())
        with socket.socket(fileno=duplicate) as line:
            line.shutdown(socket.SHUT_RDWR)


def is_driver() -> bool:
    """False in torchrun's processes other than rank 0: they serve as ranks and do nothing else."""
    return not under_torchrun() or os.environ["RANK"] == "0"
