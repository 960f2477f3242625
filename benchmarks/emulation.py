"""Emulate one rank of many on one GPU, with collectives that are local copies.

After a copy the device is kept busy for as long as a model of the link says. Nothing here measures
a link. `decode_step.py` and `serving_emulated.py` use this.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minidcp.engine.executor import Executor
from minidcp.hardware import LINK_BYTES_PER_SECOND
from minidcp.kernels.merge import merge_partials
from minidcp.model_config import ModelConfig
from minidcp.parallel.exchange import make_exchange
from minidcp.parallel.group import Group
from minidcp.parallel.state import ParallelState
from minidcp.parallel.symmetric import HALF_BYTES, ONE_SHOT_BYTES
from minidcp.resolve import ResolvedConfig
from minidcp.worker.worker import Ready

# µs of a collective of 2 KiB among 8 H100s, from SGLang's pull requests 14194 and 21637: symmetric
# memory in CUDA graphs, NCCL eager. Their table has no p2p exchange and no one-shot all-reduce.
# Each of these is one kernel that meets the peers and reads from them, as a symmetric
# reduce-scatter is, so they take its latency. NCCL's all-reduce takes that of NCCL's
# reduce-scatter.
LATENCY_US = {
    "symmetric": {"all_gather": 2.68, "reduce_scatter": 2.82, "all_to_all": 5.45},
    "nccl": {"all_gather": 14.57, "reduce_scatter": 16.06, "all_to_all": 18.34},
}


@dataclass(frozen=True)
class Link:
    """How long a collective takes: the latency of its kind plus the time of the received bytes.

    `wait` keeps the device busy for a number of seconds without the host, so it works within CUDA
    graphs. The time of the local copies that stand for the data comes on top, so the model is
    pessimistic by it.
    """

    comm: str = "symmetric"  # or nccl
    bandwidth: float = LINK_BYTES_PER_SECOND
    wait: Callable[[float], None] = field(default=time.sleep, compare=False)

    def spend(self, kind: str, nbytes: float) -> None:
        """Wait as long as a collective of this kind takes that receives `nbytes`."""
        self.wait(LATENCY_US[self.comm][kind] * 1e-6 + nbytes / self.bandwidth)

    def __str__(self) -> str:
        return f"{self.comm} at {self.bandwidth / 1e9:.0f} GB/s"


def calibrate_wait() -> Callable[[float], None]:
    """Make a function that keeps the GPU busy for a number of seconds.

    In a CUDA graph the time includes the launch of the kernel that waits.
    """
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # a tenth of a second, until the clock rate is up
    short_cycles = 2_000
    long_cycles = 42_000
    short_seconds = measure_in_graph(torch.cuda._sleep, short_cycles)
    long_seconds = measure_in_graph(torch.cuda._sleep, long_cycles)
    cycles_per_second = (long_cycles - short_cycles) / (long_seconds - short_seconds)
    launch_seconds = max(0.0, short_seconds - short_cycles / cycles_per_second)

    def wait(seconds: float) -> None:
        if seconds > launch_seconds:
            torch.cuda._sleep(round((seconds - launch_seconds) * cycles_per_second))

    measured_us = measure_in_graph(wait, 20e-6) * 1e6
    print(
        f"emulated waits: one of 20 µs takes {measured_us:.1f} µs in a CUDA graph; "
        f"the shortest takes {launch_seconds * 1e6:.1f} µs"
    )
    return wait


def measure_in_graph(wait: Callable[[Any], None], argument: float, count: int = 100) -> float:
    """Seconds of one wait in a graph of `count` waits, in the fastest of five replays."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            wait(argument)

    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best / count


class EmulatedGroup(Group):
    """Rank 0 of `size` ranks, without the others.

    What peers would send is a copy of this rank's own data. With a `link` the device then waits as
    long as the link would take. Two things differ. The barriers of `begin_step` are left out: one a
    step, and with graphs for prompts up to two more a layer. Of large steps this rank norms all
    rows, where a SymmetricGroup norms its share.
    """

    def __init__(self, size: int, link: Link | None = None) -> None:
        self.size = size
        self.link = link
        if torch.cuda.is_available() and link is not None and link.comm == "symmetric":
            # Unused. It takes the memory that a symmetric group's buffer would take.
            self.buffer = torch.empty(2 * HALF_BYTES, dtype=torch.uint8, device="cuda")

    def spend(self, kind: str, nbytes: float) -> None:
        """Count `nbytes` that come from the peers, and wait for them."""
        self.received_bytes += int(nbytes)
        if self.link is not None:
            self.link.spend(kind, nbytes)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Like SymmetricGroup: small tensors are read whole from every peer.

        Large ones are reduce-scattered and all-gathered. NCCL is counted as one reduce-scatter of
        all the bytes.
        """
        num_peers = self.size - 1
        scattered_bytes = x.nbytes * num_peers / self.size
        if self.link is not None and self.link.comm == "nccl":
            self.spend("reduce_scatter", 2 * scattered_bytes)
        elif x.nbytes <= ONE_SHOT_BYTES:
            self.spend("reduce_scatter", x.nbytes * num_peers)
        else:
            self.spend("reduce_scatter", scattered_bytes)
            self.spend("all_gather", scattered_bytes)
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
        """The p2p exchange, as `PeerToPeer` in parallel/exchange.py asks for it.

        It merges this rank's own partials of its peers' heads: as many bytes as it would read from
        the peers.
        """
        outs = out.unflatten(1, (self.size, -1)).transpose(0, 1)
        lses = lse.unflatten(1, (self.size, -1)).transpose(0, 1)
        self.spend("reduce_scatter", (outs[0].nbytes + lses[0].nbytes) * (self.size - 1))
        return merge_partials(outs, lses)


def emulate_state(
    tp_size: int, dcp_size: int, link: Link | None = None, exchange: str = "p2p"
) -> ParallelState:
    """The groups of rank 0 of `tp_size` ranks."""
    tp = make_group(tp_size, link)
    dcp = tp if dcp_size == tp_size else make_group(dcp_size, link)
    return ParallelState(tp, dcp, make_exchange(exchange, dcp))


def make_group(size: int, link: Link | None) -> Group:
    if size == 1:
        return Group()
    return EmulatedGroup(size, link)


class EmulatedExecutor(Executor):
    """Rank 0 alone, in a thread of this process. Its steps run in real time."""

    def __init__(
        self, state: ParallelState, config: ResolvedConfig, model_config: ModelConfig
    ) -> None:
        self.state = state
        super().__init__(config, model_config)

    def start_threads(self) -> None:
        self.start_thread(0, self.state)

    def start_processes(self) -> None:
        self.start_thread(0, self.state)

    def wait_ready(self) -> list[Ready]:
        return [self.receive(Ready)]

    def now(self) -> float:
        return time.perf_counter()
