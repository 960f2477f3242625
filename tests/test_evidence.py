"""benchmarks/evidence.py on CPUs: every part, and what becomes of failures and of lack of time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evidence
import pytest
import seed_figures
import serving
from eval_accuracy import DEMO

FLAGS = f"--device cpu --model {DEMO} --input-len 20 --output-len 4 --concurrency 1,2 --least 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evidence")


def run(folder: Path, part: str, flags: str = "") -> Any:
    evidence.main([*FLAGS.split(), "--out", str(folder), "--part", part, *flags.split()])
    return json.loads((folder / f"{part}.json").read_text())


def test_serving_and_how_far_off_its_estimates_were(folder: Path) -> None:
    served = run(folder, "serving", "--only (p2p|a2a).*fp32")
    failed, result = served["results"]
    assert failed["rows"] == [] and "needs symmetric memory" in failed["error"]
    assert [row["concurrency"] for row in result["rows"]] == [1, 2]
    assert all(row["output_tokens_per_s"] > 0 for row in result["rows"])
    table = (folder / "serving.md").read_text()
    assert "| SGLang, TP8 DCP8 a2a fa3 | 87.0 |" in table and "needs symmetric memory" in table
    assert (folder / "serving.png").read_bytes().startswith(b"\x89PNG")

    compared = run(folder, "emulation", "--repeats 1")
    assert compared["notes"] == []
    sources = [row["estimate of"] for row in compared["rows"]]
    assert sources.count("simulation") == 6 and sources.count("plan") == 2


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    served = run(tmp_path, "serving", "--seconds 0 --only a2a.*fp32")
    assert served["results"] == []
    assert served["notes"] == ["TP2 DCP2 a2a reference fp32: left out, the time was over"]


def test_collectives(folder: Path) -> None:
    times = run(folder, "collectives", "--sizes 2048")
    assert times["notes"] == [] and times["us"]["all_gather gloo 2048"][0] > 0


def test_accuracy(folder: Path) -> None:
    flags = "--questions 1 --longest 512 --only a2a.wide"
    cells = run(folder, "accuracy", flags)["cells"]
    assert [cell["name"] for cell in cells] == ["tp1", "dcp2 a2a wide reference eager"]


def test_tests(folder: Path) -> None:
    (file,) = run(folder, "tests")["files"]
    assert (file["num_tests"], file["num_failures"], file["error"]) == (1, 0, "")


def test_http_without_guidellm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing() -> str:
        raise RuntimeError("guidellm is not installed")

    monkeypatch.setattr(serving, "find_guidellm", find_nothing)
    result = run(folder, "http", "--streams 4")
    assert result["alone"]["tokens_per_second"] > 0
    assert "guidellm is not installed" in result["notes"][0]


def test_figures_of_the_seed_have_their_levels() -> None:
    assert seed_figures.find_ttft_ms("TP8 DCP8 ag_rs", "flashinfer")[512] == 28734
    assert seed_figures.find_tokens_per_s("TP8 DCP8 a2a", "fa3")[512] == 2951
    assert seed_figures.find_tokens_per_s("TP4", "fa3") == {}
