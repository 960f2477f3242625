"""Our kernels on a GPU against their bandwidth floors, and Triton decode beside FlashAttention-3.

    python benchmarks/kernels.py

Shapes are those of one rank of DeepSeek-V2 at tp=dcp=8. Each figure is the time of a call within a CUDA
graph that goes through many sets of inputs, so that the L2 cache does not hold them.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidcp.batch import CacheRows
from minidcp.kernels.kv_store import store_latents
from minidcp.kernels.merge import merge_partials
from minidcp.kernels.mla_decode import mla_decode
from minidcp.kernels.norm import rms_norm
from minidcp.plan import GPUS

BANDWIDTH, FLOPS = GPUS["h200"]["bandwidth"], GPUS["h200"]["flops"]
CALLS = 64


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def seconds_per_call(calls: Sequence[Callable[[], object]]) -> float:
    """Median over replays of a graph that makes every call once."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    median: float = sorted(times[2:])[3]
    return median / len(calls)


def make_calls(kernel: str, tokens: int) -> tuple[list[Callable[[], object]], float]:
    """CALLS calls on fresh inputs, and the bytes that one must move."""
    weight, latent_weight = normal(5120), normal(512)
    calls: list[Callable[[], object]] = []
    moved = 0.0
    for _ in range(CALLS):
        if kernel == "rms_norm + residual 5120":
            x, r = normal(tokens, 5120), normal(tokens, 5120)
            calls.append(lambda x=x, r=r: rms_norm(x, weight, 1e-6, r))  # type: ignore[misc]
            moved = 4 * x.nbytes
        elif kernel == "norm + rope + store 576":
            kv, q, cos_sin = normal(tokens, 576), normal(tokens, 16, 192), torch.randn(tokens, 64, device="cuda")
            cache = normal(tokens // 16 + 1, 16, 576)
            slots = torch.randperm(tokens, device="cuda").to(torch.int32)
            given = kv, q[..., 128:], latent_weight, 1e-6, cos_sin, cache, slots
            calls.append(lambda given=given: store_latents(*given))  # type: ignore[misc]
            moved = 3 * kv.nbytes + cos_sin.nbytes + 2 * q[..., 128:].nbytes
        elif kernel.startswith("merge 8 x 16"):
            dim = int(kernel.split()[-1])
            outs, lses = normal(8, tokens, 16, dim), torch.randn(8, tokens, 16, device="cuda")
            calls.append(lambda o=outs, ls=lses: merge_partials(o, ls))  # type: ignore[misc]
            moved = outs.nbytes * 9 / 8 + lses.nbytes * 9 / 8
        else:
            out, lses = normal(tokens, 128, 512), torch.randn(8, tokens, 128, device="cuda")
            calls.append(lambda o=out, ls=lses: merge_partials(o.expand(8, -1, -1, -1), ls, only=3))  # type: ignore[misc]
            moved = 2 * out.nbytes + lses.nbytes * 9 / 8
    return calls, moved


def compare_decode(tokens: int, context: int) -> None:
    """Triton and FA3 on the same case: 128 heads, blocks of 16."""
    blocks = -(-context // 16)
    kv = normal(tokens * blocks, 16, 576)
    table = torch.randperm(tokens * blocks, device="cuda").view(tokens, blocks).to(torch.int32)
    lens = torch.full((tokens,), context, dtype=torch.int32, device="cuda")
    q, q_pe, scale = normal(tokens, 128, 512), normal(tokens, 128, 64), 192**-0.5
    ours = seconds_per_call([lambda: mla_decode(q, q_pe, kv, table, lens, scale)] * 8)
    line = f"{tokens:5} x {context:6}: Triton {ours * 1e6:8.1f} µs"
    try:
        from minidcp.attention.fa3 import FA3Backend, load_operators

        fa3 = FA3Backend(load_operators(), scale, 128, 16)
        rows = CacheRows(table, lens, narrow=False)
        fa3.plan(rows)
        theirs = seconds_per_call([lambda: fa3.decode(q, q_pe, kv, rows)] * 8)
        line += f"   FA3 {theirs * 1e6:8.1f} µs   ratio {ours / theirs:.2f}"
    except ImportError as error:
        line += f"   (no FA3: {error})"
    floor = max(tokens * context * 576 * 2 / BANDWIDTH, 2 * tokens * context * 128 * 1088 / FLOPS)
    print(f"{line}   floor {floor * 1e6:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    print(torch.cuda.get_device_name())
    kernels = (
        "rms_norm + residual 5120",
        "norm + rope + store 576",
        "merge 8 x 16 x 512",
        "merge 8 x 16 x 128",
        "rescale 128 x 512",
    )
    for kernel, tokens in itertools.product(kernels, (1, 32, 128, 512, 4096)):
        if tokens > 512 and "norm" not in kernel:
            continue
        calls, moved = make_calls(kernel, tokens)
        seconds = seconds_per_call(calls)
        floor = moved / BANDWIDTH
        rate = moved / seconds / 1e9
        print(
            f"{kernel:26} batch {tokens:4}: {seconds * 1e6:7.2f} µs  {rate:6.0f} GB/s"
            f"   floor {floor * 1e6:7.2f}   ratio {seconds / floor:6.2f}"
        )
    for tokens, context in ((1, 594), (32, 594), (128, 594), (512, 594), (8, 16384), (1, 131072)):
        compare_decode(tokens, context)


if __name__ == "__main__":
    main()
