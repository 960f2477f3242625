"""What ranks report to the driver, in order, and which of their failures is the cause of the rest.
Next: `executor.py`, which has a thread per rank that puts its reports in here."""

import contextlib
import queue
import threading
import time

from minidcp.worker.worker import Failed, Report

CAUSE_SECONDS = 1.0  # how long to wait for a report that explains the first failure
WAIT_PARTS = 10  # a long wait for a report is made of so many short ones


class Reports:
    """Reports in the order of their arrival.

    A failure is put into `failures` too, where it is seen before the results that still wait.
    """

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self.failures: queue.SimpleQueue[Failed] = queue.SimpleQueue()

    def put(self, report: Report) -> None:
        if isinstance(report, Failed):
            self.failures.put(report)
        self.queue.put(report)

    def has_failure(self) -> bool:
        return not self.failures.empty()

    def get(self, timeout: float) -> Report:
        """The oldest report. If there is none for `timeout` seconds, a rank counts as failed.

        The clock goes on while all our processes are suspended (Ctrl-Z). Such a time uses up only
        one part of the wait.
        """
        part = min(timeout / WAIT_PARTS, threading.TIMEOUT_MAX)
        for _ in range(WAIT_PARTS):
            with contextlib.suppress(queue.Empty):
                return self.queue.get(timeout=part)

        reason = (
            f"no step has ended for {timeout:g} s: a rank is stuck, or steps take longer here than "
            f"--engine-timeout {timeout:g} allows"
        )
        stuck = Failed(reason, died=True)
        self.failures.put(stuck)
        return stuck

    def find_cause(self) -> Failed:
        """The failure behind the reports. When one rank ends, its peers fail as well.

        A process that died or a user's error is the cause for certain. If no rank reports one soon,
        the first report is taken for the cause.
        """
        first = self.failures.get()
        failure = first
        deadline = time.monotonic() + CAUSE_SECONDS
        while not failure.died and not failure.user_error:
            try:
                failure = self.failures.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return first
        return failure
