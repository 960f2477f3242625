"""One rank: receives commands, runs steps, reports results. It works the same in a thread of the
driver, in a process started by `engine/executor.py`, and in one started by torchrun. What a step
does is in `model_runner.py`. Next: `engine/scheduler.py`."""

import contextlib
import logging
import os
import platform
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NoReturn

import torch

from minidcp.batch import StepPlan, StepResult
from minidcp.console import drain, exit_at_once, protect_stderr, protect_stdout
from minidcp.model_config import ModelConfig
from minidcp.models.weights import find_model
from minidcp.parallel.state import ParallelState, init_process_state
from minidcp.resolve import ResolvedConfig
from minidcp.worker.model_runner import ModelRunner, describe_exchange
from minidcp.worker.pending import PendingResult

logger = logging.getLogger("minidcp")


@dataclass(frozen=True)
class Setup:
    """What a rank runs, by the names that its log has."""

    attention: str  # the back-end
    groups: str  # the class of its collectives: ThreadGroup, TorchGroup or SymmetricGroup
    exchange: str
    graph_sizes: tuple[int, ...]  # of the CUDA graphs, in tokens; without graphs none


@dataclass(frozen=True)
class Ready:
    """The last command is done: the model is loaded, or the cache is allocated."""

    kv_bytes: int = 0  # memory for this rank's cache
    bytes_read: int = 0  # of weights
    setup: Setup | None = None  # once the cache is allocated


@dataclass(frozen=True)
class Failed:
    """A rank ended."""

    reason: str
    user_error: bool = False  # the reason is the message of a ValueError: an option is wrong
    died: bool = False  # the rank could not say itself what happened


# What the driver sends: run a step; allocate so many cache blocks (answered by Ready); stop.
Command = StepPlan | int | None
Report = Ready | StepResult | Failed


def serve_rank(
    rank: int,
    connection: Connection,
    state: ParallelState | None = None,
    own_process: bool = True,
    model: str = "",
) -> bool:
    """Serve the driver at the other end of the connection as rank `rank`, until told to stop.

    `Executor.start_thread` calls it in a thread, with own_process False. `serve_and_exit` calls it
    as all that a process does. Without a `state` the rank joins the other ranks' processes. The
    driver's first message is (ResolvedConfig, ModelConfig). `model`, if given, is fetched from the
    hub first: the driver has done that only for its own node.

    Returns False if something failed here; that has been logged and reported.
    """
    config, model_config = connection.recv()
    receive = connection.recv
    if own_process:
        receive = watch(connection)
        leave_signals_to_driver()
    sending = threading.Lock()  # on a GPU results come from a thread of their own

    def report(message: Report) -> None:
        with sending, contextlib.suppress(OSError):  # `watch` notices that the driver is gone
            connection.send(message)

    is_loading = True
    try:
        if model:
            fetch_model(model, rank)
        runner = build_runner(config, model_config, rank, state)
        report(Ready(runner.measure_kv_bytes(), runner.bytes_read))
        is_loading = False
        serve_commands(rank, runner, receive, report)
    except threading.BrokenBarrierError:  # another thread has failed, and it says why
        while receive() is not None:
            pass
    except Exception as error:
        # Once it is loaded, a ValueError is a defect of ours too: requests are checked before.
        if is_loading and isinstance(error, ValueError):
            report(Failed(str(error), user_error=True))
        else:
            log_failure(rank)
            report(Failed(f"rank {rank}: {error!r}"))
        return False
    return True


def fetch_model(model: str, rank: int) -> None:
    """Download a model of the hub to this node. Raises ValueError if it is not to be had here."""
    try:
        find_model(model)
    except ValueError as error:
        raise ValueError(f"rank {rank} on {platform.node()}: {error}") from None


def build_runner(
    config: ResolvedConfig, model_config: ModelConfig, rank: int, state: ParallelState | None
) -> ModelRunner:
    """Join the other ranks and load the model. Raises ValueError if the user chose wrong."""
    device = set_up_device(config, rank)
    if state is None:
        state = init_process_state(
            config.tp_size, config.dcp_size, config.comm, config.dcp_comm_backend, device
        )
    return ModelRunner(config, model_config, state, device)


def set_up_device(config: ResolvedConfig, rank: int) -> torch.device:
    """Choose this rank's device and make it torch's default."""
    if config.device == "cpu":
        if config.tp_size > 1:
            # Threads of many ranks on few cores wait for each other: one core's worth per rank.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.tp_size))
        return torch.device("cpu")

    if config.ranks != "threads":
        # The host only starts kernels. Threads would wait for each other: with 64 of them planning
        # a step for FlashInfer takes 8 ms instead of 1.
        torch.set_num_threads(1)
    # Ranks beyond the number of GPUs share them, which symmetric memory allows for tests.
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def serve_commands(
    rank: int,
    runner: ModelRunner,
    receive: Callable[[], Command],
    report: Callable[[Report], None],
) -> None:
    """Execute commands in order until told to stop. Only rank 0 reports the results of steps."""
    report_later = None
    if runner.device.type == "cuda":
        report_later = report_from_thread(rank, report)

    while True:
        command = receive()
        if command is None:
            return
        if isinstance(command, int):
            runner.allocate_cache(command)
            report(Ready(setup=describe_setup(runner)))
            continue

        pending = runner.execute(command)
        if report_later is not None:
            report_later(pending)
        elif rank == 0:
            report(pending.wait())


def describe_setup(runner: ModelRunner) -> Setup:
    graphs = runner.graphs
    return Setup(
        attention=runner.attention.name,
        groups=type(runner.state.tp).__name__,
        exchange=describe_exchange(runner.config),
        graph_sizes=tuple(graphs.sizes) if graphs is not None else (),
    )


def report_from_thread(
    rank: int, report: Callable[[Report], None]
) -> Callable[[PendingResult], None]:
    """Start a thread that waits for the device and reports results; returns how to hand it one.

    So the next step can be launched while this one runs. Rank 0 reports the results. The other
    ranks wait for theirs too: only then does a rank learn that its device has failed.
    """
    pending: queue.SimpleQueue[PendingResult] = queue.SimpleQueue()

    def run() -> None:
        try:
            while True:
                result = pending.get().wait()
                if rank == 0:
                    report(result)
        except Exception as error:
            log_failure(rank)
            report(Failed(f"rank {rank}: {error!r}"))

    threading.Thread(target=run, name="results", daemon=True).start()
    return pending.put


def log_failure(rank: int) -> None:
    """Log the exception that is being handled, before the driver hears of it and kills us."""
    logger.exception("rank %d has failed", rank)
    drain()


def leave_signals_to_driver() -> None:
    """Ignore what asks a process to end; `watch` ends this one when the driver does.

    Ctrl-C and SIGTERM reach the whole process group from a terminal, systemd or torchrun. The
    driver needs its ranks to finish what is running.
    """
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def watch(connection: Connection) -> Callable[[], Command]:
    """Read commands in a thread; returns how to get the next one.

    The thread ends this process as soon as the driver is gone, even during a collective.
    """
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def read() -> None:
        told_to_stop = False
        try:
            while True:
                command = connection.recv()
                commands.put(command)
                told_to_stop = command is None
        except (EOFError, OSError):
            # Not sys.exit: the main thread may be waiting for peers.
            os._exit(0 if told_to_stop else 1)

    threading.Thread(target=read, daemon=True).start()
    return commands.get


def main() -> None:
    """The main function of a process that `engine/executor.py` started for a rank.

    Its argument is the file descriptor of the connection, which it has inherited.
    """
    protect_stderr()
    protect_stdout()
    rank = int(os.environ["RANK"])

    # Rank 0 logs for all ranks, at the driver's level. The others log only what goes wrong.
    level = int(os.environ["MINIDCP_LOG_LEVEL"]) if rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    serve_and_exit(rank, Connection(int(sys.argv[1])))


def serve_and_exit(rank: int, connection: Connection, model: str = "") -> NoReturn:
    """Serve as a rank, then end this process."""
    try:
        ok = serve_rank(rank, connection, model=model)
    except (EOFError, OSError):  # the driver has ended before it said what to load
        logger.error("rank %d: the driver has ended", rank)
        ok = False
    exit_at_once(0 if ok else 1)  # without the tear-down of process groups, which waits for peers
