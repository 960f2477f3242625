"""benchmarks/collectives.py on the CPU: every collective at every size."""

from __future__ import annotations

import collectives


def test_every_size_of_every_collective_is_timed() -> None:
    result = collectives.main(["--ranks", "2", "--device", "cpu", "--sizes", "2048,65536"])
    names = ("all_gather", "reduce_scatter", "all_to_all")
    assert set(result) == {f"{name} gloo {size}" for name in names for size in (2048, 65536)}
    assert all(0 < times[0] < 1e6 and len(times) == 1 for times in result.values())
