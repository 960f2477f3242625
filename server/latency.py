"""Percentiles of latencies over the last minutes, for the status page. They cost little, however
many tokens a second there are. The histograms in `metrics.py` are since the start, and coarser."""

import math
import time
from collections import Counter, deque

SLICE_SECONDS = 30
NUM_SLICES = 10
GROWTH = 1.02  # from one bucket's upper edge to the next: percentiles are right within 1 %
LEAST_SECONDS = 1e-6

Counts = Counter[int]  # of latencies, by bucket: bucket b ends at GROWTH ** b seconds


class RecentLatencies:
    """Counts latencies in slices of time, and forgets the oldest slice when a new one begins.
    Times are time.monotonic()."""

    def __init__(self) -> None:
        self.slices: deque[tuple[int, Counts]] = deque(maxlen=NUM_SLICES)  # (number, counts)

    def add(self, seconds: float) -> None:
        number = find_slice(time.monotonic())
        if not self.slices or self.slices[-1][0] != number:
            self.slices.append((number, Counter()))
        bucket = math.ceil(math.log(max(seconds, LEAST_SECONDS), GROWTH))
        self.slices[-1][1][bucket] += 1

    def describe(self) -> dict[str, float | None]:
        """How many latencies there are in the span, and their percentiles in seconds."""
        oldest = find_slice(time.monotonic()) - NUM_SLICES + 1
        counts: Counts = Counter()
        for number, slice_counts in self.slices:
            if number >= oldest:
                counts.update(slice_counts)
        return {
            "count": counts.total(),
            "p50": find_percentile(counts, 50),
            "p99": find_percentile(counts, 99),
        }


def measure_span(started_at: float) -> float:
    """The seconds that `describe` covers now, where counting began at `started_at`."""
    now = time.monotonic()
    oldest = find_slice(now) - NUM_SLICES + 1
    return now - max(started_at, oldest * SLICE_SECONDS)


def find_slice(now: float) -> int:
    return int(now // SLICE_SECONDS)


def find_percentile(counts: Counts, percent: int) -> float | None:
    """The least latency that so many percent of all do not exceed; None if there are none."""
    total = counts.total()
    num_up_to = 0
    for bucket in sorted(counts):
        num_up_to += counts[bucket]
        if 100 * num_up_to >= percent * total:
            return float(GROWTH ** (bucket - 0.5))  # the middle of the bucket
    return None
