"""benchmarks/serving.py with the demo model: every request is counted, and a chart is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import serving
from eval_accuracy import DEMO
from servers import Server


def test_every_request_is_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(Path(DEMO), tmp_path, "--ranks", "threads", "--tp-size", "2", "--dcp-size", "2")
    # One concurrency, because guidellm takes ten seconds to start.
    load = "--concurrency 3 --input-len 60 --output-len 12 --rounds 2 --least 4"
    try:
        server.wait_until_healthy()
        serving.main(
            [
                server.url,
                *load.split(),
                "--label",
                "two ranks",
                "--json",
                str(tmp_path / "out.json"),
            ]
        )
        metrics = httpx.get(f"{server.url}/metrics").text
    finally:
        server.kill()
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["label"] == "two ranks"
    (row,) = result["rows"]
    assert (row["concurrency"], row["requests"], row["errors"]) == (3, 6, 0)
    finished = [
        line for line in metrics.splitlines() if line.startswith("vllm:request_success_total")
    ]
    assert sum(float(line.split()[-1]) for line in finished) >= 6
    assert 6 < row["output_tokens"] < 20 and 30 < row["input_tokens"] < 90
    mean, median, worst = row["ttft_ms"]
    assert 0 < median <= worst and 0 < mean <= worst and row["output_tokens_per_s"] > 0
    capsys.readouterr()

    serving.main(["--compare", str(tmp_path / "out.json"), "--plot", str(tmp_path / "chart.png")])
    table = capsys.readouterr().out
    assert "**two ranks**" in table and table.count("\n| ") == 2 and "| 3 | " in table
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_failed_requests_are_counted_and_lost_ones_refused() -> None:
    values = {"mean": 1.0, "percentiles": {"p50": 1.0, "p99": 2.0}, "total_sum": 30}
    names = [*serving.LATENCIES.values(), "output_token_count", "prompt_token_count"]
    metrics = {name: {"successful": values} for name in names}
    metrics["request_totals"] = {"successful": 5, "errored": 2, "incomplete": 1, "total": 8}
    row = serving.read_row({"metrics": metrics, "duration": 3.0}, 4, 8)
    assert (row.requests, row.errors, row.output_tokens_per_s) == (8, 3, 10.0)
    with pytest.raises(RuntimeError, match="8 of 9 requests"):
        serving.read_row({"metrics": metrics, "duration": 3.0}, 4, 9)


def test_a_server_that_is_not_there_is_an_error_that_says_so() -> None:
    with pytest.raises(SystemExit, match="cannot be reached"):
        serving.main(["http://127.0.0.1:9", "--concurrency", "1"])
