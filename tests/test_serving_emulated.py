"""benchmarks/serving_emulated.py on the CPU: both clocks, all requests, capacity × dcp."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulation
import pytest
import serving_emulated
import torch
from checkpoints import STYLES
from step_times import StepTimes

from minidcp.batch import StepPlan
from minidcp.parallel.exchange import EXCHANGES

SIZE = 4
LOAD = (
    "--tp-size 4 --concurrency 1,5 --input-len 60 --output-len 12 "
    "--rounds 2 --least 3 --max-num-seqs 8"
)
FLAGS = f"{LOAD} --max-num-batched-tokens 128 --batch 1,4,8 --repeats 1".split()
TIMES = StepTimes(
    1 << 20,
    "float32",
    [100, 200],
    [[1, 1.0, 2.0], [9, 5.0, 6.0]],
    [[10, 3.0], [30, 5.0]],
    [10, 10, 0.5],
    [[4, 2.0]],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emulated")
    (path / "config.json").write_text(json.dumps(STYLES["v2"] | {"model_type": "deepseek_v2"}))
    return path


def run(folder: Path, *flags: str) -> list[dict[str, Any]]:
    files = [
        "--model",
        str(folder),
        "--steps",
        str(folder / "steps.json"),
        "--json",
        str(folder / "out.json"),
    ]
    serving_emulated.main([*files, *FLAGS, *flags])
    content = json.loads((folder / "out.json").read_text())
    assert "EMULATED" in content["emulated"] and "symmetric at 350 GB/s" in content["emulated"]
    return content["results"]


def test_every_request_is_accounted_for_on_both_clocks(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run(folder, "--clock", "simulated,real", "--plot", str(folder / "chart.png"))
    labels = ["TP4", *(f"TP4 DCP4 {name}" for name in ("ag_rs", "a2a", "p2p"))]
    assert [(r["setup"], r["clock"]) for r in results] == [
        (a, b) for a in labels for b in ("simulated", "real")
    ]
    for result in results:
        assert [(row["concurrency"], row["requests"]) for row in result["rows"]] == [
            (1, 3),
            (5, 10),
        ]
        for row in result["rows"]:
            mean, median, worst = row["ttft_ms"]
            assert 0 < median <= worst and 0 < mean <= worst and row["itl_ms"][0] > 0
            assert row["output_tokens_per_s"] > 0 and row["preemptions"] == 0
    assert (folder / "chart.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert output.count("emulated, real clock") == output.count("emulated, simulated clock") == 4

    # With the file no step is measured, and the simulation gives the same results.
    monkeypatch.setattr(serving_emulated, "measure", None)
    assert run(folder) == [result for result in results if result["clock"] == "simulated"]
    with pytest.raises(SystemExit, match=r"was measured with \{'max_num_seqs': 8\}"):
        run(folder, "--max-num-seqs", "9")


def test_dcp_holds_more_and_preempts_less(folder: Path) -> None:
    run(folder)
    file = folder / "steps.json"
    held = json.loads(file.read_text())
    # Twelve blocks of 16 tokens: a request has at most (60 + 12) · 1.2 tokens, so two fit.
    for times in held["times"].values():
        times["kv_bytes"] = 12 * 16 * STYLES["v2"]["num_hidden_layers"] * 40 * 4
        # The same steps in all set-ups, so that only what they hold makes a difference.
        times["decode"] = [[1, 0.004, 0.005], [8, 0.006, 0.008]]
        times["prefill"] = [[1, 0.002], [128, 0.010]]
        times["context"] = [10, 10, 0.0005]
        times["beside"] = [[4, 0.002]]
    file.write_text(json.dumps(held))
    alone, *with_dcp = run(folder)
    file.unlink()
    assert alone["capacity_tokens"] == 12 * 16
    assert [result["capacity_tokens"] for result in with_dcp] == [SIZE * 12 * 16] * 3
    assert alone["rows"][1]["preemptions"] > 0
    assert all(row["preemptions"] == 0 for result in with_dcp for row in result["rows"])
    assert alone["rows"][1]["ttft_ms"][0] > max(
        result["rows"][1]["ttft_ms"][0] for result in with_dcp
    )


def test_steps_between_measured_ones() -> None:
    def plan(decode: list[int], chunks: list[tuple[int, int]]) -> StepPlan:
        lengths = [1] * len(decode) + [n for n, _ in chunks]
        starts = decode + [p for _, p in chunks]
        return StepPlan(len(decode), [*range(len(starts))], starts, lengths)

    assert TIMES.estimate(plan([100], [])) == 1.0
    assert (
        TIMES.estimate(plan([100, 200, 150, 200, 100], [])) == 3.5
    )  # half-way between the batches and between the contexts
    assert TIMES.estimate(plan([], [(20, 0)])) == 4.0
    assert TIMES.estimate(plan([], [(10, 0), (10, 20)])) == 4.0 + 1.0
    assert TIMES.estimate(plan([7, 7], [(10, 0)])) == 3.0 + 1.0


def test_emulated_collectives_take_what_the_link_says() -> None:
    """Shapes are those of parallel/group.py; bytes and waits are those of the link's formula."""
    waits: list[float] = []
    link = emulation.Link(bandwidth=1e9, wait=waits.append)
    group = emulation.EmulatedGroup(SIZE, link)
    x, by_rank = torch.randn(3, 2, 5), torch.randn(3, SIZE, 5)
    assert torch.equal(group.all_gather(x), torch.stack([x] * SIZE, 1))
    assert torch.equal(group.reduce_scatter(by_rank), by_rank.sum(1))
    assert torch.equal(group.all_to_all(by_rank), by_rank)
    assert torch.equal(group.all_reduce(x[:, 0]), x[:, 0])
    gathered, part = 3 * 2 * 5 * 4 * (SIZE - 1), 3 * 5 * 4 * (SIZE - 1)
    assert group.received_bytes == gathered + 3 * part
    latencies = [
        emulation.LATENCY_US["symmetric"][kind] for kind in ("all_gather", *["reduce_scatter"] * 3)
    ]
    latencies[2] = emulation.LATENCY_US["symmetric"]["all_to_all"]
    expected = [
        a * 1e-6 + b / 1e9 for a, b in zip(latencies, (gathered, part, part, part), strict=True)
    ]
    assert waits == pytest.approx(expected)

    nccl = emulation.EmulatedGroup(SIZE, replace(link, comm="nccl"))
    nccl.all_reduce(x[:, 0])
    assert waits[-1] == pytest.approx(16.06e-6 + 2 * 60 * 3 / 4 / 1e9)

    out, lse = torch.randn(3, 2 * SIZE, 5), torch.randn(3, 2 * SIZE)
    for name, exchange in EXCHANGES.items():
        merged, merged_lse = exchange(group).merge(out, lse)
        assert merged.shape == (3, 2, 5) and merged_lse.shape == (3, 2), name
