"""Percentiles over the last minutes, against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidcp_server import latency
from minidcp_server.latency import NUM_SLICES, SLICE_SECONDS, RecentLatencies, measure_span

SECONDS = st.floats(min_value=1e-6, max_value=1e4)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0 * SLICE_SECONDS

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


@given(st.lists(SECONDS, min_size=1, max_size=300))
def test_percentiles_are_numpys_within_one_percent(samples: list[float]) -> None:
    recent = RecentLatencies()
    for seconds in samples:
        recent.add(seconds)
    described = recent.describe()
    assert described["count"] == len(samples)
    for percent in (50, 99):
        expected = np.percentile(samples, percent, method="inverted_cdf")
        assert described[f"p{percent}"] == pytest.approx(expected, rel=0.01)


def test_what_is_older_than_the_span_is_forgotten(clock: Clock) -> None:
    recent = RecentLatencies()
    assert recent.describe() == {"count": 0, "p50": None, "p99": None}
    started_at = clock.now
    recent.add(10.0)
    clock.now += 5
    assert measure_span(started_at) == 5
    clock.now += (NUM_SLICES - 1) * SLICE_SECONDS
    recent.add(0.0)  # a clock may not have moved
    assert recent.describe()["count"] == 2
    assert recent.describe()["p99"] == pytest.approx(10, rel=0.01)

    clock.now += SLICE_SECONDS
    assert recent.describe()["count"] == 1
    assert recent.describe()["p99"] < 1e-5
    assert measure_span(started_at) == (NUM_SLICES - 1) * SLICE_SECONDS + 5
    clock.now += 1000 * SLICE_SECONDS  # nothing is added meanwhile
    assert recent.describe() == {"count": 0, "p50": None, "p99": None}


def test_memory_does_not_grow(clock: Clock) -> None:
    recent = RecentLatencies()
    for _ in range(5 * NUM_SLICES):
        recent.add(0.1)
        clock.now += SLICE_SECONDS
    assert len(recent.slices) == NUM_SLICES
