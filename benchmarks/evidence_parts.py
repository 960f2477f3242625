"""What all parts of `evidence.py` share: settings, time, and files; and its small parts.

A part saves what it has after each step. So nothing is lost if it is ended early.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import accuracy_matrix
import collectives
import seed_figures
import serving

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo-model"
CPU_TESTS = ["tests/test_parallel.py::test_a_failed_rank_does_not_leave_its_peers_waiting"]
GPU_TESTS = ROOT / "tests" / "gpu"
# The order of files with GPU tests; the others follow. The soak runs with a rank per GPU.
FIRST_TESTS = ("test_soak.py", "test_engine.py", "test_exchange.py", "test_drafts.py")
HTTP_PACKAGES = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "jinja2")
START_SECONDS = 120.0  # in which a server must answer


@dataclass
class Context:
    """One run of one part."""

    args: argparse.Namespace
    device: str  # cuda or cpu
    tp_size: int
    model: Path
    where: str  # the hardware, in words
    begin: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        return float(self.args.seconds) - (time.monotonic() - self.begin)

    def save(self, part: str, result: dict[str, Any], text: str) -> None:
        """Write a part's JSON, and its section in Markdown."""
        folder: Path = self.args.out
        folder.mkdir(parents=True, exist_ok=True)
        content = {"where": self.where, **result}
        (folder / f"{part}.json").write_text(json.dumps(content, indent=1))
        (folder / f"{part}.md").write_text(f"## {part.capitalize()}\n\n{text}\n")


def write_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(str(cell) for cell in row)} |")
    return "\n".join(lines)


def write_notes(notes: list[str]) -> str:
    """What failed and what was left out, as a list in Markdown."""
    return "".join(f"\n- {note}" for note in notes)


def describe_error(error: BaseException) -> str:
    """In one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


NO_CHART = "no chart, because matplotlib is not installed"


# Collectives.


def run_collectives(context: Context) -> None:
    """Every collective at every size, with each comm that runs here."""
    flags = ["--ranks", str(context.tp_size), "--device", context.device]
    flags += ["--sizes", context.args.sizes]
    args = collectives.parse_args(flags)
    where = collectives.describe(args)
    times: collectives.Times = {}
    notes = []
    comms = args.comm.split(",")
    if context.tp_size == 1:
        comms = []
        notes.append("nothing was measured: one rank has no peers; --tp-size 2 has")
    for comm in comms:
        args.comm = comm
        if context.seconds_left <= 0:
            notes.append(f"{comm}: left out, the time was over")
            continue
        try:
            measured = collectives.measure(args, context.seconds_left)
        except Exception as error:
            notes.append(f"{comm}: {describe_error(error)}")
            continue
        times.update(measured)
        if len({size for _, _, size in measured}) < len(args.sizes):
            notes.append(f"{comm}: not all sizes, the time was over")
        save_collectives(context, where, times, args.sizes, notes)

    if times and has_matplotlib():
        draw_collectives(times, where, context.args.out / "collectives.png")
    elif times:
        notes.append(NO_CHART)
    save_collectives(context, where, times, args.sizes, notes)


def save_collectives(
    context: Context, where: str, times: collectives.Times, sizes: list[int], notes: list[str]
) -> None:
    seed_rows = []
    names = ("all_gather", "reduce_scatter", "all_to_all")
    for size, by_name in seed_figures.COLLECTIVES_US.items():
        cells = [" / ".join(f"{us}" for us in by_name[name]) for name in names]
        seed_rows.append([f"{size:,}", *cells])
    parts = [f"µs, eager / in a graph; {where}"]
    if times:
        parts.append(collectives.format_table(times, sizes))
    parts.append(f"{seed_figures.SOURCE}: NCCL eager / symmetric memory in a graph")
    parts.append(write_table(["bytes", *names], seed_rows))
    text = "\n\n".join(parts) + "\n" + write_notes(notes)
    us = collectives.list_microseconds(times)
    context.save("collectives", {"us": us, "notes": notes}, text)


def draw_collectives(times: collectives.Times, title: str, file: Path) -> None:
    """Draw the last of each list of times, which is the one in a graph if there is one."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for name, comm in sorted({(name, comm) for name, comm, _ in times}):
        sizes = sorted(size for n, c, size in times if (n, c) == (name, comm))
        us = [times[name, comm, size][-1] * 1e6 for size in sizes]
        axis.plot(sizes, us, marker="o", label=f"{name}, {comm}")
    axis.set(xscale="log", yscale="log", xlabel="bytes of a rank", ylabel="µs")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=150)


# Accuracy.


def run_accuracy(context: Context) -> None:
    """The demo model in every engine of the matrix, each compared with one rank."""
    given = context.args
    flags = [str(DEMO), "--questions", str(given.questions), "--longest", str(given.longest)]
    flags += ["--tp-size", str(context.tp_size), "--device", context.device]
    flags += ["--exchanges", "p2p,a2a,ag_rs", "--concurrency", "64", "--only", given.only]
    if context.device == "cpu":
        flags += ["--backends", "reference", "--graphs", "off", "--ranks", "threads"]
        flags += ["--prefill-strategy", "gather_kv"]
    else:
        flags += ["--backends", "fa3,triton,flashinfer"]
    args = accuracy_matrix.parse_args(flags)
    engines, common = accuracy_matrix.make_engines(args)
    questions = accuracy_matrix.draw_questions(args)
    matrix = accuracy_matrix.Matrix(args.model, common, questions, [64])

    cells = list(matrix.base_cells)
    notes: list[str] = []
    for name, options in engines.items():
        if context.seconds_left <= 0:
            notes.append(f"{name}: left out, the time was over")
            continue
        try:
            cells += matrix.compare(name, options)
        except Exception as error:
            notes.append(f"{name}: {describe_error(error)}")
        save_accuracy(context, cells, notes)
    save_accuracy(context, cells, notes)


def save_accuracy(context: Context, cells: list[accuracy_matrix.Cell], notes: list[str]) -> None:
    rows = []
    for cell in cells:
        row: list[object] = [cell.name]
        for answers in cell.summary.values():
            row += [f"{answers['accuracy']:.3f}", answers["differ"]]
        rows.append([*row, "yes" if cell.agrees_with(cells[0]) else "NO", f"{cell.seconds:.1f}"])
    head = ["engine"]
    for kind in cells[0].summary:
        head += [f"{kind}, accuracy", "answers unlike one rank's"]
    head += ["within one rank's interval", "seconds"]
    title = f"The demo model, {context.args.questions} questions of each kind, 64 at a time"
    text = f"{title}; {context.where}\n\n{write_table(head, rows)}\n{write_notes(notes)}"
    result = {"cells": [asdict(cell) for cell in cells], "notes": notes}
    context.save("accuracy", result, text)


# Tests.


def run_tests(context: Context) -> None:
    """The GPU tests, one file after another; on a CPU one of a rank that fails."""
    results: list[dict[str, Any]] = []
    notes: list[str] = []
    targets = CPU_TESTS
    if context.device == "cuda":
        names = sorted(path.name for path in GPU_TESTS.glob("test_*.py"))
        others = [name for name in names if name not in FIRST_TESTS]
        targets = [f"tests/gpu/{name}" for name in [*FIRST_TESTS, *others]]
    if importlib.util.find_spec("pytest") is None:
        notes.append("nothing ran, because pytest is not installed")
        targets = []
    for target in targets:
        if context.seconds_left <= 0:
            notes.append(f"{target}: left out, the time was over")
            continue
        results.append(run_test_file(context, target))
        save_tests(context, results, notes)
    save_tests(context, results, notes)


def run_test_file(context: Context, target: str) -> dict[str, Any]:
    report = context.args.out / "junit.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report.resolve()}"]
    if context.device == "cuda":
        command += ["-m", "gpu"]
    env = {**os.environ, "SOAK_RANKS": str(context.tp_size)}
    result: dict[str, Any] = {"tests": target, "error": ""}
    try:
        run = subprocess.run(
            [*command, target],
            cwd=ROOT,
            env=env,
            timeout=max(1.0, context.seconds_left),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**result, "error": "cut off, the time was over"}
    if not report.exists():
        return {**result, "error": " ".join(run.stdout[-400:].split())}

    root = ElementTree.parse(report).getroot()
    suite = root if root.tag == "testsuite" else root[0]
    for name in ("tests", "failures", "errors", "skipped"):
        result[f"num_{name}"] = int(suite.get(name, "0"))
    result["seconds"] = float(suite.get("time", "0"))
    failed = [case.get("name", "") for case in suite if any(c.tag != "skipped" for c in case)]
    if run.returncode != 0:
        result["error"] = ", ".join(failed)[:400] or " ".join(run.stdout[-400:].split())
    return result


def save_tests(context: Context, results: list[dict[str, Any]], notes: list[str]) -> None:
    columns = ("num_tests", "num_failures", "num_errors", "num_skipped", "seconds", "error")
    rows = [[r["tests"], *(r.get(column, "–") for column in columns)] for r in results]
    head = ["file", "tests", "failed", "errors", "skipped", "seconds", "what failed"]
    title = f"{context.where}; the soak has {context.tp_size} ranks"
    text = f"{title}\n\n{write_table(head, rows)}\n{write_notes(notes)}"
    context.save("tests", {"files": results, "notes": notes}, text)


# HTTP.


def run_http(context: Context) -> None:
    """The server without a model, and then one row of guidellm's load on the real engine."""
    args = context.args
    result: dict[str, Any] = {"notes": []}
    notes = result["notes"]
    missing = [name for name in HTTP_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        notes.append(f"nothing ran, because these are not installed: {', '.join(missing)}")
        save_http(context, result)
        return

    import http_server  # which needs uvicorn

    try:
        result["alone"] = http_server.measure(args.streams, 100, 0.0)
    except Exception as error:
        notes.append(f"the server without a model: {describe_error(error)}")
    save_http(context, result)
    try:
        serving.find_guidellm()
        result["row"] = asdict(load_server(context))
    except Exception as error:
        notes.append(f"guidellm's row: {describe_error(error)}")
    save_http(context, result)


def load_server(context: Context) -> serving.Row:
    """Start a server of its own, and send it the load at one concurrency."""
    args = context.args
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    longest = int((args.input_len + args.output_len) * (1 + 5 * args.spread / 100))
    flags = ["--port", str(port), "--device", context.device, "--load-format", "dummy"]
    flags += ["--tp-size", str(context.tp_size), "--dcp-size", str(context.tp_size)]
    flags += ["--max-model-len", str(longest), "--no-prefix-cache"]
    if context.device == "cpu":
        flags += ["--ranks", "threads"]
    log = context.args.out / "server.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "minidcp", "serve", str(add_tokenizer(context)), *flags]
        server = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_healthy(url, server, min(START_SECONDS, context.seconds_left), log)
            load = argparse.Namespace(**vars(args))
            load.url = url
            model, root = serving.find_model(url)
            timeout = max(1.0, context.seconds_left)
            return serving.run_load(load, args.http_concurrency, model, root, timeout)
        finally:
            server.terminate()
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()


def add_tokenizer(context: Context) -> Path:
    """The model itself if it has a tokenizer, else a folder of its config and the demo's tokenizer.

    The weights are random, so any tokenizer with no more tokens than the model will do.
    """
    if (context.model / "tokenizer.json").exists():
        return context.model
    folder: Path = context.args.scratch / f"{context.model.name}-with-tokenizer"
    folder.mkdir(exist_ok=True)
    for source in (context.model / "config.json", *DEMO.glob("tokenizer*.json")):
        (folder / source.name).write_bytes(source.read_bytes())
    return folder


def wait_until_healthy(
    url: str, server: subprocess.Popen[bytes], seconds: float, log: Path
) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text()[-400:]
                raise RuntimeError(f"the server does not answer ({error}): {tail}") from None
        time.sleep(0.2)


def save_http(context: Context, result: dict[str, Any]) -> None:
    parts = [context.where]
    if "alone" in result:
        alone = result["alone"]
        parts.append(
            f"The server without a model, {alone['streams']} streams: "
            f"{alone['tokens_per_second']:,.0f} tokens/s, {alone['us_per_token']:.0f} µs per token"
        )
    if "row" in result:
        label = f"TP{context.tp_size} DCP{context.tp_size} of {context.model.name}"
        parts.append(serving.format_table(label, [serving.Row(**result["row"])]))
    context.save("http", result, "\n\n".join(parts) + "\n" + write_notes(result["notes"]))
