"""The engine under load as ONE rank of N on one GPU, with EMULATED collectives (`emulation.py`).

    # On a GPU: measure the times of single steps.
    python benchmarks/serving_emulated.py --measure-only --steps steps.json
    # Anywhere: simulate serving with these times.
    python benchmarks/serving_emulated.py --steps steps.json --plot serving.png
    # On a GPU: compare the simulation with steps that really run.
    python benchmarks/serving_emulated.py --clock real,simulated --concurrency 8 --rounds 1

It repeats the serving experiment of SGLang's pull requests 14194 and 21637, with real shapes,
random weights and the memory of another card, at the compute and memory speed of this one. `--clock
simulated` plans every step with the real scheduler and interpolates its time between measured
steps: hours of serving take minutes, on a CPU. `--clock real` shows how far to trust that. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from emulated_load import run_load
from emulated_report import draw, format_table, format_times
from emulation import EmulatedExecutor, Link, calibrate_wait, emulate_state
from step_times import SimulatedExecutor, StepTimes, measure

from minidcp.config import EngineConfig
from minidcp.engine.engine import LLMEngine
from minidcp.hardware import LINK_BYTES_PER_SECOND
from minidcp.machine import detect_machine
from minidcp.model_config import ModelConfig
from minidcp.parallel.exchange import EXCHANGES
from minidcp.parallel.state import ParallelState
from minidcp.resolve import ResolvedConfig, resolve

CONFIG = Path(__file__).parent / "configs" / "deepseek-v2"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Setup:
    """A way to serve the model: `exchange` is DCP's exchange, or "tp" to serve without DCP."""

    args: argparse.Namespace
    exchange: str

    @property
    def dcp_size(self) -> int:
        if self.exchange == "tp":
            return 1
        dcp_size: int = self.args.dcp_size or self.args.tp_size
        return dcp_size

    @property
    def label(self) -> str:
        label = f"TP{self.args.tp_size}"
        if self.dcp_size > 1:
            label += f" DCP{self.dcp_size} {self.exchange}"
        return label

    def make_config(self, device: str, dtype: str) -> EngineConfig:
        """The engine's configuration. The memory of the emulated card is a share of this one's."""
        args = self.args
        utilization = args.utilization
        if device == "cuda":
            _, total_bytes = torch.cuda.mem_get_info()
            utilization *= min(1.0, args.memory_gib * 2**30 / total_bytes)
        longest = int((args.input_len + args.output_len) * (1 + args.spread / 100))
        return EngineConfig(
            str(args.model),
            tp_size=args.tp_size,
            dcp_size=self.dcp_size,
            device=device,
            dtype=dtype,
            quantization=args.quantization,
            dcp_comm_backend="a2a" if self.dcp_size > 1 else "auto",
            ranks="threads" if device == "cpu" else "auto",
            max_model_len=longest + 2,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            gpu_memory_utilization=utilization,
            prefix_cache=False,
            load_format="dummy",
        )

    def set_exchange(self, config: ResolvedConfig) -> ResolvedConfig:
        """Put in the emulated exchange, which this machine may not be able to run for real."""
        if self.dcp_size == 1:
            return config
        return replace(config, dcp_comm_backend=self.exchange)

    def emulate(self, link: Link) -> ParallelState:
        if DEVICE == "cpu" and self.args.model == CONFIG:
            raise SystemExit(
                f"{self.label}: {CONFIG.name} runs on a GPU only; on a CPU give --steps a file "
                "with its measured times"
            )
        return emulate_state(self.args.tp_size, self.dcp_size, link, self.exchange)

    def measure(self, link: Link) -> StepTimes:
        """Measure the times of single steps on this machine."""
        args = self.args
        config = self.make_config(DEVICE, "auto")
        model_config = ModelConfig.from_hf(args.model)
        resolved = resolve(config, model_config, detect_machine(config, model_config))
        return measure(
            self.set_exchange(resolved),
            model_config,
            self.emulate(link),
            contexts=[args.input_len, args.input_len + args.output_len],
            batches=sorted({min(batch, args.max_num_seqs) for batch in args.batch}),
            repeats=args.repeats,
        )

    def start_simulated(self, times: StepTimes) -> tuple[LLMEngine, Callable[[], float]]:
        """An engine that runs no step, and its simulated clock."""
        config = self.make_config("cpu", times.dtype)
        engine = LLMEngine(config, partial(SimulatedExecutor, times))
        assert isinstance(engine.executor, SimulatedExecutor)
        return engine, engine.executor.now

    def start_real(self, link: Link) -> tuple[LLMEngine, Callable[[], float]]:
        """An engine that runs every step of rank 0, and the real clock."""
        state = self.emulate(link)

        def start(config: ResolvedConfig, model_config: ModelConfig) -> EmulatedExecutor:
            return EmulatedExecutor(state, self.set_exchange(config), model_config)

        engine = LLMEngine(self.make_config(DEVICE, "auto"), start)
        assert isinstance(engine.executor, EmulatedExecutor)
        return engine, engine.executor.now


def serve(setup: Setup, link: Link, times: StepTimes | None) -> dict[str, Any]:
    """Serve the load at every concurrency with one engine: simulated if there are step times."""
    if times is None:
        clock = "real"
        engine, now = setup.start_real(link)
    else:
        clock = "simulated"
        engine, now = setup.start_simulated(times)

    result: dict[str, Any] = {"setup": setup.label, "emulated": True, "clock": clock}
    rows = []
    try:
        for concurrency in setup.args.concurrency:
            row = asdict(run_load(engine, now, setup.args, concurrency))
            print(json.dumps({**result, **row}), flush=True)
            rows.append(row)
    finally:
        engine.close()
    result["capacity_tokens"] = engine.blocks.num_blocks * engine.blocks.tokens_per_block
    result["rows"] = rows
    return result


def load_times(
    args: argparse.Namespace, setups: list[Setup], link: Link
) -> tuple[str, dict[str, StepTimes]]:
    """Read the device and the step times from the file --steps.

    Times of these setups that the file lacks are measured and added to it.
    """
    conditions = {
        "model": args.model.name,
        "quantization": args.quantization,
        "link": str(link),
        "memory_gib": args.memory_gib,
        "utilization": args.utilization,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
    }
    content: dict[str, Any] = {
        "emulated": True,
        "device": name_device(),
        "conditions": conditions,
        "times": {},
    }
    if args.steps.exists():
        content = json.loads(args.steps.read_text())

    different = {}
    for name, value in content["conditions"].items():
        if conditions[name] != value:
            different[name] = value
    if different:
        raise SystemExit(
            f"--steps {args.steps}: was measured with {different}; choose the same, or another file"
        )

    for setup in setups:
        if setup.label not in content["times"]:
            start = time.perf_counter()
            content["times"][setup.label] = asdict(setup.measure(link))
            free_memory()
            args.steps.write_text(json.dumps(content, indent=1))
            seconds = time.perf_counter() - start
            print(f"{setup.label}: measured in {seconds:.0f} s", flush=True)
    times = {setup.label: StepTimes(**content["times"][setup.label]) for setup in setups}
    return content["device"], times


def free_memory() -> None:
    """Free the memory of an engine that is gone, for the next one."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def name_device() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "a CPU"


def parse_integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=CONFIG, help="directory with a config.json")
    add(
        "--quantization",
        default="auto",
        choices=("auto", "fp8", "none"),
        help="as for the engine; auto: fp8 if config.json says that the checkpoint is in FP8",
    )
    add("--tp-size", type=int, default=8, help="number of ranks, of which one runs here")
    add("--dcp-size", type=int, help="DCP size of the setups with DCP; default: --tp-size")
    add(
        "--setups",
        default="tp,ag_rs,a2a,p2p",
        help="setups, separated by commas: tp (no DCP), or an exchange",
    )
    add(
        "--comm",
        default="symmetric",
        choices=("symmetric", "nccl"),
        help="whose latencies are emulated",
    )
    add(
        "--link-gb-per-s",
        type=float,
        default=LINK_BYTES_PER_SECOND / 1e9,
        help="emulated bandwidth of a rank's link",
    )
    add(
        "--memory-gib",
        type=float,
        default=79.1,
        help="memory of the emulated card; an H100 of 80 GB reports 79.1",
    )
    add("--utilization", type=float, default=0.9, help="--gpu-memory-utilization on that card")
    add("--clock", default="simulated", help="simulated, real, or both with a comma")
    add(
        "--steps",
        type=Path,
        default=Path("steps.json"),
        help="file of step times; times that it lacks are measured and added",
    )
    add("--measure-only", action="store_true", help="measure step times and stop")
    add("--repeats", type=int, default=5, help="a step time is the mean of this many steps")
    add(
        "--batch",
        type=parse_integers,
        default=[1, 8, 16, 32, 64, 128, 256, 512],
        help="decode batches to measure",
    )
    add(
        "--concurrency",
        type=parse_integers,
        default=[1, 8, 32, 64, 128, 256, 512],
        help="levels of concurrent requests",
    )
    add("--input-len", type=int, default=4000, help="mean number of prompt tokens")
    add("--output-len", type=int, default=1500, help="mean number of generated tokens")
    add(
        "--spread", type=int, default=20, help="lengths differ from the mean by up to this per cent"
    )
    add(
        "--rounds",
        type=int,
        default=4,
        help="a level has this many times its concurrency in requests",
    )
    add("--least", type=int, default=8, help="minimum number of requests per level")
    add("--seed", type=int, default=0, help="seed of the load")
    add("--max-num-seqs", type=int, default=512, help="requests that run at once")
    add("--max-num-batched-tokens", type=int, default=8192, help="tokens of a step")
    add("--json", help="write the results to this file")
    add("--plot", help="draw the results in this file, .png or .svg")
    args = parser.parse_args(argv)

    args.setups = args.setups.split(",")
    args.clock = args.clock.split(",")
    unknown = set(args.setups) - {"tp", *EXCHANGES}
    unknown.update(set(args.clock) - {"simulated", "real"})
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.comm == "nccl" and "p2p" in args.setups:
        parser.error("--comm nccl has no p2p exchange; leave it out of --setups")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    random.seed(args.seed)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # this rank shares its GPU with no other
    wait = calibrate_wait() if DEVICE == "cuda" else time.sleep
    link = Link(args.comm, args.link_gb_per_s * 1e9, wait)

    setups = [Setup(args, exchange) for exchange in args.setups]
    device = name_device()
    times: dict[str, StepTimes] = {}
    if "simulated" in args.clock or args.measure_only:
        device, times = load_times(args, setups, link)
    title = (
        f"EMULATED: one of {args.tp_size} ranks of {args.model.name} on {device}, "
        f"{args.memory_gib} GiB × {args.utilization}, collectives {link}"
    )
    print(f"{title}\n")
    for label, step_times in times.items():
        print(format_times(label, step_times))
    if args.measure_only:
        return

    results = []
    for setup in setups:
        for clock in args.clock:
            setup_times = times[setup.label] if clock == "simulated" else None
            results.append(serve(setup, link, setup_times))
            free_memory()
    for result in results:
        print(f"\n{format_table(result)}")

    summary = {
        "emulated": title,
        "spread": args.spread,
        "rounds": args.rounds,
        "results": results,
    }
    if args.json:
        Path(args.json).write_text(json.dumps(summary, indent=1))
    if args.plot:
        draw(results, title, args.plot)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
