"""The serving part of `evidence.py`: real engines under the load of `emulated_load.py`."""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import re
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import emulated_report
import seed_figures
from emulated_load import run_load
from evidence_parts import (
    NO_CHART,
    Context,
    describe_error,
    has_matplotlib,
    write_notes,
    write_table,
)

from minidcp.choose_attention import find_fa3_obstacle, find_flashinfer_obstacle
from minidcp.config import EngineConfig
from minidcp.engine.engine import LLMEngine
from minidcp.engine.executor import Executor
from minidcp.machine import detect_machine
from minidcp.model_config import ModelConfig
from minidcp.resolve import ResolvedConfig

# Pairs of an exchange ("tp": without DCP) and a quantization, the most interesting first.
ORDER = (
    ("p2p", "none"),
    ("p2p", "fp8"),
    ("tp", "none"),
    ("a2a", "none"),
    ("ag_rs", "none"),
    ("tp", "fp8"),
    ("a2a", "fp8"),
    ("ag_rs", "fp8"),
)
# What the emulation part needs to know to repeat the load.
LOAD = ("concurrency", "input_len", "output_len", "spread", "rounds", "least", "seed")
SETTINGS = ("layers", *LOAD)
IDLE_MIB = 4096  # a GPU that has no more in use is free
FREE_SECONDS = 15.0  # how long the memory of a closed engine may take to become free
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class RealSetup:
    """A way to serve the model. The name is that of `serving_emulated.py`."""

    tp_size: int
    exchange: str
    backend: str
    quantization: str

    @property
    def dcp_size(self) -> int:
        return 1 if self.exchange == "tp" else self.tp_size

    @property
    def name(self) -> str:
        name = f"TP{self.tp_size}"
        return name if self.dcp_size == 1 else f"{name} DCP{self.dcp_size} {self.exchange}"

    @property
    def label(self) -> str:
        weights = "fp8" if self.quantization == "fp8" else "bf16"
        if self.backend == "reference":
            weights = weights.replace("bf16", "fp32")
        return f"{self.name} {self.backend} {weights}"

    def make_config(self, model: Path, device: str, args: argparse.Namespace) -> EngineConfig:
        longest = int((args.input_len + args.output_len) * (1 + args.spread / 100))
        return EngineConfig(
            str(model),
            tp_size=self.tp_size,
            dcp_size=self.dcp_size,
            device=device,
            quantization=self.quantization,
            attention_backend=self.backend,
            dcp_comm_backend="auto" if self.dcp_size == 1 else self.exchange,
            ranks="threads" if device == "cpu" else "auto",
            max_model_len=longest + 2,
            max_num_seqs=max(args.concurrency),
            prefix_cache=False,
            load_format="dummy",
        )


def find_backends(context: Context, notes: list[str]) -> list[str]:
    """The attention back-ends to measure: FA3 and FlashInfer where they run, else Triton."""
    if context.device == "cpu":
        return ["reference"]
    model_config = ModelConfig.from_hf(context.model)
    config = EngineConfig(str(context.model), tp_size=context.tp_size, attention_backend="fa3")
    machine = detect_machine(config, model_config)
    obstacle = find_fa3_obstacle(model_config, machine)
    backends = []
    if obstacle:
        notes.append(f"fa3: {obstacle}")
    else:
        backends.append("fa3")
    # Its kernel is compiled by the first engine that uses it, which may be after all others.
    obstacle = find_flashinfer_obstacle(config, model_config, machine)
    if importlib.util.find_spec("flashinfer") is None:
        obstacle = "is not installed"
    if obstacle:
        notes.append(f"flashinfer: {obstacle}")
    else:
        backends.append("flashinfer")
    return backends or ["triton"]


def list_setups(tp_size: int, backends: list[str], only: str) -> list[RealSetup]:
    setups = []
    for backend, (exchange, quantization) in product(backends, ORDER):
        setup = RealSetup(tp_size, exchange, backend, quantization)
        is_possible = tp_size > 1 or exchange == "tp"
        if is_possible and re.search(only, setup.label):
            setups.append(setup)
    return setups


class Watchdog:
    """Closes an engine when its time is over, even if it hangs or has not started yet."""

    def __init__(self, seconds: float) -> None:
        self.has_fired = False
        self.executor: Executor | None = None
        self.timer = threading.Timer(seconds, self.fire)
        self.timer.daemon = True
        self.timer.start()

    def start(self, config: ResolvedConfig, model_config: ModelConfig) -> Executor:
        """What LLMEngine starts its ranks with."""
        self.executor = Executor(config, model_config)
        if self.has_fired:
            self.executor.close()
        return self.executor

    def fire(self) -> None:
        self.has_fired = True
        if self.executor is not None:
            self.executor.close()

    def stop(self) -> None:
        self.timer.cancel()


def serve(
    setup: RealSetup, context: Context, result: dict[str, Any], save: Callable[[], None]
) -> None:
    """Serve the load at every concurrency. Adds rows, or an error, to `result`."""
    args = context.args
    watchdog = Watchdog(max(0.0, context.seconds_left))
    engine = None
    level = 0
    try:
        start = time.monotonic()
        config = setup.make_config(context.model, context.device, args)
        engine = LLMEngine(config, watchdog.start)
        result["start_seconds"] = round(time.monotonic() - start, 1)
        result["comm"] = engine.config.comm
        result["capacity_tokens"] = engine.blocks.num_blocks * engine.blocks.tokens_per_block
        warm_up(engine, args)
        level_seconds = 0.0
        for level in args.concurrency:
            # A level takes no less time than the one before it, which had fewer requests.
            if context.seconds_left < level_seconds:
                break
            row = run_load(engine, time.perf_counter, args, level)
            level_seconds = row.seconds
            result["rows"].append(asdict(row))
            print(f"{setup.label}: {row}", flush=True)
            save()
    except Exception as error:
        result["error"] = describe_error(error)
        if watchdog.has_fired:
            result["error"] = f"cut off at concurrency {level or args.concurrency[0]}"
    finally:
        watchdog.stop()
        if engine is not None:
            engine.close()
    del engine
    gc.collect()


def warm_up(engine: LLMEngine, args: argparse.Namespace) -> None:
    """One request that is not counted."""
    short = copy.copy(args)
    short.output_len = WARM_UP_TOKENS
    short.least = short.rounds = 1
    run_load(engine, time.perf_counter, short, 1)


def wait_for_memory(device: str) -> None:
    """Wait until the memory of an engine that was closed is free. Its processes take a moment."""
    if device == "cpu":
        return
    deadline = time.monotonic() + FREE_SECONDS
    while time.monotonic() < deadline:
        used_mib = read_used_mib()
        if used_mib is None:
            time.sleep(3.0)
            return
        if used_mib < IDLE_MIB:
            return
        time.sleep(0.3)


def read_used_mib() -> int | None:
    """The memory in use on the fullest GPU, if nvidia-smi tells."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return max(int(number) for number in run.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def run_serving(context: Context) -> None:
    """Every set-up at every concurrency, as far as the time goes."""
    args = context.args
    notes: list[str] = []
    results: list[dict[str, Any]] = []
    backends = args.backends.split(",") if args.backends else find_backends(context, notes)
    start_seconds = 0.0
    for setup in list_setups(context.tp_size, backends, args.only):
        result: dict[str, Any] = {**asdict(setup), "setup": setup.name, "label": setup.label}
        result |= {"clock": "measured", "rows": [], "error": ""}
        if context.seconds_left <= start_seconds:
            notes.append(f"{setup.label}: left out, the time was over")
            continue
        results.append(result)
        serve(setup, context, result, lambda: save_serving(context, results, notes))
        start_seconds = result.get("start_seconds", start_seconds)
        save_serving(context, results, notes)
        wait_for_memory(context.device)

    drawn = [{**result, "setup": result["label"]} for result in results if result["rows"]]
    if drawn and has_matplotlib():
        file = str(args.out / "serving.png")
        emulated_report.draw(drawn, describe_load(context), file)
    elif drawn:
        notes.append(NO_CHART)
    save_serving(context, results, notes)


def describe_load(context: Context) -> str:
    args = context.args
    layers = ModelConfig.from_hf(context.model).num_hidden_layers
    text = (
        f"{context.model.name}, {layers} layers, random weights; prompts of about "
        f"{args.input_len:,} tokens, answers of about {args.output_len:,} (± {args.spread} %), "
        f"{args.rounds} × the concurrency in requests, at least {args.least}; {context.where}"
    )
    if args.output_len != 1500:
        text += ". The answers are not as long as SGLang's 1,500"
    return text


def save_serving(context: Context, results: list[dict[str, Any]], notes: list[str]) -> None:
    levels = context.args.concurrency
    parts = [
        describe_load(context),
        "**Output tokens/s** by concurrent requests",
        write_metric(results, levels, lambda row: row["output_tokens_per_s"])
        + write_seed_rows(seed_figures.TOKENS_PER_S, seed_figures.find_tokens_per_s, levels),
        "**Mean time to first token (ms)**",
        write_metric(results, levels, lambda row: row["ttft_ms"][0])
        + write_seed_rows(seed_figures.TTFT_MS, seed_figures.find_ttft_ms, levels),
        "**Mean time per token after the first (ms)**; SGLang's pull requests have none",
        write_metric(results, levels, lambda row: row["itl_ms"][0]),
        f"SGLang: {seed_figures.SOURCE}.",
    ]
    all_notes = list(notes)
    for result in results:
        done = {row["concurrency"] for row in result["rows"]}
        missing = [str(level) for level in levels if level not in done]
        if result["error"] or missing:
            what = result["error"] or "the time was over"
            all_notes.append(
                f"{result['label']}: without {', '.join(missing) or 'nothing'}: {what}"
            )
    settings = {name: getattr(context.args, name) for name in SETTINGS}
    settings |= {"tp_size": context.tp_size, "device": context.device}
    settings["model"] = context.args.model and str(context.args.model)
    content = {"settings": settings, "results": results, "notes": all_notes}
    context.save("serving", content, "\n\n".join(parts) + "\n" + write_notes(all_notes))


def write_metric(
    results: list[dict[str, Any]], levels: list[int], read: Callable[[dict[str, Any]], float]
) -> str:
    """A row for each set-up, a column for each concurrency."""
    rows = []
    for result in results:
        values = {row["concurrency"]: read(row) for row in result["rows"]}
        rows.append([result["label"], *write_cells(values, levels)])
        if result["error"] and not values:
            rows[-1][1] = result["error"].replace("|", "/")
    return write_table(["", *map(str, levels)], rows)


def write_seed_rows(
    table: dict[tuple[str, str], Any],
    find: Callable[[str, str], dict[int, float]],
    levels: list[int],
) -> str:
    """More rows of that table."""
    lines = ""
    for setup, backend in table:
        cells = write_cells(find(setup, backend), levels)
        lines += f"\n| SGLang, {setup} {backend} | {' | '.join(cells)} |"
    return lines


def write_cells(values: dict[int, float], levels: list[int]) -> list[str]:
    cells = []
    for level in levels:
        value = values.get(level)
        if value is None:
            cells.append("–")
        else:
            cells.append(f"{value:,.0f}" if value >= 100 else f"{value:,.1f}")
    return cells
