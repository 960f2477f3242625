"""Two things that Python's threads lack. Next: `executor.py`, whose ranks may be threads."""

import ctypes
import threading
import time
from collections.abc import Sequence


def join_all(threads: Sequence[threading.Thread], seconds: float) -> None:
    """Wait for all threads to end, but no longer than so many seconds altogether."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def raise_in_thread(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise an exception in another thread, as soon as it executes Python code again."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(error)
    )
