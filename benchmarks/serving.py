"""Serving benchmark of any OpenAI-compatible server (ours, vLLM, SGLang): random prompts at rising concurrency.

    python benchmarks/serving.py http://localhost:8000 --concurrency 1,8,32,64,128,256,512 --json dcp8.json
    python benchmarks/serving.py --compare tp8.json dcp8.json --plot serving.png

The load is guidellm's (`pip install '.[bench]'`). A request that fails is counted and shown, never dropped. The second
form draws earlier results beside each other, and prints their tables.
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
    errors: int  # that failed or have no end
    output_tokens_per_s: float
    input_tokens: float  # of a request, mean
    output_tokens: float
    ttft_ms: tuple[float, float, float]
    tpot_ms: tuple[float, float, float]
    itl_ms: tuple[float, float, float]


def find_model(url: str) -> tuple[str, str]:
    """The served model's name, and where its tokenizer is: what /v1/models calls its root, else the name."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
        card = json.load(response)["data"][0]
    return card["id"], card.get("root") or card["id"]


def run_load(args: argparse.Namespace, concurrency: int, model: str, tokenizer: str) -> Row:
    """guidellm at one concurrency. Raises RuntimeError, with what it said, if it fails or loses a request."""
    count = max(args.least, args.rounds * concurrency)
    spread = args.spread / 100
    data = (
        f"kind=synthetic_text,prompt_tokens={args.input_len},prompt_tokens_stdev={int(args.input_len * spread)},"
        f"output_tokens={args.output_len},output_tokens_stdev={int(args.output_len * spread)}"
    )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        guidellm = shutil.which("guidellm", path=f"{Path(sys.executable).parent}") or shutil.which("guidellm")
        if guidellm is None:
            raise RuntimeError("guidellm is not installed: pip install 'minidcp[bench]'")
        command = [guidellm, "run", "--backend", f"kind=openai_http,target={args.url},model={model},"
                   "request_format=/v1/completions", "--profile", f"kind=concurrent,streams={concurrency}",
                   "--constraint", f"kind=max_requests,count={count}", "--data", data,
                   "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
                   "--output", f"kind=json,path={report}"]  # fmt: skip
        if not sys.stderr.isatty():
            command.append("--disable-console")
        run = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=None if sys.stderr.isatty() else
                             subprocess.STDOUT, check=False)  # fmt: skip
        if run.returncode != 0 or not report.exists():
            raise RuntimeError(f"guidellm ended with {run.returncode}: {run.stdout[-2000:]}")
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    return read_row(benchmark, concurrency, count)


def read_row(benchmark: dict[str, Any], concurrency: int, count: int) -> Row:
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    if totals["total"] < count:
        raise RuntimeError(f"{totals['total']} of {count} requests are in guidellm's report")

    def read(name: str) -> tuple[float, float, float]:
        values = metrics[name]["successful"]
        return round(values["mean"], 3), round(values["percentiles"]["p50"], 3), round(values["percentiles"]["p99"], 3)

    tokens = metrics["output_token_count"]["successful"]
    return Row(
        concurrency,
        totals["total"],
        totals["errored"] + totals["incomplete"],
        round(tokens["total_sum"] / benchmark["duration"], 2),
        round(metrics["prompt_token_count"]["successful"]["mean"], 1),
        round(tokens["mean"], 1),
        **{short: read(name) for short, name in LATENCIES.items()},
    )


def write_table(label: str, rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        f"**{label}**, {rows[0].input_tokens:.0f} tokens in and {rows[0].output_tokens:.0f} out on average",
        "",
        "| concurrency | output tok/s | TTFT ms, mean / p50 / p99 | TPOT ms | ITL ms | requests | errors |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [" / ".join(f"{value:,.1f}" for value in getattr(row, name)) for name in LATENCIES]
        numbers = [f"{row.concurrency}", f"{row.output_tokens_per_s:,.0f}", *cells, f"{row.requests}", f"{row.errors}"]
        lines.append(f"| {' | '.join(numbers)} |")
    return "\n".join(lines)


def draw(results: dict[str, list[Row]], file: str) -> None:
    """Output tokens/s, TTFT and time between tokens over concurrency; a line per result."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    panels: tuple[tuple[str, bool, Callable[[Row], float]], ...] = (
        ("output tokens per second", False, lambda row: row.output_tokens_per_s),
        ("time to first token, median (ms)", True, lambda row: row.ttft_ms[1]),
        ("time between tokens, median (ms)", False, lambda row: row.itl_ms[1]),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4), constrained_layout=True)
    for axis, (title, logarithmic, read) in zip(axes, panels, strict=True):
        for label, rows in results.items():
            axis.plot([row.concurrency for row in rows], [read(row) for row in rows], marker="o", label=label)
        levels = sorted({row.concurrency for rows in results.values() for row in rows})
        axis.set(title=title, xlabel="concurrent requests")
        axis.set_xscale("log", base=2)
        axis.set_xticks(levels, [str(level) for level in levels])
        axis.minorticks_off()
        if logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:,.0f}")
            axis.yaxis.set_minor_formatter("{x:,.0f}")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=150)


def read_results(files: list[str]) -> dict[str, list[Row]]:
    contents = [json.loads(Path(file).read_text()) for file in files]
    return {content["label"]: [Row(**row) for row in content["rows"]] for content in contents}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="of the server, without /v1")
    parser.add_argument("--concurrency", default="1,8,32,64,128,256,512", help="requests at once; several by commas")
    parser.add_argument("--input-len", type=int, default=4000, help="prompt tokens, mean")
    parser.add_argument("--output-len", type=int, default=1500, help="generated tokens, mean")
    parser.add_argument("--spread", type=int, default=10, help="standard deviation of both, in per cent")
    parser.add_argument("--rounds", type=int, default=4, help="requests per level: so many times its concurrency")
    parser.add_argument("--least", type=int, default=8, help="requests per level at least")
    parser.add_argument("--tokenizer", help="directory or hub name; default: what /v1/models says")
    parser.add_argument("--label", help="of these results; default: the model's name")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--plot", help="file for charts, .png or .svg")
    parser.add_argument("--compare", nargs="+", metavar="JSON", default=[], help="results to show, without a load")
    args = parser.parse_args(argv)
    if not args.url and not args.compare:
        parser.error("give a server's URL, or --compare with results")
    results = read_results(args.compare)
    if args.url:
        try:
            model, root = find_model(args.url)
        except OSError as error:
            raise SystemExit(f"{args.url} cannot be reached: {error}") from None
        label, rows = args.label or model, []
        for concurrency in map(int, args.concurrency.split(",")):
            rows.append(run_load(args, concurrency, model, args.tokenizer or root))
            print(json.dumps(asdict(rows[-1])), flush=True)
        results[label] = rows
        if args.json:
            Path(args.json).write_text(json.dumps({"label": label, "rows": [asdict(row) for row in rows]}, indent=1))
    for label, rows in results.items():
        print(f"\n{write_table(label, rows)}")
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
