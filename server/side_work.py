"""Long work on the side of the event loop: in a thread, and with rests, because engine, event loop
and this thread share one interpreter."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

SHIFT_SECONDS = 0.001  # of work between two rests
# How long a rest is, in shifts. The engine may wait for the interpreter at each of the hundreds of
# operations of a step. During a shift it hardly advances, so shifts must be the smaller part.
REST = 2


class SideWorker:
    """A thread for work that is written as an iterator, each step of which is short. It is not the
    default executor's, where tokenizing a long prompt can take seconds."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "side work")

    async def run(self, work: Iterator[bytes]) -> list[bytes]:
        """Run the iterator to its end. Returns what it yielded."""
        loop = asyncio.get_running_loop()
        results: list[bytes] = []
        while True:
            seconds = await loop.run_in_executor(self.pool, work_for_a_shift, work, results)
            if seconds < SHIFT_SECONDS:  # it ended before the shift did
                return results
            await asyncio.sleep(REST * seconds)


def work_for_a_shift(work: Iterator[bytes], results: list[bytes]) -> float:
    """Append results until the iterator or the shift ends. Returns the seconds that this took; they
    are fewer than SHIFT_SECONDS only if the iterator has ended."""
    start = time.monotonic()
    for result in work:
        results.append(result)
        seconds = time.monotonic() - start
        if seconds >= SHIFT_SECONDS:
            return seconds
    return 0.0
