"""Shows what `minidcp plan` estimates, as markdown tables and as a chart. The estimates themselves
are in `plan.py`."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from minidcp.plan import Deployment


def describe(title: str, deployments: list[Deployment], steps: list[dict[str, Any]]) -> str:
    """Markdown: a table of `Deployment.memory` and one of `Deployment.time_step`; bytes in GB."""
    paragraphs = [title, write_table([deployment.memory for deployment in deployments])]
    explanation = explain_weights(deployments)
    if explanation:
        paragraphs.append(explanation)

    rows = []
    for step in steps:
        row = {name: value for name, value in step.items() if name != "parts_ms"}
        for part, ms in step["parts_ms"].items():
            row[f"{part}_ms"] = ms
        rows.append(row)
    paragraphs.append(write_table(rows))
    if deployments[0].acceptance is not None:
        note = (
            "All drafts that a step has room for are counted. The engine proposes fewer where it "
            "measures that more do not pay"
        )
        if deployments[0].config.predicts:
            note += ", but always makes them."
        else:
            note += ", and none where a text does not repeat itself."
        paragraphs.append(note)
    return "\n\n".join(paragraphs)


def write_table(rows: list[dict[str, Any]]) -> str:
    """A markdown table with a column per key. Values whose key ends in _bytes are shown in GB."""
    heads = [name.replace("_bytes", "_GB").replace("_", " ") for name in rows[0]]
    lines = [write_row(heads), write_row("---" for _ in heads)]
    for row in rows:
        lines.append(write_row(write_cell(name, value) for name, value in row.items()))
    return "\n".join(lines)


def write_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_cell(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        value = value / 1e9
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}"


def explain_weights(deployments: list[Deployment]) -> str:
    """Why a larger DCP size leaves less room for a rank's cache. Empty where weights are equal."""
    by_weights = sorted(deployments, key=lambda deployment: deployment.memory["weight_bytes"])
    lightest = by_weights[0]
    heaviest = by_weights[-1]
    more_bytes = heaviest.memory["weight_bytes"] - lightest.memory["weight_bytes"]
    if more_bytes == 0:
        return ""

    weights = "W_UK and W_UV"
    if heaviest.config.replicates_q:
        weights = "W_UK, W_UV and the q projection"
    return (
        f"A rank holds {more_bytes / 1e9:.2f} GB more weights with dcp {heaviest.config.dcp_size} "
        f"than with dcp {lightest.config.dcp_size} ({weights} for all heads of its DCP group), "
        "which leaves less room for its KV cache."
    )


def draw(title: str, steps: list[dict[str, Any]], file: str) -> None:
    """Draw tokens/s over concurrency, a line per DCP size, in the format of the file's suffix."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"--plot {file}: needs matplotlib: pip install 'minidcp[bench]' ({error})"
        ) from None
    figure = Figure(figsize=(9, 5), constrained_layout=True)
    axis = figure.subplots()
    # Steps of one DCP size follow each other.
    for dcp_size, steps_of_size in groupby(steps, lambda step: step["dcp_size"]):
        points = [(step["concurrency"], step["tokens_per_s"]) for step in steps_of_size]
        concurrency, tokens_per_s = zip(*points, strict=True)
        axis.semilogx(concurrency, tokens_per_s, base=2, marker="o", label=f"dcp {dcp_size}")

    levels = sorted({step["concurrency"] for step in steps})
    axis.set(title=title, xticks=levels, xticklabels=levels)
    axis.set(xlabel="concurrent requests", ylabel="output tokens per second, estimated")
    axis.grid(alpha=0.3)
    axis.legend()
    try:
        figure.savefig(file)
    except OSError as error:
        raise ValueError(f"--plot {file}: cannot be written ({error})") from None
