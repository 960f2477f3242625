"""Routed experts on a GPU: the tiles of minidcp/kernels/tiles.json are searched here, and what they reach is compared
with `grouped_mm` and with the floor. Products with other weights for few tokens are compared with cuBLAS.

    python benchmarks/experts.py --write minidcp/kernels/tiles.json

Each figure is that of a call within a CUDA graph that goes through several layers' weights, so that the L2 cache does
not hold them. Kernels are compiled beforehand, by as many processes as there are CPUs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from kernels import BANDWIDTH, FLOPS, normal, seconds_per_call
from torch import Tensor

from minidcp.kernels import gpu
from minidcp.kernels.experts import (
    DIRECT_TOKENS,
    Blocks,
    Tile,
    Tiles,
    align,
    list_tiles,
    multiply_blocks,
    run_experts,
    run_experts_ref,
)
from minidcp.kernels.linear import multiply_by_head

LAYERS = 4  # whose weights a graph goes through


@dataclass(frozen=True)
class Shape:
    """`experts` with shared ones, of which a token takes `top_k`; `inter` is a rank's share of an expert."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inter: int
    shared: int = 2

    @property
    def key(self) -> str:
        return f"{self.experts}x{self.hidden}x{self.inter}"


SHAPES = Shape("V2-Lite", 66, 8, 2048, 1408), Shape("V2, rank of 8", 162, 8, 5120, 192)
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


Blocking = tuple[int, bool]  # block size, and whether tokens are sorted beforehand


def list_candidates(shape: Shape, tokens: int) -> list[tuple[Blocking, Tile]]:
    """Blockings and tiles worth a try for so many tokens."""
    if tokens <= DIRECT_TOKENS:
        vectors = [
            (4, 1024, 4),
            (4, 512, 4),
            (2, 1024, 4),
            (4, 2048, 8),
            (2, 2048, 4),
            (8, 1024, 4),
            (8, 512, 4),
            (16, 256, 4),
        ]
        rows = [((1, False), Tile(bn, bk, warps, 1)) for bn, bk, warps in vectors]
        return [*rows, ((16, False), Tile(64, 128, 4, 4)), ((16, False), Tile(64, 256, 4, 3))]
    per_expert = tokens * shape.top_k / shape.experts
    few = [(64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 3), (128, 64, 4, 4),
           (128, 64, 8, 4), (128, 64, 8, 5), (128, 128, 8, 3), (256, 64, 8, 3)]  # fmt: skip
    many = [(128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 4), (256, 64, 8, 3),
            (256, 64, 8, 4), (128, 128, 8, 2)]  # fmt: skip
    if per_expert > 60:
        blockings = [(64, False), (128, False), *([(128, True)] if gpu().capability >= (9, 0) else [])]
        return [(blocking, Tile(*tile)) for blocking, tile in product(blockings, many)]
    bms = (16,) if per_expert < 3 else (16, 32) if per_expert < 10 else (16, 32, 64)
    return [((bm, False), Tile(*tile)) for bm, tile in product(bms, few)]


def fits(bm: int, tile: Tile, gated: bool) -> bool:
    """Whether the stages fit into shared memory, where tensor cores use it."""
    return bm == 1 or tile.stages * tile.bk * (bm + tile.bn * (2 if gated else 1)) * 2 <= 220 << 10


def make_weights(shape: Shape, experts: int) -> tuple[Tensor, Tensor]:
    gate_up = normal(experts, 2 * shape.inter, shape.hidden).mul_(0.02)
    return gate_up, normal(experts, shape.hidden, shape.inter).mul_(0.02)


def make_rows(shape: Shape, blocks: Blocks, gated: bool) -> Tensor:
    """What the product takes: rows by token or entry, or by place in the blocks."""
    count = len(blocks.ids) if gated else blocks.ids.numel()
    count = blocks.most * blocks.bm if blocks.sorted else count
    return normal(count, shape.hidden if gated else shape.inter)


def compile_tile(job: tuple[Shape, bool, Blocking, Tile, bool]) -> None:
    """In a process of its own: leaves the kernel in Triton's cache."""
    shape, direct, blocking, tile, gated = job
    weights = make_weights(shape, 2)
    ids = torch.tensor([[0, 1]] * (1 if direct else 4), dtype=torch.int32, device="cuda")
    blocks = align(ids, 2, *blocking)
    try:
        multiply_blocks(make_rows(shape, blocks, gated), weights[0 if gated else 1], blocks, tile, gated)
    except triton.runtime.errors.OutOfResources:
        return


def draw_ids(shape: Shape, tokens: int) -> Tensor:
    """[T, K] for each token other experts, the shared ones last."""
    routed = shape.experts - shape.shared
    ids = torch.rand(tokens, routed, device="cuda").topk(shape.top_k - shape.shared).indices
    always = torch.arange(routed, shape.experts, device="cuda").expand(tokens, -1)
    return torch.cat([ids, always], 1).to(torch.int32)


def time_or_none(calls: list[Callable[[], object]]) -> float | None:
    try:
        return seconds_per_call(calls)
    except triton.runtime.errors.OutOfResources:
        return None


def search(shape: Shape, tokens: int, weights: list[tuple[Tensor, Tensor]]) -> tuple[Tiles, dict[str, object]]:
    """The fastest tiles for a batch, and what they reach beside grouped_mm and the floor."""
    ids = [draw_ids(shape, tokens) for _ in weights]
    best: dict[tuple[Blocking, bool], tuple[float, Tile]] = {}
    for (blocking, tile), gated in product(list_candidates(shape, tokens), (True, False)):
        if not fits(blocking[0], tile, gated):
            continue
        blocks = [align(i, shape.experts, *blocking) for i in ids]
        rows, which = make_rows(shape, blocks[0], gated), 0 if gated else 1
        calls: list[Callable[[], object]] = [
            lambda x=rows, w=w[which], b=b, t=tile, g=gated: multiply_blocks(x, w, b, t, g)  # type: ignore[misc]
            for w, b in zip(weights, blocks, strict=True)
        ]
        seconds = time_or_none(calls)
        if seconds is not None and seconds < best.get((blocking, gated), (1.0, tile))[0]:
            best[blocking, gated] = seconds, tile
    x, given = normal(tokens, shape.hidden), torch.rand(tokens, shape.top_k, device="cuda")

    def time_all(blocking: Blocking) -> float:
        tiles = Tiles(*blocking, best[blocking, True][1], best[blocking, False][1])
        calls: list[Callable[[], object]] = [
            lambda w=w, i=i: run_experts(x, w[0], w[1], given, i).sum()  # type: ignore[misc]
            for w, i in zip(weights, ids, strict=True)
        ]
        with patch("minidcp.kernels.experts.list_tiles", lambda *_: {tokens: tiles}):
            return seconds_per_call(calls)

    times = {blocking: time_all(blocking) for blocking, gated in best if gated and (blocking, False) in best}
    chosen = min(times, key=lambda blocking: times[blocking])
    parts = best[chosen, True], best[chosen, False]
    used = sum(len(i.unique()) for i in ids) / len(ids)
    per_expert = 3 * shape.inter * shape.hidden * 2
    floor = max(used * per_expert / BANDWIDTH, tokens * shape.top_k * per_expert / FLOPS)
    in_all = ", ".join(f"{bm}{' sorted' * sort}: {times[bm, sort] * 1e6:.0f}" for bm, sort in times)
    print(f"{shape.name:14} {tokens:5}: bm {chosen[0]:3}, gate|up {parts[0][0] * 1e6:7.1f} µs {tuple(parts[0][1])}, "
          f"down {parts[1][0] * 1e6:7.1f} {tuple(parts[1][1])}, both {sum(p[0] for p in parts) / floor:.2f} floors "
          f"of {floor * 1e6:.1f}; all by bm: {in_all}", flush=True)  # fmt: skip
    return Tiles(*chosen, parts[0][1], parts[1][1]), {"shape": shape.name, "batch": tokens, "floor_us": floor * 1e6}


def compare(shape: Shape, tokens: int, weights: list[tuple[Tensor, Tensor]]) -> dict[str, object]:
    """All of it, with the tiles of the table, beside the twin."""
    x, given = normal(tokens, shape.hidden), torch.rand(tokens, shape.top_k, device="cuda")
    ids = [draw_ids(shape, tokens) for _ in weights]
    expected, actual = (f(x, *weights[0], given, ids[0]).sum().float() for f in (run_experts_ref, run_experts))
    error = float((actual - expected).norm() / expected.norm())
    assert error < 1e-2, f"{shape.name}, {tokens} tokens: {error:.2e} off the twin"
    times = [
        seconds_per_call([lambda w=w, i=i, f=f: f(x, *w, given, i).sum() for w, i in zip(weights, ids, strict=True)])  # type: ignore[misc]
        for f in (run_experts, run_experts_ref)
    ]
    print(f"{shape.name:14} {tokens:5}: {times[0] * 1e6:7.1f} µs, grouped_mm {times[1] * 1e6:7.1f}, error {error:.1e}")
    return {"shape": shape.name, "batch": tokens, "us": times[0] * 1e6, "grouped_us": times[1] * 1e6}


def format_table(table: dict[str, dict[str, Tiles]]) -> str:
    """JSON with a line for each batch."""
    shapes = []
    for shape, rows in table.items():
        lines = ",\n".join(f'  "{tokens}": {json.dumps(tiles)}' for tokens, tiles in rows.items())
        shapes.append(f' "{shape}": {{\n{lines}\n }}')
    return "{\n" + ",\n".join(shapes) + "\n}\n"


def compare_product(name: str, tokens: int) -> None:
    heads, dim_out, dim_in = PRODUCTS[name]
    copies = max(2, min(32, (1 << 28) // (heads * dim_out * dim_in * 2)))
    weights, x = [normal(heads, dim_out, dim_in) for _ in range(copies)], normal(tokens, heads, dim_in)
    dtype = torch.float32 if "router" in name else torch.bfloat16
    if name == "W_UK":
        weights = [w.mT.contiguous().mT for w in weights]
    out = torch.empty(tokens, heads, dim_out, dtype=dtype, device="cuda")
    ours = seconds_per_call([lambda w=w: multiply_by_head(x, w, out) for w in weights])  # type: ignore[misc]
    rows = x.transpose(0, 1)
    theirs = seconds_per_call([lambda w=w: F.linear(x[:, 0], w[0]) if heads == 1 else rows @ w.mT for w in weights])  # type: ignore[misc]
    floor = weights[0].nbytes / BANDWIDTH
    print(f"{name:16} {tokens:4}: {ours * 1e6:6.1f} µs, cuBLAS {theirs * 1e6:6.1f}, floor {floor * 1e6:6.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,2,4,8,16,32,64,128,256,384,512,1024,2048,4096,8192,16384", help="tokens")
    parser.add_argument("--write", type=Path, help="where to write the tiles that win")
    parser.add_argument("--products", default="1,2,4,8,16", help="tokens; none: leave the other products out")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    torch.manual_seed(0)
    batches = [int(b) for b in args.batch.split(",")]
    jobs = {
        (shape, batch <= DIRECT_TOKENS, blocking, tile, gated)
        for shape, batch in product(SHAPES, batches)
        for (blocking, tile), gated in product(list_candidates(shape, batch), (True, False))
        if fits(blocking[0], tile, gated)
    }
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.map(compile_tile, sorted(jobs, key=str), chunksize=1)
    results, table = [], {}
    for shape in SHAPES:
        weights = [make_weights(shape, shape.experts) for _ in range(LAYERS)]
        found = {batch: search(shape, batch, weights) for batch in batches}
        table[shape.key] = {str(batch): tiles for batch, (tiles, _) in found.items()}
        if args.write:
            args.write.write_text(format_table(table))
            list_tiles.cache_clear()
        results += [found[batch][1] | compare(shape, batch, weights) for batch in batches]
    for name, tokens in product(PRODUCTS, [int(t) for t in args.products.split(",") if t]):
        compare_product(name, tokens)
    print(json.dumps({"tiles": table, "results": results}))


if __name__ == "__main__":
    main()
