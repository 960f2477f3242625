"""Make the evidence: every measurement of the project, on as many GPUs as there are.

    python benchmarks/evidence.py --out evidence                       # all parts
    python benchmarks/evidence.py --out evidence --part serving --seconds 540
    python benchmarks/evidence.py --out evidence --part serving --only 'p2p|TP8 fa3' \\
        --output-len 200 --concurrency 1,32,256

A part takes --seconds at most: what it has no time for is left out, and named. A set-up that fails
does not end the others; its error is in the table. Each part writes JSON, tables in Markdown and a
chart into the folder --out; evidence.md there has all tables. Without --model it takes DeepSeek-V2
with random weights: all 60 layers on eight GPUs, 30 on four, and V2-Lite on one or two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from collectives import SIZES
from evidence_emulation import run_emulation
from evidence_parts import (
    ROOT,
    Context,
    describe_error,
    run_accuracy,
    run_collectives,
    run_http,
    run_tests,
)
from evidence_serving import run_serving, wait_for_memory
from serving_emulated import parse_integers

CONFIGS = ROOT / "benchmarks" / "configs"
SHALLOW_LAYERS = 30  # of DeepSeek-V2, so that it fits on four GPUs of 80 GB
PARTS: dict[str, Callable[[Context], None]] = {
    "serving": run_serving,
    "collectives": run_collectives,
    "accuracy": run_accuracy,
    "tests": run_tests,
    "http": run_http,
    "emulation": run_emulation,  # after serving, with which it compares
}
GRACE_SECONDS = 45.0  # for a part to end by itself after its time; then it is ended


def choose_tp_size(device: str) -> int:
    """The number of GPUs, or the power of two below it, because it must divide the heads."""
    if device == "cpu":
        return 2
    count = min(8, torch.cuda.device_count())
    return 1 << (count.bit_length() - 1)


def choose_model(args: argparse.Namespace, tp_size: int) -> Path:
    """The folder of the model's config.json, which is made if other layers are asked for."""
    model = args.model
    layers = args.layers
    if model is None:
        model = CONFIGS / ("deepseek-v2-lite" if tp_size <= 2 else "deepseek-v2")
        if 2 < tp_size < 8:
            layers = layers or SHALLOW_LAYERS
    if layers is None:
        return Path(model)
    config = json.loads((model / "config.json").read_text())
    folder: Path = args.scratch / f"{model.name}-{layers}-layers"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return folder


def describe_hardware(device: str, tp_size: int) -> str:
    where = f"{tp_size} ranks on a CPU: this shows that it runs, not how fast"
    if device == "cuda":
        where = f"{tp_size} of {torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{where}; torch {torch.__version__}, commit {find_commit()}"


def find_commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip()


def run_part(args: argparse.Namespace) -> None:
    """Run one part in this process, which ends if the part does not stop in time."""

    def give_up() -> None:
        print(f"{args.part}: did not stop in time; what it had saved is kept", flush=True)
        os._exit(3)  # the ranks end with this process

    last_resort = threading.Timer(args.seconds + GRACE_SECONDS, give_up)
    last_resort.daemon = True
    last_resort.start()
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.part == "emulation":
        repeat_serving(args)
    tp_size = args.tp_size or choose_tp_size(device)
    for file in (*args.out.glob(f"{args.part}.*"), *args.out.glob(f"{args.part}-failed.*")):
        file.unlink()  # of an earlier run
    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = Path(scratch)
        model = choose_model(args, tp_size)
        context = Context(args, device, tp_size, model, describe_hardware(device, tp_size))
        try:
            PARTS[args.part](context)
        except Exception as error:
            failure = describe_error(error)
            context.save(f"{args.part}-failed", {"error": failure}, f"Failed: {failure}")
            print(f"{args.part}: {failure}", flush=True)
    last_resort.cancel()


def repeat_serving(args: argparse.Namespace) -> None:
    """Take the model and the ranks of the serving part, perhaps of another machine."""
    file = args.out / "serving.json"
    if file.exists():
        settings = json.loads(file.read_text())["settings"]
        args.model = settings["model"] and Path(settings["model"])
        args.layers = settings["layers"]
        args.tp_size = settings["tp_size"]


def run_all(argv: list[str], args: argparse.Namespace) -> None:
    """Run every part in a process of its own."""
    for part in PARTS:
        print(f"{part}: begins, {args.seconds:.0f} s at most", flush=True)
        command = [sys.executable, __file__, *argv, "--part", part]
        subprocess.run(command, check=False)
        wait_for_memory("cuda" if torch.cuda.is_available() else "cpu")


def join_sections(folder: Path) -> str:
    """Write evidence.md from the sections of all parts that there are."""
    sections = ["# Evidence\n"]
    for part in PARTS:
        for name in (f"{part}.md", f"{part}-failed.md"):
            if (folder / name).exists():
                sections.append((folder / name).read_text())
        if (folder / f"{part}.png").exists():
            sections.append(f"![{part}]({part}.png)\n")
    text = "\n".join(sections)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evidence.md").write_text(text)
    return text


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", default="all", choices=("all", *PARTS), help="what to measure")
    add("--out", type=Path, default=Path("evidence"), help="folder of the results")
    add("--seconds", type=float, default=540, help="time of each part")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: GPUs if any")
    add("--tp-size", type=int, help="ranks; default: the number of GPUs, 2 on a CPU")
    add("--model", type=Path, help="directory with a config.json; see above")
    add("--layers", type=int, help="take another number of the model's layers")
    add("--only", default="", help="set-ups and engines whose name matches this expression")
    add("--backends", help="attention back-ends with commas; default: FA3, FlashInfer, as found")
    add(
        "--concurrency",
        type=parse_integers,
        default=[1, 8, 32, 64, 128, 256, 512],
        help="levels of concurrent requests, rising, with commas",
    )
    add("--input-len", type=int, default=4000, help="mean number of prompt tokens")
    add("--output-len", type=int, default=1500, help="mean number of generated tokens")
    add("--spread", type=int, default=20, help="lengths differ from the mean by this per cent")
    add("--rounds", type=int, default=1, help="requests of a level, in times its concurrency")
    add("--least", type=int, default=2, help="minimum number of requests per level")
    add("--seed", type=int, default=0, help="seed of the load")
    add("--sizes", default=",".join(map(str, SIZES)), help="bytes of the collectives")
    add("--questions", type=int, default=40, help="questions of each kind, for accuracy")
    add("--longest", type=int, default=8192, help="longest prompt of these, in tokens")
    add("--streams", type=int, default=512, help="streams from the HTTP server without a model")
    add("--http-concurrency", type=int, default=32, help="concurrency of guidellm's row")
    add("--steps", type=Path, help="step times for the emulation; default: they are measured")
    add("--repeats", type=int, default=3, help="a step time is the mean of this many steps")
    args = parser.parse_args(argv)
    if args.concurrency != sorted(set(args.concurrency)) or args.concurrency[0] < 1:
        parser.error(f"--concurrency {args.concurrency}: must rise, such as 1,8,32")
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.part == "all":
        run_all(argv, args)
    else:
        run_part(args)
    print(join_sections(args.out))


if __name__ == "__main__":
    main()
