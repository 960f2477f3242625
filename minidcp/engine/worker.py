"""One rank: receives commands, runs steps, reports. The same in threads, in processes of ours and torchrun's."""

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NoReturn

import torch

from minidcp.batch import StepPlan
from minidcp.engine.model_runner import ModelRunner, PendingResult, StepResult
from minidcp.parallel.state import ParallelState, init_process_state

logger = logging.getLogger("minidcp")


@dataclass(frozen=True)
class Ready:
    """The last thing asked for is done: the model is loaded, or the cache allocated."""

    kv_bytes: int = 0
    bytes_read: int = 0


@dataclass(frozen=True)
class Failed:
    """A rank ended. `user_error` is a ValueError's message; `died` means it could not say why itself."""

    reason: str
    user_error: bool = False
    died: bool = False


Command = StepPlan | int | None  # run a step; allocate so many cache blocks, answered by Ready; stop


def serve_rank(rank: int, connection: Connection, state: ParallelState | None = None, own_process: bool = True) -> bool:
    """Be rank `rank` of the driver at the other end of the connection: serve commands until told to stop (True) or
    until something fails, which is reported (False). Without a state, it joins other processes. The first message is
    (EngineConfig, ModelConfig). Results come from a thread of their own on a GPU."""
    config, model_config = connection.recv()
    receive = watch(connection) if own_process else connection.recv
    sending = threading.Lock()

    def report(what: Ready | StepResult | Failed) -> None:
        with sending, contextlib.suppress(OSError):  # a driver that is gone is `watch`'s to notice
            connection.send(what)

    loading = True
    try:
        device = torch.device(config.device)
        if device.type == "cuda":
            # Ranks beyond the number of GPUs share them, which symmetric memory allows for tests.
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        if device.type == "cpu" and config.tp_size > 1:
            # Threads of many ranks on few cores wait for each other: one core's worth per rank.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.tp_size))
        state = state or init_process_state(config.tp_size, config.dcp_size, config.comm, device)
        runner = ModelRunner(config, model_config, state, device)
        report(Ready(runner.measure_kv_bytes(), runner.bytes_read))
        loading = False  # from here on a ValueError is a defect of ours: requests are checked before
        report_result = report_from_thread(rank, report) if device.type == "cuda" else None
        while (command := receive()) is not None:
            if isinstance(command, int):
                runner.allocate_cache(command)
                report(Ready())
                continue
            pending = runner.execute(command)
            if report_result is not None:
                report_result(pending)
            elif rank == 0:
                report(pending.wait())
    except threading.BrokenBarrierError:  # another thread has failed, and says why
        while receive() is not None:
            pass
        return True
    except Exception as error:
        is_user_error = loading and isinstance(error, ValueError)
        if not is_user_error:
            logger.exception("rank %d has failed", rank)
        report(Failed(str(error) if is_user_error else f"rank {rank}: {error!r}", is_user_error))
        return False
    return True


def watch(connection: Connection) -> Callable[[], Command]:
    """`connection.recv` by way of a thread, which ends this process if the driver dies, even within a collective."""
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def read() -> None:
        told_to_stop = False
        try:
            while True:
                commands.put(command := connection.recv())
                told_to_stop = command is None
        except (EOFError, OSError):
            os._exit(0 if told_to_stop else 1)  # peers may hold the main thread

    threading.Thread(target=read, daemon=True).start()
    return commands.get


def report_from_thread(rank: int, report: Callable[[StepResult | Failed], None]) -> Callable[[PendingResult], None]:
    """A thread waits for the device, so that the next step can be launched while this one runs. Rank 0 reports
    results; the others wait too, because only so does a rank learn that its device failed."""
    pending: queue.SimpleQueue[PendingResult] = queue.SimpleQueue()

    def run() -> None:
        try:
            while True:
                result = pending.get().wait()
                if rank == 0:
                    report(result)
        except Exception as error:
            logger.exception("rank %d has failed", rank)
            report(Failed(f"rank {rank}: {error!r}"))

    threading.Thread(target=run, name="results", daemon=True).start()
    return pending.put


def main() -> None:
    """A process that the driver started; its argument is the inherited file descriptor of the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    # Rank 0 speaks for all, as loudly as the driver; the others only of what goes wrong.
    level = int(os.environ["MINIDCP_LOG_LEVEL"]) if os.environ["RANK"] == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    serve_and_exit(int(os.environ["RANK"]), Connection(int(sys.argv[1])))


def serve_and_exit(rank: int, connection: Connection) -> NoReturn:
    ok = serve_rank(rank, connection)
    sys.stdout.flush()
    os._exit(0 if ok else 1)  # without the tear-down of process groups, which waits for peers
