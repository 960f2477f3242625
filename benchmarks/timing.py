"""What the other benchmarks time GPU work with: CUDA events and CUDA graphs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidcp.hardware import GPUS

# What floors are computed with.
BANDWIDTH = GPUS["h200"]["bandwidth"]
FLOPS = GPUS["h200"]["flops"]


def normal(*shape: int) -> Tensor:
    """A random bf16 tensor on the GPU."""
    return torch.randn(*shape, device="cuda").bfloat16()


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture `work` in a CUDA graph. It runs once before that, which compiles its kernels."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def time_calls(
    call: Callable[[], object], repeats: int, before: Callable[[], object] | None = None
) -> list[float]:
    """Seconds that the GPU took for each of `repeats` calls, after two calls that are not counted.

    `before` is called ahead of each call, outside of the measured time.
    """
    times = []
    for _ in range(repeats + 2):
        if before is not None:
            before()
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e-3)
    return times[2:]


def time_graph(
    work: Callable[[], object], repeats: int = 10, before: Callable[[], object] | None = None
) -> float:
    """Median seconds of a replay of a graph that does `work` once."""
    graph = capture(work)
    return statistics.median_high(time_calls(graph.replay, repeats, before))


def time_each(calls: Sequence[Callable[[], object]]) -> float:
    """Median seconds of one of these calls, in a graph that makes each of them once."""

    def work() -> None:
        for call in calls:
            call()

    return time_graph(work, repeats=7) / len(calls)
