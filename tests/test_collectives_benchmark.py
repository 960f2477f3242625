"""benchmarks/collectives.py on the CPU: every collective at every size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "collectives.py"


def test_every_size_of_every_collective_is_timed() -> None:
    command = [sys.executable, SCRIPT, "--ranks", "2", "--device", "cpu", "--sizes", "2048,65536"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])["us"]
    names = ("all_gather", "reduce_scatter", "all_to_all")
    assert set(result) == {f"{name} gloo {size}" for name in names for size in (2048, 65536)}
    assert all(0 < times[0] < 1e6 and len(times) == 1 for times in result.values())
