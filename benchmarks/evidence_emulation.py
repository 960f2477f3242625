"""The emulation part of `evidence.py`: how far off estimates were from what was served.

It reads the serving part's JSON. `serving_emulated.py` simulates the same load, from step times of
one rank that are measured here, and `minidcp plan` estimates the same steps and caches.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulated_report
import serving_emulated
from emulation import Link, calibrate_wait
from evidence_parts import Context, describe_error, has_matplotlib, write_notes, write_table
from evidence_serving import RealSetup
from step_times import StepTimes

from minidcp.hardware import GPUS
from minidcp.plan import Deployment

STEP_TOKENS = {"cpu": 2048, "cuda": 8192}  # of the engine, by default


def run_emulation(context: Context) -> None:
    """Compare simulation and plan with each row of the serving part."""
    file = context.args.out / "serving.json"
    if not file.exists():
        notes = [f"{file.name} is missing: run --part serving with the same --out first"]
        context.save("emulation", {"notes": notes}, write_notes(notes))
        return
    measured = json.loads(file.read_text())
    notes = []
    rows: list[list[object]] = []
    capacities: list[list[object]] = []
    drawn = []
    results = [result for result in measured["results"] if result["rows"]]
    for result in results:
        try:
            plan(context, measured, result, rows, capacities)
        except Exception as error:
            notes.append(f"plan, {result['label']}: {describe_error(error)}")
    save(context, rows, capacities, notes)

    for result in results:
        if context.seconds_left <= 0:
            notes.append(f"simulation, {result['label']}: left out, the time was over")
            continue
        try:
            with one_rank_alone():
                simulated = simulate(context, measured, result)
        except (Exception, SystemExit) as error:
            notes.append(f"simulation, {result['label']}: {describe_error(error)}")
            continue
        compare_rows(rows, result, simulated)
        drawn += [{**simulated, "setup": result["label"]}, {**result, "setup": result["label"]}]
        save(context, rows, capacities, notes)
    if drawn and has_matplotlib():
        emulated_report.draw(drawn, context.where, str(context.args.out / "emulation.png"))
    save(context, rows, capacities, notes)


def measure_error(estimate: float, measured: float) -> str:
    """How much too high an estimate is, in per cent."""
    return f"{100 * (estimate / measured - 1):+.0f} %" if measured > 0 else "–"


def plan(
    context: Context,
    measured: dict[str, Any],
    result: dict[str, Any],
    rows: list[list[object]],
    capacities: list[list[object]],
) -> None:
    """Add what `minidcp plan` says about the size of the cache, and about decode steps."""
    settings = argparse.Namespace(**measured["settings"])
    setup = read_setup(result)
    # A plan is for GPUs, also where a CPU was measured.
    config = setup.make_config(context.model, "cuda", settings)
    config = replace(config, attention_backend="auto")
    tokens = settings.input_len + settings.output_len // 2
    deployment = Deployment(config, GPUS[find_gpu_name(measured["where"])], tokens)
    planned = deployment.memory["capacity"]
    held = result["capacity_tokens"]
    capacities.append([result["label"], planned, held, measure_error(planned, held)])
    for row in result["rows"]:
        step_ms = deployment.time_step(row["concurrency"])["step_ms"]
        add_row(rows, result, row, "plan", "step (ms), median", step_ms, row["itl_ms"][1])


def find_gpu_name(where: str) -> str:
    """The GPU in `hardware.GPUS` that these words name; an H100 if they name none."""
    return next((name for name in GPUS if name in where.lower()), "h100")


def read_setup(result: dict[str, Any]) -> RealSetup:
    names = ("tp_size", "exchange", "backend", "quantization")
    return RealSetup(**{name: result[name] for name in names})


def simulate(context: Context, measured: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Serve the same load on a simulated clock."""
    settings = measured["settings"]
    levels = [row["concurrency"] for row in result["rows"]]
    steps: Path = context.args.steps or context.args.out / f"steps-{result['quantization']}.json"
    flags = ["--model", str(context.model), "--tp-size", str(settings["tp_size"])]
    flags += ["--setups", result["exchange"], "--steps", str(steps)]
    flags += ["--quantization", result["quantization"], "--concurrency", join(levels)]
    for name in ("input_len", "output_len", "spread", "rounds", "least", "seed"):
        flags += [f"--{name.replace('_', '-')}", str(settings[name])]
    # Measured are steps that are full of prompts, which must be allowed to run together.
    step_tokens = STEP_TOKENS[settings["device"]]
    most = max(step_tokens // settings["input_len"] + 1, *settings["concurrency"])
    batches = [batch for batch in (1, 8, 16, 32, 64, 128, 256, 512) if batch <= most]
    flags += ["--batch", join(batches), "--repeats", str(context.args.repeats)]
    flags += ["--max-num-seqs", str(most)]
    flags += ["--max-num-batched-tokens", str(step_tokens)]
    args = serving_emulated.parse_args(flags)
    use_conditions_of(args, steps)

    setup = serving_emulated.Setup(args, result["exchange"])
    can_measure = settings["device"] == serving_emulated.DEVICE
    if not can_measure and setup.label not in list_measured(steps):
        raise ValueError(
            f"{steps.name} has no step times of {setup.label}; run this part on a GPU, or give "
            "--steps a file that has them"
        )
    wait = calibrate_wait() if serving_emulated.DEVICE == "cuda" else time.sleep
    link = Link(args.comm, args.link_gb_per_s * 1e9, wait)
    _, times = serving_emulated.load_times(args, [setup], link)
    step_times: StepTimes = times[setup.label]
    return serving_emulated.serve(setup, link, step_times)


def use_conditions_of(args: argparse.Namespace, steps: Path) -> None:
    """Take over how the times in a file were measured, where that is not about the model."""
    if steps.exists():
        conditions = json.loads(steps.read_text())["conditions"]
        is_fp8 = conditions["quantization"] == "fp8"
        if is_fp8 != (args.quantization == "fp8"):
            raise ValueError(
                f"{steps.name}: was measured with --quantization {conditions['quantization']}, "
                f"not {args.quantization}"
            )
        for name in ("quantization", "memory_gib", "max_num_seqs", "max_num_batched_tokens"):
            setattr(args, name, conditions[name])


def list_measured(steps: Path) -> list[str]:
    return list(json.loads(steps.read_text())["times"]) if steps.exists() else []


def join(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


@contextmanager
def one_rank_alone() -> Iterator[None]:
    """Say that this rank shares its GPU with no other, as `serving_emulated.py` does."""
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    try:
        yield
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
        if before is not None:
            os.environ["LOCAL_WORLD_SIZE"] = before


def compare_rows(
    rows: list[list[object]], result: dict[str, Any], simulated: dict[str, Any]
) -> None:
    for row, estimate in zip(result["rows"], simulated["rows"], strict=True):
        rate = "output_tokens_per_s"
        add_row(rows, result, row, "simulation", "output tokens/s", estimate[rate], row[rate])
        for name, key in (("mean TTFT (ms)", "ttft_ms"), ("mean time per token (ms)", "itl_ms")):
            add_row(rows, result, row, "simulation", name, estimate[key][0], row[key][0])


def add_row(
    rows: list[list[object]],
    result: dict[str, Any],
    row: dict[str, Any],
    source: str,
    what: str,
    estimate: float,
    measured: float,
) -> None:
    numbers = [f"{estimate:,.1f}", f"{measured:,.1f}", measure_error(estimate, measured)]
    rows.append([result["label"], row["concurrency"], source, what, *numbers])


def save(
    context: Context,
    rows: list[list[object]],
    capacities: list[list[object]],
    notes: list[str],
) -> None:
    head = ["set-up", "concurrency", "estimate of", "figure", "estimated", "measured", "off by"]
    sizes = ["set-up", "cache by plan (tokens)", "measured", "off by"]
    parts = [
        "Off by: how much higher the estimate is than what was measured. `minidcp plan` leaves out "
        "the time of prompts, so its step is compared with the median time between tokens.",
        write_table(sizes, capacities),
        write_table(head, rows),
    ]
    content = {"rows": [dict(zip(head, row, strict=True)) for row in rows], "notes": notes}
    content["capacities"] = [dict(zip(sizes, row, strict=True)) for row in capacities]
    context.save("emulation", content, "\n\n".join(parts) + "\n" + write_notes(notes))
