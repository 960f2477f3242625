"""Tables and charts of `serving_emulated.py`'s results."""

from __future__ import annotations

from typing import Any

from seed_figures import find_tokens_per_s, find_ttft_ms
from step_times import StepTimes

# Figures of SGLang's pull requests by concurrency: with FA3, but TTFT with FlashInfer.
SEED_TOKENS_PER_S = {
    setup: find_tokens_per_s(setup, "fa3") for setup in ("TP8", "TP8 DCP8 ag_rs", "TP8 DCP8 a2a")
}
SEED_TTFT_MS = {setup: find_ttft_ms(setup, "flashinfer") for setup in ("TP8", "TP8 DCP8 ag_rs")}


def format_times(label: str, times: StepTimes) -> str:
    """The measured steps as a table in Markdown, in ms."""
    sizes = " | ".join(f"{batch:.0f}" for batch, *_ in times.decode)
    lines = [
        f"**{label}**, emulated: ms of a step",
        "",
        f"| decode batch | {sizes} |",
        "|---" * (len(times.decode) + 1) + "|",
    ]
    for column, context in enumerate(times.contexts, start=1):
        cells = " | ".join(f"{row[column] * 1e3:.1f}" for row in times.decode)
        lines.append(f"| at {context:,} tokens | {cells} |")

    chunks = ", ".join(
        f"{seconds * 1e3:.0f} for {tokens:,.0f}" for tokens, seconds in times.prefill
    )
    lines += ["", f"ms of a step by its prompt tokens: {chunks}.", ""]
    return "\n".join(lines)


def format_table(result: dict[str, Any]) -> str:
    """The rows of one setup and clock as a table in Markdown."""
    capacity = f"KV cache of {result['capacity_tokens']:,} tokens"
    header = [
        "concurrency",
        "output tok/s",
        "TTFT ms, mean / p50 / p99",
        "ITL ms, mean / p50 / p99",
        "preemptions",
        "requests",
    ]
    lines = [
        f"**{result['setup']}**, emulated, {result['clock']} clock, {capacity}",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for row in result["rows"]:
        cells = [
            f"{row['concurrency']}",
            f"{row['output_tokens_per_s']:,.0f}",
            " / ".join(f"{value:,.0f}" for value in row["ttft_ms"]),
            " / ".join(f"{value:,.1f}" for value in row["itl_ms"]),
            f"{row['preemptions']}",
            f"{row['requests']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], title: str, file: str) -> None:
    """Draw output tokens/s and mean TTFT over concurrency: of simulations, and of real engines.

    The dashed lines are the figures of SGLang's pull requests, from real GPUs.
    """
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), constrained_layout=True)
    setups = dict.fromkeys(result["setup"] for result in results)
    colours = {setup: f"C{i}" for i, setup in enumerate(setups)}
    for result in results:
        draw_result(axes, result, colours[result["setup"]])

    levels = sorted({row["concurrency"] for result in results for row in result["rows"]})
    for axis, figures in zip(axes, (SEED_TOKENS_PER_S, SEED_TTFT_MS), strict=True):
        for setup, points in figures.items():
            axis.plot(
                list(points),
                list(points.values()),
                "--",
                color=colours.get(setup, "grey"),
                alpha=0.6,
                label=f"{setup}: SGLang's pull requests, 8 real H100s",
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(levels, [str(level) for level in levels])
        axis.minorticks_off()
        axis.set_xlabel("concurrent requests")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set(ylabel="output tokens per second", ylim=(0, None))
    axes[1].set(ylabel="mean time to first token (ms)", yscale="log")
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=150)


def draw_result(axes: Any, result: dict[str, Any], colour: str) -> None:
    """Add the lines of one setup and clock to both charts. Clock "measured" is a real engine."""
    rows = result["rows"]
    levels = [row["concurrency"] for row in rows]
    rates = [row["output_tokens_per_s"] for row in rows]
    ttfts = [row["ttft_ms"][0] for row in rows]
    clock = result["clock"]
    kind = "measured" if clock == "measured" else f"emulated, {clock} clock"
    label = f"{result['setup']}, {kind}"
    style = {"measured": "-s", "real": ":x", "simulated": "-o"}[clock]
    for axis, values in zip(axes, (rates, ttfts), strict=True):
        axis.plot(levels, values, style, color=colour, label=label)
