"""Routed experts on a GPU: find the tiles of minidcp/kernels/tiles.json and measure them.

    python benchmarks/experts.py --write minidcp/kernels/tiles.json

The experts are compared with `grouped_mm` and with the floor, and other products for few tokens
with cuBLAS. Each figure is the time of a call within a CUDA graph that goes through the weights of
several layers, so that the L2 cache does not hold them. Kernels are compiled beforehand, by one
process per CPU. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from tile_candidates import SHAPES, Blocking, Shape, fits, list_candidates
from timing import BANDWIDTH, FLOPS, normal, time_each
from torch import Tensor

from minidcp.kernels.align import Blocks, align
from minidcp.kernels.experts import run_experts, run_experts_ref
from minidcp.kernels.fp8 import (
    Fp8Tensor,
    Stack,
    Weight,
    allocate_stack,
    put_into_stack,
    quantize,
    quantize_weight,
)
from minidcp.kernels.grouped import multiply_blocks
from minidcp.kernels.grouped_fp8 import multiply_fp8_blocks, multiply_gated
from minidcp.kernels.linear import multiply_by_head
from minidcp.kernels.tiles import Tile, Tiles, list_tiles
from minidcp.kernels.vector_fp8 import multiply_vector

NUM_LAYERS = 4  # whose weights a graph goes through

PRODUCTS = {  # heads, outputs, inputs
    "V2-Lite q|kv": (1, 3648, 2048),
    "V2-Lite o": (1, 2048, 2048),
    "W_UK": (16, 512, 128),
    "W_UV": (16, 128, 512),
    "V2-Lite router": (1, 64, 2048),
    "V2 router": (1, 160, 5120),
    "V2 q_a|kv": (1, 2112, 5120),
    "V2 q_b": (1, 3072, 1536),
    "V2 o": (1, 5120, 2048),
    "V2-Lite head": (1, 102400, 2048),
}

LayerWeights = tuple[Stack, Stack]  # gate_up and down of all experts


def make_weights(shape: Shape, num_experts: int) -> LayerWeights:
    gate_up = normal(num_experts, 2 * shape.inter, shape.hidden).mul_(0.02)
    down = normal(num_experts, shape.hidden, shape.inter).mul_(0.02)
    if not shape.fp8:
        return gate_up, down
    return quantize_experts(gate_up), quantize_experts(down)


def quantize_experts(weight: Tensor) -> Stack:
    stack = allocate_stack(len(weight), quantize_weight(weight[0]))
    for index, matrix in enumerate(weight):
        put_into_stack(stack, index, quantize_weight(matrix))
    return stack


def make_rows(shape: Shape, blocks: Blocks, gated: bool) -> Weight:
    """The input of a product: rows by token or by choice, or by their place in sorted blocks."""
    num_rows = blocks.num_choices // (shape.top_k if gated else 1)
    if blocks.is_sorted:
        num_rows = blocks.max_blocks * blocks.bm
    rows = normal(num_rows, shape.hidden if gated else shape.inter)
    if not shape.fp8:
        return rows
    # Between the products of few rows is float32, which the second one quantises.
    return rows.float() if blocks.is_direct and not gated else quantize(rows)


def multiply(shape: Shape, rows: Weight, weight: Stack, blocks: Blocks, tile: Tile) -> object:
    """One product. `weight` is gate_up if its rows are as many as only gate_up has."""
    gated = weight.shape[1] != shape.hidden
    if isinstance(weight, Tensor):
        assert isinstance(rows, Tensor)
        return multiply_blocks(rows, weight, blocks, tile, gated)
    assert not isinstance(weight, Tensor)
    if gated and not blocks.is_direct:
        assert isinstance(rows, Fp8Tensor)
        return multiply_gated(rows, weight, blocks, tile)

    dim_out = shape.inter if gated else shape.hidden
    dtype = torch.float32 if gated else torch.bfloat16
    out = torch.empty(blocks.num_choices, dim_out, dtype=dtype, device="cuda")
    if blocks.is_direct:
        multiply_vector(rows, weight, blocks, tile, out, gated)
    else:
        assert isinstance(rows, Fp8Tensor)
        multiply_fp8_blocks(rows, weight, blocks, tile, out)
    return out


Job = tuple[Shape, Blocking, Tile, bool]  # the last says whether the product is gated


def list_jobs(shapes: list[Shape], batches: list[int]) -> list[Job]:
    """All kernels that the search will run."""
    jobs: set[Job] = set()
    for shape, tokens in product(shapes, batches):
        for blocking, tile in list_candidates(shape, tokens):
            for gated in (True, False):
                if fits(shape, blocking, tile, gated):
                    jobs.add((shape, blocking, tile, gated))
    return sorted(jobs, key=str)


def compile_tile(job: Job) -> None:
    """Compile a kernel in this process. It stays in Triton's cache on the disk."""
    shape, blocking, tile, gated = job
    gate_up, down = make_weights(shape, 2)
    shape = replace(shape, experts=2, top_k=2)
    ids = torch.tensor([[0, 1]] * 4, dtype=torch.int32, device="cuda")
    blocks = align(ids, 2, *blocking)
    rows = make_rows(shape, blocks, gated)
    try:
        multiply(shape, rows, gate_up if gated else down, blocks, tile)
    except triton.runtime.errors.OutOfResources:
        return


def draw_ids(shape: Shape, tokens: int) -> Tensor:
    """Random experts of each token, [T, K], with the shared ones last."""
    num_routed = shape.experts - shape.shared
    scores = torch.rand(tokens, num_routed, device="cuda")
    routed = scores.topk(shape.top_k - shape.shared).indices
    shared = torch.arange(num_routed, shape.experts, device="cuda").expand(tokens, -1)
    return torch.cat([routed, shared], 1).to(torch.int32)


class Search:
    """The search for the fastest tiles of one shape and number of tokens."""

    def __init__(self, shape: Shape, tokens: int, weights: list[LayerWeights]) -> None:
        self.shape = shape
        self.tokens = tokens
        self.weights = weights
        self.ids = [draw_ids(shape, tokens) for _ in weights]
        # The best tile and its seconds, by blocking and product.
        self.best: dict[tuple[Blocking, bool], tuple[float, Tile]] = {}

    def time_product(self, blocking: Blocking, tile: Tile, gated: bool) -> float | None:
        """Seconds of one product, or None if the GPU cannot run the kernel."""
        blocks_by_layer = [align(ids, self.shape.experts, *blocking) for ids in self.ids]
        rows = make_rows(self.shape, blocks_by_layer[0], gated)
        calls: list[Callable[[], object]] = []
        for (gate_up, down), blocks in zip(self.weights, blocks_by_layer, strict=True):
            weight = gate_up if gated else down
            calls.append(partial(multiply, self.shape, rows, weight, blocks, tile))
        try:
            return time_each(calls)
        except triton.runtime.errors.OutOfResources:
            return None

    def find_best_tiles(self) -> None:
        """Find the fastest tile of each product, for each blocking."""
        for blocking, tile in list_candidates(self.shape, self.tokens):
            for gated in (True, False):
                if not fits(self.shape, blocking, tile, gated):
                    continue
                seconds = self.time_product(blocking, tile, gated)
                if seconds is None:
                    continue
                fastest = self.best.get((blocking, gated))
                if fastest is None or seconds < fastest[0]:
                    self.best[blocking, gated] = (seconds, tile)

    def make_tiles(self, blocking: Blocking) -> Tiles:
        _, gate_up = self.best[blocking, True]
        _, down = self.best[blocking, False]
        return Tiles(blocking.bm, blocking.sort, gate_up, down)

    def time_all(self, blocking: Blocking) -> float:
        """Seconds of the whole layer, from the choices to the sum over experts."""
        tiles = self.make_tiles(blocking)
        with patch("minidcp.kernels.tiles.list_tiles", lambda *_: {self.tokens: tiles}):
            return time_layers(run_experts, self.shape, self.tokens, self.weights, self.ids)

    def compute_floor(self) -> float:
        shape = self.shape
        num_used = sum(len(ids.unique()) for ids in self.ids) / len(self.ids)
        num_weights = 3 * shape.inter * shape.hidden  # of an expert
        read_seconds = num_used * num_weights * (1 if shape.fp8 else 2) / BANDWIDTH
        flops = self.tokens * shape.top_k * num_weights * 2
        return max(read_seconds, flops / (FLOPS * (2 if shape.fp8 else 1)))

    def run(self) -> tuple[Tiles, float]:
        """Find the fastest tiles and print their times. Returns them and the floor."""
        self.find_best_tiles()
        blockings = [blocking for blocking, gated in self.best if gated]
        times = {
            blocking: self.time_all(blocking)
            for blocking in blockings
            if (blocking, False) in self.best
        }
        chosen = min(times, key=lambda blocking: times[blocking])
        gate_up_seconds, gate_up = self.best[chosen, True]
        down_seconds, down = self.best[chosen, False]
        floor = self.compute_floor()

        layers = []
        for blocking, seconds in times.items():
            name = f"{blocking.bm} sorted" if blocking.sort else f"{blocking.bm}"
            layers.append(f"{name}: {seconds * 1e6:.0f}")
        print(
            f"{self.shape.name:20} {self.tokens:5}: bm {chosen.bm:3}, "
            f"gate|up {gate_up_seconds * 1e6:7.1f} µs {tuple(gate_up)}, "
            f"down {down_seconds * 1e6:7.1f} {tuple(down)}, "
            f"both {(gate_up_seconds + down_seconds) / floor:.2f} floors of {floor * 1e6:.1f}; "
            f"whole layer by bm: {', '.join(layers)}",
            flush=True,
        )
        return self.make_tiles(chosen), floor


def time_layers(
    run: Callable[..., Any],
    shape: Shape,
    tokens: int,
    weights: list[LayerWeights],
    ids: list[Tensor],
) -> float:
    """Seconds of `run` (`run_experts`, or its torch definition) for one layer, with the sum."""
    x = normal(tokens, shape.hidden)
    given = torch.rand(tokens, shape.top_k, device="cuda")
    calls: list[Callable[[], object]] = []
    for (gate_up, down), layer_ids in zip(weights, ids, strict=True):
        calls.append(partial(sum_experts, run, x, gate_up, down, given, layer_ids))
    return time_each(calls)


def sum_experts(run: Callable[..., Any], *args: Stack) -> Tensor:
    total: Tensor = run(*args).sum()
    return total


def compare(shape: Shape, tokens: int, weights: list[LayerWeights]) -> dict[str, float]:
    """Compare whole layers, with the tiles of the table, with the torch definition."""
    x = normal(tokens, shape.hidden)
    given = torch.rand(tokens, shape.top_k, device="cuda")
    ids = [draw_ids(shape, tokens) for _ in weights]
    expected = sum_experts(run_experts_ref, x, *weights[0], given, ids[0]).float()
    actual = sum_experts(run_experts, x, *weights[0], given, ids[0]).float()
    error = float((actual - expected).norm() / expected.norm())
    assert error < 1e-2, f"{shape.name}, {tokens} tokens: {error:.2e} off the torch definition"

    seconds = time_layers(run_experts, shape, tokens, weights, ids)
    line = f"{shape.name:20} {tokens:5}: {seconds * 1e6:7.1f} µs, error {error:.1e}"
    result = {"us": seconds * 1e6}
    if not shape.fp8:
        grouped_us = time_layers(run_experts_ref, shape, tokens, weights, ids) * 1e6
        line += f", grouped_mm {grouped_us:7.1f}"
        result["grouped_us"] = grouped_us
    print(line)
    return result


def format_table(table: dict[str, Any]) -> str:
    """tiles.json, with a line for each number of tokens."""
    shapes = []
    for shape, rows in table.items():
        lines = ",\n".join(f'  "{tokens}": {json.dumps(tiles)}' for tokens, tiles in rows.items())
        shapes.append(f' "{shape}": {{\n{lines}\n }}')
    return "{\n" + ",\n".join(shapes) + "\n}\n"


def compare_product(name: str, tokens: int) -> None:
    """Compare a product with other weights with cuBLAS, and print the times."""
    heads, dim_out, dim_in = PRODUCTS[name]
    weight_bytes = heads * dim_out * dim_in * 2
    num_copies = max(2, min(32, (1 << 28) // weight_bytes))
    weights = [normal(heads, dim_out, dim_in) for _ in range(num_copies)]
    if name == "W_UK":
        weights = [weight.mT.contiguous().mT for weight in weights]
    x = normal(tokens, heads, dim_in)
    dtype = torch.float32 if "router" in name else torch.bfloat16
    out = torch.empty(tokens, heads, dim_out, dtype=dtype, device="cuda")

    seconds = time_each([partial(multiply_by_head, x, weight, out) for weight in weights])
    if heads == 1:
        cublas_calls = [partial(F.linear, x[:, 0], weight[0]) for weight in weights]
    else:
        cublas_calls = [partial(torch.bmm, x.transpose(0, 1), weight.mT) for weight in weights]
    cublas_seconds = time_each(cublas_calls)
    floor = weights[0].nbytes / BANDWIDTH
    print(
        f"{name:16} {tokens:4}: {seconds * 1e6:6.1f} µs, cuBLAS {cublas_seconds * 1e6:6.1f}, "
        f"floor {floor * 1e6:6.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batch",
        default="1,2,4,8,16,32,64,128,256,384,512,1024,2048,4096,8192,16384",
        help="numbers of tokens, separated by commas",
    )
    parser.add_argument("--write", type=Path, help="add the fastest tiles to this file")
    parser.add_argument(
        "--shapes", default="", help="a part of the names of the shapes to search for"
    )
    parser.add_argument(
        "--products",
        default="1,2,4,8,16",
        help="numbers of tokens for the other products; an empty text leaves these out",
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")

    torch.manual_seed(0)
    batches = [int(tokens) for tokens in args.batch.split(",")]
    shapes = [shape for shape in SHAPES if args.shapes in shape.name]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.map(compile_tile, list_jobs(shapes, batches), chunksize=1)

    table: dict[str, Any] = json.loads(args.write.read_text()) if args.write else {}
    results = []
    for shape in shapes:
        weights = [make_weights(shape, shape.experts) for _ in range(NUM_LAYERS)]
        table[shape.key] = {}
        floors = {}
        for tokens in batches:
            tiles, floors[tokens] = Search(shape, tokens, weights).run()
            table[shape.key][f"{tokens}"] = tiles
        if args.write:
            args.write.write_text(format_table(table))
            list_tiles.cache_clear()
        for tokens in batches:
            result = {"shape": shape.name, "batch": tokens, "floor_us": floors[tokens] * 1e6}
            results.append({**result, **compare(shape, tokens, weights)})

    for name in PRODUCTS:
        for tokens in args.products.split(","):
            if tokens:
                compare_product(name, int(tokens))
    print(json.dumps({"tiles": table, "results": results}))


if __name__ == "__main__":
    main()
