"""Latency of the collectives that DCP uses, from 2 KiB to 8 MiB per rank: eager, and in CUDA graphs.

    python benchmarks/collectives.py --ranks 8                          # symmetric memory and NCCL, a GPU per rank
    python benchmarks/collectives.py --ranks 8 --comm symmetric         # ranks may share GPUs (start MPS first)
    python benchmarks/collectives.py --ranks 4 --device cpu             # Gloo: semantics, not speed

A size is what a rank gives to all-gather and gets from reduce-scatter; all-to-all and p2p (the merge of partial
attention, head dim 512) take N times as much and get as much. Where ranks share a GPU all of it moves within one
memory, and the output says so. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from minidcp.parallel.exchange import EXCHANGES
from minidcp.parallel.group import Group
from minidcp.parallel.state import init_process_state

SIZES = [2 << (10 + 2 * i) for i in range(7)]  # 2 KiB to 8 MiB
DIM, CALLS, REPEATS = 512, 8, 15


def list_calls(group: Group, size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """The collectives on bf16 tensors (fp32 on CPUs) for messages of `size` bytes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = max(1, size // (DIM * dtype.itemsize))
    width = size // dtype.itemsize // tokens

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    one, many = make(tokens, width), make(tokens, group.size, width)
    calls: dict[str, Callable[[], object]] = {
        "all_gather": lambda: group.all_gather(one),
        "reduce_scatter": lambda: group.reduce_scatter(many),
        "all_to_all": lambda: group.all_to_all(many),
    }
    if type(group).__name__ == "SymmetricGroup":
        lse = torch.randn(tokens, group.size, device=device)
        calls["p2p"] = lambda: EXCHANGES["p2p"](many, lse, group)
    return calls


def measure_eager(call: Callable[[], object], group: Group, device: torch.device) -> float:
    """Median seconds of one call among CALLS, launched one after another."""
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
    return sorted(times)[REPEATS // 2] / CALLS


def measure_graph(call: Callable[[], object], group: Group) -> float:
    """Median seconds of one call within a graph of CALLS."""

    def step() -> None:
        group.begin_step()
        for _ in range(CALLS):
            call()

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        group.begin_step()  # no rank's clock runs while another is late
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e-3)
    return sorted(times)[REPEATS // 2] / CALLS


def run_rank(rank: int, args: argparse.Namespace, port: int, comm: str, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(args.ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    group = init_process_state(args.ranks, 1, comm, device).tp
    for size in args.sizes:
        for name, call in list_calls(group, size, device).items():
            call()  # kernels are compiled
            seconds = [measure_eager(call, group, device)]
            if device.type == "cuda":
                seconds.append(measure_graph(call, group))
            if rank == 0:
                results[name, comm, size] = seconds
    dist.barrier()
    os._exit(0)


def describe(args: argparse.Namespace) -> str:
    if args.device == "cpu":
        return f"{args.ranks} ranks as processes on one CPU: semantics, not speed"
    gpus = torch.cuda.device_count()
    shared = "" if gpus >= args.ranks else ": they SHARE memory, so this is no measurement of NVLink"
    return f"{args.ranks} ranks on {gpus} × {torch.cuda.get_device_name()}{shared}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8, help="how many")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="where")
    parser.add_argument("--comm", help="symmetric or nccl; default: both where every rank has a GPU; gloo on CPUs")
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")], default=SIZES, help="bytes")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none here; --device cpu shows semantics")
    alone = args.device == "cuda" and torch.cuda.device_count() >= args.ranks
    default = "gloo" if args.device == "cpu" else "symmetric,nccl" if alone else "symmetric"
    times: dict[tuple[str, str, int], list[float]] = {}
    for comm in (args.comm or default).split(","):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with mp.Manager() as manager:
            shared = manager.dict()
            mp.spawn(run_rank, (args, store.port, comm, shared), nprocs=args.ranks)
            times |= dict(shared)
    columns = sorted({(name, comm) for name, comm, _ in times})
    where = describe(args)
    print(f"µs, eager / in a graph; {where}\n")
    print("| bytes | " + " | ".join(f"{name}, {comm}" for name, comm in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for size in args.sizes:
        cells = [" / ".join(f"{t * 1e6:.1f}" for t in times[name, comm, size]) for name, comm in columns]
        print(f"| {size:,} | " + " | ".join(cells) + " |")
    result = {f"{name} {comm} {size}": [t * 1e6 for t in value] for (name, comm, size), value in times.items()}
    print(json.dumps({"where": where, "us": result}))


if __name__ == "__main__":
    main()
