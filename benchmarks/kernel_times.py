"""Our kernels on a GPU beside their bandwidth floors, and Triton decode beside FlashAttention-3 and
FlashInfer.

    python benchmarks/kernel_times.py

Shapes are those of one rank of DeepSeek-V2 at tp=dcp=8. Each figure is the time of a call within a
CUDA graph that goes through many sets of inputs, so that the L2 cache does not hold them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from timing import BANDWIDTH, FLOPS, normal, time_each

from minidcp.attention import AttentionBackend
from minidcp.attention.fa3 import FA3Backend
from minidcp.attention.flashinfer import FlashInferBackend
from minidcp.attention.triton import TritonBackend
from minidcp.batch import CacheQueries
from minidcp.kernels.fa3 import load_operators
from minidcp.kernels.flashinfer import load_library
from minidcp.kernels.kv_store import NewLatents, store_latents
from minidcp.kernels.merge import merge_partials
from minidcp.kernels.norm import rms_norm

HIDDEN = 5120
LATENT_DIM = 512
ROPE_DIM = 64
NOPE_DIM = 128
BLOCK_SIZE = 16
RANKS = 8
OWN_HEADS = 16
HEADS = RANKS * OWN_HEADS
SCALE = (NOPE_DIM + ROPE_DIM) ** -0.5
NUM_CALLS = 64  # each on inputs of its own

Call = Callable[[], object]
Calls = tuple[list[Call], float]  # and the bytes that one of them must move


def make_fa3() -> AttentionBackend:
    return FA3Backend(load_operators(), SCALE, HEADS, BLOCK_SIZE)


def make_flashinfer() -> AttentionBackend:
    library = load_library(LATENT_DIM, ROPE_DIM, torch.cuda.get_device_capability())
    return FlashInferBackend(library, SCALE, HEADS, BLOCK_SIZE, torch.device("cuda"))


def make_triton() -> AttentionBackend:
    return TritonBackend(SCALE)


BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "Triton": make_triton,
    "FA3": make_fa3,
    "FlashInfer": make_flashinfer,
}


def make_norm_calls(tokens: int) -> Calls:
    weight = normal(HIDDEN)
    calls: list[Call] = []
    for _ in range(NUM_CALLS):
        x = normal(tokens, HIDDEN)
        residual = normal(tokens, HIDDEN)
        calls.append(partial(rms_norm, x, weight, 1e-6, residual))
    # Reads x and the residual, and writes both.
    return calls, 4 * x.nbytes


def make_store_calls(tokens: int) -> Calls:
    weight = normal(LATENT_DIM)
    calls: list[Call] = []
    for _ in range(NUM_CALLS):
        latents = normal(tokens, LATENT_DIM + ROPE_DIM)
        q_pe = normal(tokens, OWN_HEADS, NOPE_DIM + ROPE_DIM)[..., NOPE_DIM:]
        cos_sin = torch.randn(tokens, ROPE_DIM, device="cuda")
        cache = normal(tokens // BLOCK_SIZE + 1, BLOCK_SIZE, LATENT_DIM + ROPE_DIM)
        slots = torch.randperm(tokens, device="cuda").to(torch.int32)
        new = NewLatents(latents, weight, 1e-6, cos_sin, cache, slots)
        calls.append(partial(store_latents, new, q_pe))
    # Reads the latents, writes them and stores them; rotates q in place.
    return calls, 3 * latents.nbytes + cos_sin.nbytes + 2 * q_pe.nbytes


def make_merge_calls(tokens: int, dim: int) -> Calls:
    calls: list[Call] = []
    for _ in range(NUM_CALLS):
        outs = normal(RANKS, tokens, OWN_HEADS, dim)
        lses = torch.randn(RANKS, tokens, OWN_HEADS, device="cuda")
        calls.append(partial(merge_partials, outs, lses))
    # Reads one partial of every rank and writes one result.
    return calls, (outs.nbytes + lses.nbytes) * (RANKS + 1) / RANKS


def make_rescale_calls(tokens: int) -> Calls:
    calls: list[Call] = []
    for _ in range(NUM_CALLS):
        out = normal(tokens, HEADS, LATENT_DIM)
        same_for_all = out.expand(RANKS, -1, -1, -1)
        lses = torch.randn(RANKS, tokens, HEADS, device="cuda")
        calls.append(partial(merge_partials, same_for_all, lses, only=3))
    return calls, 2 * out.nbytes + lses.nbytes * (RANKS + 1) / RANKS


KERNELS: dict[str, Callable[[int], Calls]] = {
    "rms_norm + residual 5120": make_norm_calls,
    "norm + rope + store 576": make_store_calls,
    "merge 8 x 16 x 512": partial(make_merge_calls, dim=512),
    "merge 8 x 16 x 128": partial(make_merge_calls, dim=128),
    "rescale 128 x 512": make_rescale_calls,
}


def measure_kernel(name: str, tokens: int) -> None:
    """Print the time and the bandwidth of a kernel beside its floor."""
    calls, moved = KERNELS[name](tokens)
    seconds = time_each(calls)
    floor = moved / BANDWIDTH
    rate = moved / seconds / 1e9
    print(
        f"{name:26} batch {tokens:4}: {seconds * 1e6:7.2f} µs  {rate:6.0f} GB/s"
        f"   floor {floor * 1e6:7.2f}   ratio {seconds / floor:6.2f}"
    )


def compare_decode(tokens: int, context: int) -> None:
    """Print the times of the back-ends for the same decode: 128 heads, blocks of 16 tokens.

    The time to plan it on the host, once for all layers, is not in FlashInfer's time: it is behind
    it.
    """
    num_blocks = -(-context // BLOCK_SIZE)
    kv = normal(tokens * num_blocks, BLOCK_SIZE, LATENT_DIM + ROPE_DIM)
    block_ids = torch.randperm(tokens * num_blocks, device="cuda")
    table = block_ids.view(tokens, num_blocks).to(torch.int32)
    lens = torch.full((tokens,), context, dtype=torch.int32, device="cuda")
    q = normal(tokens, HEADS, LATENT_DIM)
    q_pe = normal(tokens, HEADS, ROPE_DIM)

    texts = [f"{tokens:5} x {context:6}:"]
    for name, make in BACKENDS.items():
        queries = CacheQueries(
            table, lens, np.full(tokens, context), narrow=False, is_replayed=True
        )
        try:
            backend = make()
            backend.plan(queries)  # loads kernels
            torch.cuda.synchronize()
            begin = time.perf_counter()
            backend.plan(queries)
            plan_seconds = time.perf_counter() - begin
        except (ImportError, OSError, RuntimeError) as error:
            texts.append(f"(no {name}: {error})")
            continue
        backend.prepare(queries)
        seconds = time_each([partial(backend.decode, q, q_pe, kv, queries)] * 8)
        texts.append(f"{name} {seconds * 1e6:8.1f} µs")
        if queries.planned is not None:
            texts.append(f"(plan {plan_seconds * 1e6:4.0f} µs)")

    num_bytes = tokens * context * (LATENT_DIM + ROPE_DIM) * 2
    flops = 2 * tokens * context * HEADS * (2 * LATENT_DIM + ROPE_DIM)
    floor = max(num_bytes / BANDWIDTH, flops / FLOPS)
    print("  ".join([*texts, f"floor {floor * 1e6:.1f} µs"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")

    print(torch.cuda.get_device_name())
    for name in KERNELS:
        for tokens in (1, 32, 128, 512, 4096):
            if tokens <= 512 or "norm" in name:
                measure_kernel(name, tokens)
    for tokens, context in (
        (1, 594),
        (32, 594),
        (128, 594),
        (512, 594),
        (8, 16384),
        (1, 131072),
    ):
        compare_decode(tokens, context)


if __name__ == "__main__":
    main()
