"""The engine under load as ONE rank of N on one GPU: real shapes, random weights, EMULATED collectives (`emulation.py`)
and the memory of another card. It repeats the serving experiment of SGLang's pull requests 14194 and 21637.

    python benchmarks/serving_emulated.py --measure-only --steps steps.json        # on a GPU: times of single steps
    python benchmarks/serving_emulated.py --steps steps.json --plot serving.png    # anywhere: serving, from these
    python benchmarks/serving_emulated.py --clock real,simulated --concurrency 8,64 --output-len 60 --rounds 1

With `--clock simulated` the engine's real scheduler and block manager plan every step of the load, and a step lasts as
the measured ones say, with straight lines between them; so hours of serving take minutes, on a CPU. With `--clock real`
every step runs, which tells how far the simulation can be trusted. Compute and memory bandwidth are those of the card
it runs on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emulation import EmulatedExecutor, Link, calibrate_wait, emulate_state
from step_times import GREEDY, SimulatedExecutor, StepTimes, measure

from minidcp.config import EngineConfig
from minidcp.engine.engine import LLMEngine, resolve
from minidcp.parallel.exchange import EXCHANGES
from minidcp.parallel.state import ParallelState

CONFIG = Path(__file__).parent / "configs" / "deepseek-v2"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The figures of those pull requests: DeepSeek-V2 on 8 real H100s, FA3 (TTFT: FlashInfer), by concurrency.
SEED_TOKENS_PER_S = {
    "TP8": {1: 103, 8: 492, 32: 1058, 64: 1370, 128: 1358, 256: 1384, 512: 1382},
    "TP8 DCP8 ag_rs": {1: 90, 8: 425, 32: 953, 64: 1358, 128: 1961, 256: 2572, 512: 2930},
    "TP8 DCP8 a2a": {1: 87, 8: 413, 32: 936, 64: 1341, 128: 1933, 256: 2570, 512: 2951},
}
SEED_TTFT_MS = {
    "TP8": {32: 413, 64: 5744, 128: 39672, 256: 106844, 512: 239577},
    "TP8 DCP8 ag_rs": {32: 420, 64: 655, 128: 1095, 256: 1970, 512: 28734},
}


@dataclass(frozen=True)
class Setup:
    """What is served how: `exchange` is "tp" without DCP."""

    args: argparse.Namespace
    exchange: str

    @property
    def dcp_size(self) -> int:
        return 1 if self.exchange == "tp" else self.args.dcp_size or self.args.tp_size

    @property
    def label(self) -> str:
        return f"TP{self.args.tp_size}" + (f" DCP{self.dcp_size} {self.exchange}" if self.dcp_size > 1 else "")

    def config(self, device: str, dtype: str) -> EngineConfig:
        """With the emulated card's memory as a share of this one's."""
        args, share = self.args, self.args.utilization
        if device == "cuda":
            share *= min(1.0, args.memory_gib * 2**30 / torch.cuda.mem_get_info()[1])
        return EngineConfig(
            str(args.model), tp_size=args.tp_size, dcp_size=self.dcp_size, device=device, dtype=dtype,
            dcp_comm_backend="a2a" if self.dcp_size > 1 else "auto", ranks="threads" if device == "cpu" else "auto",
            max_model_len=int((args.input_len + args.output_len) * (1 + args.spread / 100)) + 2,
            max_num_seqs=args.max_num_seqs, max_num_batched_tokens=args.max_num_batched_tokens,
            gpu_memory_utilization=share, prefix_cache=False, load_format="dummy",
        )  # fmt: skip

    def on_rank(self, config: EngineConfig) -> EngineConfig:
        """A resolved configuration with the exchange that is emulated, wherever this runs."""
        return replace(config, dcp_comm_backend=self.exchange) if self.dcp_size > 1 else config

    def emulate(self, link: Link) -> ParallelState:
        if DEVICE == "cpu" and self.args.model == CONFIG:
            raise SystemExit(f"{self.label}: {CONFIG.name} runs on a GPU only; --steps with its measured times on CPUs")
        return emulate_state(self.args.tp_size, self.dcp_size, link)

    def measure(self, link: Link) -> StepTimes:
        config, model_config = resolve(self.config(DEVICE, "auto"))
        contexts = [self.args.input_len, self.args.input_len + self.args.output_len]
        batches = sorted({min(b, self.args.max_num_seqs) for b in self.args.batch})
        return measure(self.on_rank(config), model_config, self.emulate(link), contexts, batches, self.args.repeats)

    def start(self, link: Link, times: StepTimes | None) -> tuple[LLMEngine, Callable[[], float]]:
        """An engine and its clock: simulated, if there are step times."""
        if times is not None:
            engine = LLMEngine(self.config("cpu", times.dtype), partial(SimulatedExecutor, times))
        else:
            state = self.emulate(link)
            engine = LLMEngine(self.config(DEVICE, "auto"), lambda c, m: EmulatedExecutor(state, self.on_rank(c), m))
        executor = engine.executor
        assert isinstance(executor, SimulatedExecutor | EmulatedExecutor)
        return engine, executor.now


@dataclass(frozen=True)
class Row:
    """One concurrency. Latencies are in ms: (mean, median, 99th percentile)."""

    concurrency: int
    requests: int
    output_tokens_per_s: float
    ttft_ms: tuple[float, float, float]
    itl_ms: tuple[float, float, float]
    preemptions: int
    seconds: float


def draw_load(args: argparse.Namespace, count: int, vocab: int) -> Iterator[tuple[list[int], int]]:
    """Prompts and how many tokens each shall get: uniform within the spread, the same for every setup."""
    rng, spread = random.Random(args.seed), args.spread / 100
    for _ in range(count):
        prompt, output = (mean * rng.uniform(1 - spread, 1 + spread) for mean in (args.input_len, args.output_len))
        yield rng.choices(range(vocab), k=max(1, round(prompt))), max(1, round(output))


def run_load(engine: LLMEngine, now: Callable[[], float], args: argparse.Namespace, concurrency: int) -> Row:
    """`concurrency` clients, each of whom sends its next request when it has its answer. Raises RuntimeError if a
    request is lost or has not as many tokens as it wants."""
    load = enumerate(draw_load(args, max(args.least, args.rounds * concurrency), engine.model_config.vocab_size))
    begin, preempted = now(), engine.scheduler.num_preemptions
    wanted: dict[str, int] = {}
    stamps: dict[str, list[float]] = {}  # when a request was sent, and when each of its tokens came

    def send() -> None:
        for i, (prompt, length) in load:
            name = f"{concurrency}-{i}"
            wanted[name], stamps[name] = length, [now()]
            engine.add_request(name, prompt, replace(GREEDY, max_tokens=length))
            return

    for _ in range(concurrency):
        send()
    while engine.has_work:
        for delta in engine.step():
            stamps[delta.request_id].append(now())
            if delta.finish_reason is not None:
                send()
    seconds, tokens = now() - begin, sum(wanted.values())
    if lost := [name for name, length in wanted.items() if len(stamps[name]) != length + 1]:
        raise RuntimeError(f"requests without all their tokens: {lost}")
    ttft = np.array([s[1] - s[0] for s in stamps.values()])
    itl = np.concatenate([np.diff(s[1:]) for s in stamps.values()])
    preemptions = engine.scheduler.num_preemptions - preempted
    rate, latencies = round(tokens / seconds, 2), (summarise(ttft), summarise(itl))
    return Row(concurrency, len(wanted), rate, *latencies, preemptions, round(seconds, 3))


def summarise(seconds: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Mean, median and 99th percentile in ms."""
    if not len(seconds):  # one token a request has nothing between tokens
        return 0.0, 0.0, 0.0
    mean, p50, p99 = (round(float(x) * 1e3, 3) for x in (seconds.mean(), *np.percentile(seconds, [50, 99])))
    return mean, p50, p99


def serve(setup: Setup, link: Link, times: StepTimes | None) -> dict[str, Any]:
    """The load at every concurrency, on one engine."""
    clock = "real" if times is None else "simulated"
    result: dict[str, Any] = {"setup": setup.label, "emulated": True, "clock": clock}
    engine, now = setup.start(link, times)
    rows = []
    try:
        for concurrency in setup.args.concurrency:
            rows.append(asdict(run_load(engine, now, setup.args, concurrency)))
            print(json.dumps(result | rows[-1]), flush=True)
    finally:
        engine.close()
    return result | {"capacity_tokens": engine.blocks.num_blocks * engine.blocks.tokens_per_block, "rows": rows}


def load_times(args: argparse.Namespace, setups: list[Setup], link: Link) -> tuple[str, dict[str, StepTimes]]:
    """The device and the step times in the file --steps; what it lacks for these setups is measured and added."""
    names = ("memory_gib", "utilization", "max_num_seqs", "max_num_batched_tokens")
    given = {"model": args.model.name, "link": str(link)} | {name: getattr(args, name) for name in names}
    held: dict[str, Any] = {"emulated": True, "device": name_device(), "conditions": given, "times": {}}
    if args.steps.exists():
        held = json.loads(args.steps.read_text())
    if differing := {name: value for name, value in held["conditions"].items() if given[name] != value}:
        raise SystemExit(f"--steps {args.steps}: was measured with {differing}; choose the same, or another file")
    for setup in setups:
        if setup.label not in held["times"]:
            begin = time.perf_counter()
            held["times"][setup.label] = asdict(setup.measure(link))
            free_memory()
            args.steps.write_text(json.dumps(held, indent=1))
            print(f"{setup.label}: measured in {time.perf_counter() - begin:.0f} s", flush=True)
    return held["device"], {setup.label: StepTimes(**held["times"][setup.label]) for setup in setups}


def free_memory() -> None:
    """Of an engine that is gone, for the next one."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def name_device() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "a CPU"


def describe_times(label: str, times: StepTimes) -> str:
    """Markdown: measured steps in ms."""
    sizes = " | ".join(f"{batch:.0f}" for batch, *_ in times.decode)
    lines = [
        f"**{label}**, emulated: ms of a step",
        "",
        f"| decode batch | {sizes} |",
        "|---" * (len(times.decode) + 1) + "|",
    ]
    for i, context in enumerate(times.contexts):
        cells = " | ".join(f"{row[1 + i] * 1e3:.1f}" for row in times.decode)
        lines.append(f"| at {context:,} tokens | {cells} |")
    chunks = ", ".join(f"{seconds * 1e3:.0f} for {tokens:,.0f}" for tokens, seconds in times.prefill)
    return "\n".join([*lines, "", f"Prompt tokens of a step: {chunks}.", ""])


def write_table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"**{result['setup']}**, emulated, {result['clock']} clock, KV cache of {result['capacity_tokens']:,} tokens",
        "",
        "| concurrency | output tok/s | TTFT ms, mean / p50 / p99 | ITL ms, likewise | preemptions | requests |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ttft, itl = (" / ".join(f"{x:,.{d}f}" for x in row[name]) for name, d in (("ttft_ms", 0), ("itl_ms", 1)))
        rate, counts = f"{row['output_tokens_per_s']:,.0f}", f"{row['preemptions']} | {row['requests']}"
        lines.append(f"| {row['concurrency']} | {rate} | {ttft} | {itl} | {counts} |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], title: str, file: str) -> None:
    """Output tokens/s and mean TTFT over concurrency; dashed: the pull requests' own figures, from real GPUs."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), constrained_layout=True)
    colours = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(result["setup"] for result in results))}
    for result in results:
        rows, real = result["rows"], result["clock"] == "real"
        levels, label = [row["concurrency"] for row in rows], f"{result['setup']}, emulated, {result['clock']} clock"
        values = [row["output_tokens_per_s"] for row in rows], [row["ttft_ms"][0] for row in rows]
        for axis, line in zip(axes, values, strict=True):
            axis.plot(levels, line, ":x" if real else "-o", color=colours[result["setup"]], label=label)
    levels = sorted({row["concurrency"] for result in results for row in result["rows"]})
    for axis, figures in zip(axes, (SEED_TOKENS_PER_S, SEED_TTFT_MS), strict=True):
        for name, points in figures.items():
            label, colour = f"{name}: SGLang's pull requests, 8 real H100s", colours.get(name, "grey")
            axis.plot([*points], [*points.values()], "--", color=colour, alpha=0.6, label=label)
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=CONFIG, help="directory with a config.json")
    add("--tp-size", type=int, default=8, help="ranks, of which one is here")
    add("--dcp-size", type=int, help="of the setups with DCP; default: --tp-size")
    add("--setups", default="tp,ag_rs,a2a,p2p", help="tp: no DCP; else the exchange")
    add("--comm", default="symmetric", choices=("symmetric", "nccl"), help="whose latencies are emulated")
    add("--link-gb-per-s", type=float, default=350, help="emulated bandwidth of a rank's link")
    add("--memory-gib", type=float, default=79.1, help="of the emulated card; an H100 of 80 GB reports 79.1")
    add("--utilization", type=float, default=0.9, help="--gpu-memory-utilization on that card")
    add("--clock", default="simulated", help="simulated, real, or both by a comma")
    add("--steps", type=Path, default=Path("steps.json"), help="file of measured step times; what it lacks is measured")
    add("--measure-only", action="store_true", help="measure step times and stop")
    add("--repeats", type=int, default=5, help="steps of which a measured time is the mean")
    add("--batch", type=integers, default=[1, 8, 16, 32, 64, 128, 256, 512], help="decode batches to measure")
    add("--concurrency", type=integers, default=[1, 8, 32, 64, 128, 256, 512], help="requests at once")
    add("--input-len", type=int, default=4000, help="prompt tokens, mean")
    add("--output-len", type=int, default=1500, help="generated tokens, mean")
    add("--spread", type=int, default=20, help="both are uniform within so many per cent of their means")
    add("--rounds", type=int, default=4, help="requests per level: so many times its concurrency")
    add("--least", type=int, default=8, help="requests per level at least")
    add("--seed", type=int, default=0, help="of the load")
    add("--max-num-seqs", type=int, default=512, help="requests that run at once")
    add("--max-num-batched-tokens", type=int, default=8192, help="tokens of a step")
    add("--json", help="file for the results")
    add("--plot", help="file for charts, .png or .svg")
    args = parser.parse_args(argv)
    args.setups, args.clock = args.setups.split(","), args.clock.split(",")
    if unknown := set(args.setups) - {"tp", *EXCHANGES} or set(args.clock) - {"simulated", "real"}:
        parser.error(f"unknown: {', '.join(unknown)}")
    if args.comm == "nccl" and "p2p" in args.setups:
        parser.error("--comm nccl has no p2p exchange; leave it out of --setups")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    random.seed(args.seed)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # this rank shares its GPU with no other
    link = Link(args.comm, args.link_gb_per_s * 1e9, calibrate_wait() if DEVICE == "cuda" else time.sleep)
    setups, times = [Setup(args, exchange) for exchange in args.setups], dict[str, StepTimes]()
    device = name_device()
    if "simulated" in args.clock or args.measure_only:
        device, times = load_times(args, setups, link)
    memory = f"{args.memory_gib} GiB × {args.utilization}"
    title = f"EMULATED: one of {args.tp_size} ranks of {args.model.name} on {device}, {memory}, collectives {link}"
    print("\n".join([title, "", *(describe_times(label, table) for label, table in times.items())]))
    if args.measure_only:
        return
    results = []
    for setup in setups:
        for clock in args.clock:
            results.append(serve(setup, link, times[setup.label] if clock == "simulated" else None))
            free_memory()
    print("\n".join(["", *map(write_table, results)]))
    summary = {"emulated": title, "spread": args.spread, "rounds": args.rounds, "results": results}
    if args.json:
        Path(args.json).write_text(json.dumps(summary, indent=1))
    if args.plot:
        draw(results, title, args.plot)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
