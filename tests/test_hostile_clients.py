"""Hostile bodies from 8 clients do not hold up 56 others: a short run of
benchmarks/hostile_clients.py, which says more in ten minutes."""

from __future__ import annotations

from pathlib import Path

from eval_accuracy import DEMO
from hostile_clients import measure
from servers import Server, measure_slowness

SECONDS = 8
LONGEST_GAP = 2  # seconds, on an ordinary machine; single bodies took 20 once


def test_hostile_clients_hold_up_nobody(tmp_path: Path) -> None:
    server = Server(Path(DEMO), tmp_path, "--max-num-seqs", "64")
    try:
        server.wait_until_healthy()
        slowness = measure_slowness()
        alone, together, _ = measure(server.url, SECONDS)
    finally:
        server.kill()
    # That every answer was complete is checked there.
    assert alone.completions > 0
    assert together.completions > 0
    longest = max(gap for gaps in together.gaps for gap in gaps)
    assert longest < LONGEST_GAP * max(slowness, measure_slowness())

    answers = {answer.rsplit(": ", 1)[1] for answer in together.codes}
    assert answers <= {"200", "400", "413", "503", "closed"}
    assert "400" in answers
    assert "Traceback" not in server.stderr.read_text()
