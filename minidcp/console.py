"""Text for people: logs, progress bars, start-up lines. None of it is worth an engine, so it is
dropped where its reader is slow or the disk is full. Results go through `print` instead."""

import atexit
import contextlib
import io
import os
import select
import sys
import threading
from pathlib import Path
from typing import NoReturn, TextIO, cast

from tqdm import tqdm

MAX_WAITING = 1 << 20  # characters that wait for a slow reader; beyond that text is dropped
DRAIN_SECONDS = 0.5  # how long the end of a process may wait for its last words to be read


class LossyStream(io.TextIOBase):
    """Writes to the file descriptor of `stream`. It never blocks the writer and never raises.

    A thread passes the text on. What the descriptor does not take is dropped, and once it takes
    text again, a line says how much is missing.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream  # kept alive: it would close its descriptor
        self.descriptor = stream.fileno()
        # Its lock is reentrant: a signal handler may write while this thread does.
        self.changed = threading.Condition()
        self.waiting: list[str] = []
        self.num_waiting = 0  # characters, with those that the thread is writing now
        self.num_dropped = 0  # characters
        threading.Thread(target=self.run, name="console", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self.changed:
            if self.num_waiting + len(text) > MAX_WAITING:
                self.num_dropped += len(text)
            else:
                self.append(text)
        return len(text)

    def append(self, text: str) -> None:
        with self.changed:
            self.num_waiting += len(text)
            self.waiting.append(text)
            self.changed.notify_all()

    def drain(self, seconds: float) -> None:
        """Wait until everything is written, or dropped, but not longer than so many seconds."""
        with self.changed:
            self.changed.wait_for(lambda: self.num_waiting == 0, seconds)

    def run(self) -> None:
        """The body of the thread."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                text = "".join(self.waiting)
                self.waiting.clear()

            num_lost = self.pass_on(text)

            with self.changed:
                self.num_waiting -= len(text)
                self.changed.notify_all()
                self.num_dropped += num_lost
                if num_lost == 0 and self.num_dropped > 0:
                    self.append(f"[{self.num_dropped} characters of output are missing here]\n")
                    self.num_dropped = 0

    def pass_on(self, text: str) -> int:
        """Write a text, however long that takes. Returns how many characters were lost."""
        data = text.encode(self.encoding, "backslashreplace")
        while data:
            try:
                num_written = os.write(self.descriptor, data)
            except BlockingIOError:  # somebody else has made the descriptor non-blocking
                select.select([], [self.descriptor], [])
                continue
            except OSError:  # a full disk, or a pipe whose reader has gone
                return len(text)
            data = data[num_written:]
        return 0


class UnfailingStream:
    """Writes to `stream`, and drops what it does not take. For progress bars in programs that are
    not ours, where `stream` may be anything. It may block."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream  # None if the program has no standard error

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if self.stream is not None:
            with contextlib.suppress(OSError):
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self.stream is not None:
            with contextlib.suppress(OSError):
                self.stream.flush()


class ProgressBar(tqdm):  # type: ignore[misc]
    """A bar with a lock that is this process's own. tqdm's default lock is shared with forked
    copies of the process and with all other bars: whoever ends while it holds it stops them all."""

    _lock = threading.RLock()


def protect(stream: TextIO | None) -> TextIO:
    """A stream for the same text that never blocks and never raises."""
    if stream is None:  # the process was started without it
        return Path(os.devnull).open("w")
    if isinstance(stream, LossyStream):
        return cast(TextIO, stream)
    return cast(TextIO, LossyStream(stream))


def protect_stderr() -> None:
    """Make sys.stderr drop text rather than block or raise, for the rest of this process."""
    sys.stderr = protect(sys.stderr)
    atexit.register(drain)


def protect_stdout() -> None:
    """The same for sys.stdout, in a process whose standard output is not its result."""
    sys.stdout = protect(sys.stdout)
    atexit.register(drain)


def drain() -> None:
    """Give what was written a moment to come out. To be called before a process ends at once."""
    for stream in (sys.stderr, sys.stdout):
        if isinstance(stream, LossyStream):
            stream.drain(DRAIN_SECONDS)


def exit_at_once(code: int) -> NoReturn:
    """End this process without any tear-down, from any thread or a signal handler."""
    drain()
    os._exit(code)
