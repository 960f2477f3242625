"""Benchmark any OpenAI-compatible server (ours, vLLM, SGLang) at rising concurrency.

    python benchmarks/serving.py http://localhost:8000 --concurrency 1,8,64,512 --json dcp8.json
    python benchmarks/serving.py --compare tp8.json dcp8.json --plot serving.png

guidellm (`pip install '.[bench]'`) sends the load of random prompts. Failed requests are counted
and shown, never dropped. The second form prints the tables of earlier results and draws them in one
chart.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LATENCIES = {
    "ttft_ms": "time_to_first_token_ms",
    "tpot_ms": "time_per_output_token_ms",
    "itl_ms": "inter_token_latency_ms",
}


@dataclass(frozen=True)
class Row:
    """One concurrency. Latencies are in ms: (mean, median, 99th percentile)."""

    concurrency: int
    requests: int
    errors: int  # requests that failed or did not end
    output_tokens_per_s: float
    input_tokens: float  # mean per request
    output_tokens: float
    ttft_ms: tuple[float, float, float]
    tpot_ms: tuple[float, float, float]
    itl_ms: tuple[float, float, float]


def find_model(url: str) -> tuple[str, str]:
    """The name of the served model, and the directory or hub name of its tokenizer.

    /v1/models calls the latter "root". If it has none, it is the model's name.
    """
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
        card = json.load(response)["data"][0]
    return card["id"], card.get("root") or card["id"]


def find_guidellm() -> str:
    """The guidellm of this Python environment, or else the one on the PATH."""
    own_scripts = str(Path(sys.executable).parent)
    guidellm = shutil.which("guidellm", path=own_scripts) or shutil.which("guidellm")
    if guidellm is None:
        raise RuntimeError("guidellm is not installed: pip install 'minidcp[bench]'")
    return guidellm


def describe_data(args: argparse.Namespace) -> str:
    """The lengths of prompts and answers, as guidellm takes them."""
    spread = args.spread / 100
    return (
        f"kind=synthetic_text,prompt_tokens={args.input_len},"
        f"prompt_tokens_stdev={int(args.input_len * spread)},"
        f"output_tokens={args.output_len},"
        f"output_tokens_stdev={int(args.output_len * spread)}"
    )


def run_load(
    args: argparse.Namespace,
    concurrency: int,
    model: str,
    tokenizer: str,
    timeout: float | None = None,
) -> Row:
    """Run guidellm at one concurrency.

    Raises:
        RuntimeError: guidellm failed or lost a request. The message has the end of its output.
        subprocess.TimeoutExpired: It took longer than `timeout` seconds.
    """
    count = max(args.least, args.rounds * concurrency)
    backend = f"kind=openai_http,target={args.url},model={model},request_format=/v1/completions"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [find_guidellm(), "run"]
        command += ["--backend", backend]
        command += ["--profile", f"kind=concurrent,streams={concurrency}"]
        command += ["--constraint", f"kind=max_requests,count={count}"]
        command += ["--data", describe_data(args)]
        command += ["--tokenizer", f"kind=huggingface_auto,model={tokenizer}"]
        command += ["--output", f"kind=json,path={report}"]

        # On a terminal guidellm shows its progress there. Elsewhere all of its output is kept for
        # the error.
        stderr = None
        if not sys.stderr.isatty():
            command.append("--disable-console")
            stderr = subprocess.STDOUT
        run = subprocess.run(
            command, text=True, stdout=subprocess.PIPE, stderr=stderr, timeout=timeout, check=False
        )
        if run.returncode != 0 or not report.exists():
            raise RuntimeError(f"guidellm ended with {run.returncode}: {run.stdout[-2000:]}")
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    return read_row(benchmark, concurrency, count)


def read_row(benchmark: dict[str, Any], concurrency: int, count: int) -> Row:
    """Read guidellm's report of `count` requests."""
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    if totals["total"] < count:
        raise RuntimeError(f"{totals['total']} of {count} requests are in guidellm's report")

    def read_latency(name: str) -> tuple[float, float, float]:
        values = metrics[name]["successful"]
        percentiles = values["percentiles"]
        return (
            round(values["mean"], 3),
            round(percentiles["p50"], 3),
            round(percentiles["p99"], 3),
        )

    input_tokens = metrics["prompt_token_count"]["successful"]
    output_tokens = metrics["output_token_count"]["successful"]
    return Row(
        concurrency=concurrency,
        requests=totals["total"],
        errors=totals["errored"] + totals["incomplete"],
        output_tokens_per_s=round(output_tokens["total_sum"] / benchmark["duration"], 2),
        input_tokens=round(input_tokens["mean"], 1),
        output_tokens=round(output_tokens["mean"], 1),
        ttft_ms=read_latency(LATENCIES["ttft_ms"]),
        tpot_ms=read_latency(LATENCIES["tpot_ms"]),
        itl_ms=read_latency(LATENCIES["itl_ms"]),
    )


def format_table(label: str, rows: list[Row]) -> str:
    """A table in Markdown."""
    average = f"{rows[0].input_tokens:.0f} tokens in and {rows[0].output_tokens:.0f} out on average"
    header = [
        "concurrency",
        "output tok/s",
        "TTFT ms, mean / p50 / p99",
        "TPOT ms",
        "ITL ms",
        "requests",
        "errors",
    ]
    lines = [
        f"**{label}**, {average}",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for row in rows:
        cells = [f"{row.concurrency}", f"{row.output_tokens_per_s:,.0f}"]
        for latency in (row.ttft_ms, row.tpot_ms, row.itl_ms):
            cells.append(" / ".join(f"{value:,.1f}" for value in latency))
        cells += [f"{row.requests}", f"{row.errors}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, list[Row]], file: str) -> None:
    """Draw output tokens/s, TTFT and ITL over concurrency, with one line per result."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    # Title, whether the y axis is logarithmic, and the value of a row.
    panels: tuple[tuple[str, bool, Callable[[Row], float]], ...] = (
        ("output tokens per second", False, lambda row: row.output_tokens_per_s),
        ("time to first token, median (ms)", True, lambda row: row.ttft_ms[1]),
        ("time between tokens, median (ms)", False, lambda row: row.itl_ms[1]),
    )
    levels = sorted({row.concurrency for rows in results.values() for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4), constrained_layout=True)
    for axis, (title, is_logarithmic, read) in zip(axes, panels, strict=True):
        for label, rows in results.items():
            x = [row.concurrency for row in rows]
            y = [read(row) for row in rows]
            axis.plot(x, y, marker="o", label=label)
        axis.set(title=title, xlabel="concurrent requests")
        axis.set_xscale("log", base=2)
        axis.set_xticks(levels, [str(level) for level in levels])
        axis.minorticks_off()
        if is_logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:,.0f}")
            axis.yaxis.set_minor_formatter("{x:,.0f}")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=150)


def read_results(files: list[str]) -> dict[str, list[Row]]:
    """Read the rows of --json files, by label."""
    results = {}
    for file in files:
        content = json.loads(Path(file).read_text())
        results[content["label"]] = [Row(**row) for row in content["rows"]]
    return results


def run_levels(args: argparse.Namespace) -> tuple[str, list[Row]]:
    """Load the server at every concurrency. Returns the label of the results and their rows."""
    try:
        model, root = find_model(args.url)
    except OSError as error:
        raise SystemExit(f"{args.url} cannot be reached: {error}") from None

    label = args.label or model
    tokenizer = args.tokenizer or root
    rows = []
    for concurrency in args.concurrency.split(","):
        row = run_load(args, int(concurrency), model, tokenizer)
        print(json.dumps(asdict(row)), flush=True)
        rows.append(row)
    return label, rows


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("url", nargs="?", help="the server's URL, without /v1")
    add(
        "--concurrency",
        default="1,8,32,64,128,256,512",
        help="levels of concurrent requests, separated by commas",
    )
    add("--input-len", type=int, default=4000, help="mean number of prompt tokens")
    add("--output-len", type=int, default=1500, help="mean number of generated tokens")
    add("--spread", type=int, default=10, help="standard deviation of both, in per cent")
    add(
        "--rounds",
        type=int,
        default=4,
        help="a level has this many times its concurrency in requests",
    )
    add("--least", type=int, default=8, help="minimum number of requests per level")
    add("--tokenizer", help="directory or hub name; default: what /v1/models says")
    add("--label", help="name of these results; default: the model's name")
    add("--json", help="write the results to this file")
    add("--plot", help="draw the results in this file, .png or .svg")
    add(
        "--compare",
        nargs="+",
        metavar="JSON",
        default=[],
        help="earlier results to show as well; a URL is not needed then",
    )
    args = parser.parse_args(argv)
    if not args.url and not args.compare:
        parser.error("give a server's URL, or --compare with results")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    results = read_results(args.compare)
    if args.url:
        label, rows = run_levels(args)
        results[label] = rows
        if args.json:
            content = {"label": label, "rows": [asdict(row) for row in rows]}
            Path(args.json).write_text(json.dumps(content, indent=1))
    for label, rows in results.items():
        print(f"\n{format_table(label, rows)}")
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
