"""Latency of the collectives that DCP uses, from 2 KiB to 8 MiB per rank: eager and in CUDA graphs.

    python benchmarks/collectives.py --ranks 8                   # symmetric memory and NCCL
    python benchmarks/collectives.py --ranks 8 --comm symmetric  # ranks may share GPUs
    python benchmarks/collectives.py --ranks 4 --device cpu      # Gloo: semantics, not speed

Start MPS first where ranks share GPUs. NCCL needs a GPU per rank. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import time_graph
from torch import Tensor

from minidcp.parallel.exchange import PeerToPeer
from minidcp.parallel.group import Group
from minidcp.parallel.state import init_process_state
from minidcp.parallel.symmetric import SymmetricGroup

# In bytes. A size is what a rank gives to all-gather and gets from reduce-scatter. All-to-all and
# p2p (the merge of partial attention with head dim 512) take N times as much and return as much.
SIZES = [2 << (10 + 2 * i) for i in range(7)]  # 2 KiB to 8 MiB
HEAD_DIM = 512
CALLS = 8  # per measurement
REPEATS = 15

Times = dict[tuple[str, str, int], list[float]]  # by collective, comm and size: seconds


def list_calls(group: Group, size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """The collectives on bf16 tensors (fp32 on CPUs) of `size` bytes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = max(1, size // (HEAD_DIM * dtype.itemsize))
    width = size // dtype.itemsize // tokens

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    own = make(tokens, width)
    by_rank = make(tokens, group.size, width)
    calls: dict[str, Callable[[], object]] = {
        "all_gather": lambda: group.all_gather(own),
        "reduce_scatter": lambda: group.reduce_scatter(by_rank),
        "all_to_all": lambda: group.all_to_all(by_rank),
    }
    if isinstance(group, SymmetricGroup):
        exchange = PeerToPeer(group)
        lse = torch.randn(tokens, group.size, device=device)
        calls["p2p"] = lambda: exchange.merge(by_rank, lse)
    return calls


def measure_eager(call: Callable[[], object], group: Group, device: torch.device) -> float:
    """Median seconds of a call when CALLS of them are launched one after another."""
    times = []
    for _ in range(REPEATS):
        group.begin_step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / CALLS


def measure_graph(call: Callable[[], object], group: Group) -> float:
    """Median seconds of a call within a graph of CALLS of them."""

    def step() -> None:
        group.begin_step()
        for _ in range(CALLS):
            call()

    # The ranks meet before each replay, so that no rank's clock runs while another one is late.
    return time_graph(step, REPEATS, before=group.begin_step) / CALLS


def run_rank(rank: int, args: argparse.Namespace, port: int, comm: str, results: Any) -> None:
    """Measure everything as one rank. Rank 0 writes the times to `results`."""
    os.environ["RANK"] = str(rank)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(args.ranks)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)

    group = init_process_state(args.ranks, 1, comm, "none", device).tp
    for size in args.sizes:
        for name, call in list_calls(group, size, device).items():
            call()  # compiles its kernels
            seconds = [measure_eager(call, group, device)]
            if device.type == "cuda":
                seconds.append(measure_graph(call, group))
            if rank == 0:
                results[name, comm, size] = seconds
    dist.barrier()
    os._exit(0)


def measure(args: argparse.Namespace, seconds: float = math.inf) -> Times:
    """Measure each comm. Ranks that take longer than `seconds` are killed, and their times kept."""
    deadline = time.monotonic() + seconds
    times: Times = {}
    for comm in args.comm.split(","):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with mp.Manager() as manager:
            shared = manager.dict()
            ranks = mp.spawn(
                run_rank, (args, store.port, comm, shared), nprocs=args.ranks, join=False
            )
            while not ranks.join(timeout=1.0):
                if time.monotonic() > deadline:
                    for process in ranks.processes:
                        process.kill()
                    break
            times.update(shared)
    return times


def describe(args: argparse.Namespace) -> str:
    if args.device == "cpu":
        return f"{args.ranks} ranks as processes on one CPU: semantics, not speed"
    num_gpus = torch.cuda.device_count()
    text = f"{args.ranks} ranks on {num_gpus} × {torch.cuda.get_device_name()}"
    if num_gpus < args.ranks:
        text += ": they SHARE memory, so this is no measurement of NVLink"
    return text


def format_table(times: Times, sizes: list[int]) -> str:
    """The times in Markdown, in µs. A cell is empty where none was measured."""
    columns = sorted({(name, comm) for name, comm, _ in times})
    titles = " | ".join(f"{name}, {comm}" for name, comm in columns)
    lines = [f"| bytes | {titles} |", "|---" * (len(columns) + 1) + "|"]
    for size in sizes:
        cells = []
        for name, comm in columns:
            seconds = times.get((name, comm, size), [])
            cells.append(" / ".join(f"{t * 1e6:.1f}" for t in seconds))
        lines.append(f"| {size:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def list_microseconds(times: Times) -> dict[str, list[float]]:
    """The times by collective, comm and size, as JSON has them."""
    return {
        f"{name} {comm} {size}": [t * 1e6 for t in seconds]
        for (name, comm, size), seconds in times.items()
    }


def choose_comm(args: argparse.Namespace) -> str:
    if args.device == "cpu":
        return "gloo"
    if torch.cuda.device_count() >= args.ranks:
        return "symmetric,nccl"
    return "symmetric"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    def parse_sizes(text: str) -> list[int]:
        return [int(size) for size in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, default=8, help="number of ranks")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="device of the ranks")
    add(
        "--comm",
        help="symmetric, nccl or both, separated by a comma; default: gloo on CPUs, "
        "both on GPUs if every rank has one, otherwise symmetric",
    )
    add("--sizes", type=parse_sizes, default=SIZES, help="sizes in bytes, separated by commas")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here; --device cpu shows semantics")
    args.comm = args.comm or choose_comm(args)
    return args


def main() -> None:
    args = parse_args()
    times = measure(args)
    where = describe(args)
    print(f"µs, eager / in a graph; {where}\n")
    print(format_table(times, args.sizes))
    print(json.dumps({"where": where, "us": list_microseconds(times)}))


if __name__ == "__main__":
    main()
