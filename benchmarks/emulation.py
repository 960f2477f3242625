"""One rank of many on one GPU: EMULATED collectives, which copy locally and then keep the device as long as a stated
model of the link says. Nothing here measures a link. Used by `decode_step.py` and `serving_emulated.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minidcp.config import EngineConfig
from minidcp.engine.executor import Executor
from minidcp.engine.worker import Ready
from minidcp.kernels.merge import merge_partials
from minidcp.model_config import ModelConfig
from minidcp.parallel.group import Group
from minidcp.parallel.state import ParallelState
from minidcp.parallel.symmetric import HALF_BYTES, ONE_SHOT_BYTES, SymmetricGroup

# µs of a collective of 2 KiB among 8 H100s, measured with SGLang's pull requests 14194 and 21637: symmetric memory in
# CUDA graphs, NCCL eager. Not in that table: p2p and a one-shot all-reduce are one kernel that meets the peers and
# reads them, as a symmetric reduce-scatter is; NCCL's all-reduce is taken for a reduce-scatter too.
LATENCY_US = {
    "symmetric": {"all_gather": 2.68, "reduce_scatter": 2.82, "all_to_all": 5.45},
    "nccl": {"all_gather": 14.57, "reduce_scatter": 16.06, "all_to_all": 18.34},
}


@dataclass(frozen=True)
class Link:
    """What a collective takes: its kind's latency, and what a rank receives at `bandwidth` bytes/s.

    `wait` keeps the device so many seconds, within CUDA graphs too, without the host. The copies that stand for the
    data come on top of that, so the model is pessimistic by their time.
    """

    comm: str = "symmetric"  # or nccl
    bandwidth: float = 350e9
    wait: Callable[[float], None] = field(default=time.sleep, compare=False)

    def spend(self, kind: str, nbytes: float) -> None:
        self.wait(LATENCY_US[self.comm][kind] * 1e-6 + nbytes / self.bandwidth)

    def __str__(self) -> str:
        return f"{self.comm} at {self.bandwidth / 1e9:.0f} GB/s"


def calibrate_wait() -> Callable[[float], None]:
    """A function that keeps the GPU busy for so many seconds, its own launch in a CUDA graph included."""
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # until the clock is up: a tenth of a second
    short, long = 2_000, 42_000
    first, second = (seconds_in_graph(torch.cuda._sleep, cycles) for cycles in (short, long))
    rate = (long - short) / (second - first)  # cycles a second
    launch = max(0.0, first - short / rate)

    def wait(seconds: float) -> None:
        if seconds > launch:
            torch.cuda._sleep(round((seconds - launch) * rate))

    took, least = (seconds_in_graph(wait, 20e-6) * 1e6, launch * 1e6)
    print(f"emulated waits: one of 20 µs takes {took:.1f} µs in a CUDA graph; none takes less than {least:.1f}")
    return wait


def seconds_in_graph(wait: Callable[[Any], None], argument: float, count: int = 100) -> float:
    """Of one of so many waits in a row, in the fastest of five replays."""
    graph, best = torch.cuda.CUDAGraph(), float("inf")
    with torch.cuda.graph(graph):
        for _ in range(count):
            wait(argument)
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best / count


class EmulatedGroup(SymmetricGroup):
    """Rank 0 of `size`, alone: what peers would send is a copy of the own data, and with a `link` the device then waits
    as long as the link would take.

    It is a SymmetricGroup for the p2p exchange's sake and has nothing of it: p2p is emulated by merging this rank's
    partials of its peers' heads, as many bytes as it would read of them. The barrier of `begin_step`, one a step, is
    left out.
    """

    rank = 0

    def __init__(self, size: int, link: Link | None = None) -> None:
        self.size, self.link = size, link
        if torch.cuda.is_available() and link is not None and link.comm == "symmetric":
            self.buffer = torch.empty(2 * HALF_BYTES, dtype=torch.uint8, device="cuda")  # no use, but it takes room

    def begin_step(self) -> None:
        return

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return like.new_empty(shape)

    def spend(self, kind: str, nbytes: float) -> None:
        """`nbytes` come from the peers."""
        self.received_bytes += int(nbytes)
        if self.link is not None:
            self.link.spend(kind, nbytes)

    def all_reduce(self, x: Tensor) -> Tensor:
        """As SymmetricGroup: small tensors are read whole from every peer, large ones are scattered and gathered."""
        peers, nccl = self.size - 1, self.link is not None and self.link.comm == "nccl"
        if nccl:
            self.spend("reduce_scatter", 2 * x.nbytes * peers / self.size)
        elif x.nbytes <= ONE_SHOT_BYTES:
            self.spend("reduce_scatter", x.nbytes * peers)
        else:
            self.spend("reduce_scatter", x.nbytes * peers / self.size)
            self.spend("all_gather", x.nbytes * peers / self.size)
        return x.clone()

    def all_gather(self, x: Tensor) -> Tensor:
        self.spend("all_gather", x.nbytes * (self.size - 1))
        return x[:, None].expand(-1, self.size, *x.shape[1:]).contiguous()

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self.spend("reduce_scatter", x[:, 0].nbytes * (self.size - 1))
        return x.sum(1)

    def all_to_all(self, x: Tensor) -> Tensor:
        self.spend("all_to_all", x[:, 0].nbytes * (self.size - 1))
        return x.clone()

    def merge(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        outs, lses = (x.unflatten(1, (self.size, -1)).transpose(0, 1) for x in (out, lse))
        self.spend("reduce_scatter", (outs[0].nbytes + lses[0].nbytes) * (self.size - 1))
        return merge_partials(outs, lses)


def emulate_state(tp_size: int, dcp_size: int, link: Link | None = None) -> ParallelState:
    """Rank 0's groups of `tp_size` ranks."""
    tp, dcp = (Group() if size == 1 else EmulatedGroup(size, link) for size in (tp_size, dcp_size))
    return ParallelState(tp, tp if dcp_size == tp_size else dcp)


class EmulatedExecutor(Executor):
    """Rank 0 alone, in a thread of this process; its steps run on the real clock."""

    def __init__(self, state: ParallelState, config: EngineConfig, model_config: ModelConfig) -> None:
        self.state = state
        super().__init__(config, model_config)

    def start_threads(self) -> None:
        self.start_thread(0, self.state)

    start_processes = start_threads

    def wait_ready(self) -> list[Ready]:
        return [self.receive(Ready)]

    def now(self) -> float:
        return time.perf_counter()
