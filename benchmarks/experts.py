"""Routed experts: candidate Triton kernels beside `grouped_mm`, checked and timed. A workbench: what wins here moves
into minidcp/kernels, and the tiles that win into a table.

    python benchmarks/experts.py                                  # on a GPU: DeepSeek-V2-Lite, and a rank of V2
    TRITON_INTERPRET=1 python benchmarks/experts.py --check       # small shapes on a CPU, right or wrong only

Shared experts are experts that every token takes with weight 1. Each figure is that of a call within a CUDA graph
that goes through many layers' weights, so that the L2 cache does not hold them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from kernels import BANDWIDTH, seconds_per_call
from torch import Tensor

CHUNK = 4096  # choices that one program of `align_kernel` looks at together


@dataclass(frozen=True)
class Tiles:
    """Of both products: BM tokens of one expert, BN outputs, BK inputs."""

    bm: int
    bn: int
    bk: int
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Shape:
    """`experts` with shared ones, of which a token takes `top_k`; `inter` is a rank's share of an expert."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inter: int
    shared: int = 2


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x, gate_up, down, weights, ids
SHAPES = (Shape("V2-Lite, tp 1", 66, 8, 2048, 1408), Shape("V2, tp 8", 162, 8, 5120, 192))


@triton.jit
def align_kernel(ids, entries, block_expert, num_blocks, count, experts,
                 BM: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Program e lists the choices (entries of ids [T, K], flat) of expert e in blocks of BM, behind those of experts
    before it; `count` stands for none. All programs count all choices: that is cheaper than to wait for each other."""
    e = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    expert = tl.arange(0, EXPERTS)
    counts = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, count, CHUNK):
        chunk = tl.load(ids + first + lane, mask=first + lane < count, other=EXPERTS - 1)
        counts += tl.histogram(chunk, EXPERTS)
    blocks = tl.where(expert < experts, (counts + BM - 1) // BM, 0)  # the padding's expert is none of ours
    before = tl.sum(tl.where(expert < e, blocks, 0), 0)
    own = tl.sum(tl.where(expert == e, blocks, 0), 0)
    if e == 0:
        tl.store(num_blocks, tl.sum(blocks, 0))
    taken = 0
    for first in range(0, count, CHUNK):
        chunk = tl.load(ids + first + lane, mask=first + lane < count, other=EXPERTS - 1)
        mine = (chunk == e) & (first + lane < count)
        place = taken + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(entries + before * BM + place, first + lane, mask=mine)
        taken += tl.sum(mine.to(tl.int32), 0)
    for block in range(own):
        tl.store(block_expert + before + block, e)
    pad = tl.arange(0, BM)
    tl.store(entries + before * BM + taken + pad, tl.zeros([BM], tl.int32) + count, mask=taken + pad < own * BM)


@triton.jit
def gate_up_kernel(x, weight, entries, block_expert, num_blocks, out, count, top_k, hidden, inter, tiles,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """out[entry] = silu(x[token] · gate) * (x[token] · up) for BM entries of one expert and BN outputs."""
    block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if block < tl.load(num_blocks):
        entry = tl.load(entries + block * BM + tl.arange(0, BM))
        there = entry < count
        n = tile * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        rows = x + (entry // top_k).to(tl.int64)[:, None] * hidden + k[None, :]
        expert = tl.load(block_expert + block).to(tl.int64)
        gate_rows = weight + (expert * 2 * inter + n)[None, :] * hidden + k[:, None]
        gate, up = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
        for first in range(0, hidden, BK):
            inside = k < hidden - first
            a = tl.load(rows + first, mask=there[:, None] & inside[None, :], other=0.0)
            mask = inside[:, None] & (n < inter)[None, :]
            gate = tl.dot(a, tl.load(gate_rows + first, mask=mask, other=0.0), gate)
            up = tl.dot(a, tl.load(gate_rows + first + inter * hidden, mask=mask, other=0.0), up)
        # Rounded where the unfused path rounds.
        dtype = out.dtype.element_ty
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
        dst = out + entry.to(tl.int64)[:, None] * inter + n[None, :]
        tl.store(dst, (silu * up).to(dtype), mask=there[:, None] & (n < inter)[None, :])


@triton.jit
def down_kernel(h, weight, entries, block_expert, num_blocks, out, count, hidden, inter, tiles,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """out[entry] = h[entry] · down for BM entries of one expert and BN outputs."""
    block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if block < tl.load(num_blocks):
        entry = tl.load(entries + block * BM + tl.arange(0, BM))
        there = entry < count
        n = tile * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        rows = h + entry.to(tl.int64)[:, None] * inter + k[None, :]
        expert = tl.load(block_expert + block).to(tl.int64)
        columns = weight + (expert * hidden + n)[None, :] * inter + k[:, None]
        acc = tl.zeros([BM, BN], tl.float32)
        for first in range(0, inter, BK):
            inside = k < inter - first
            a = tl.load(rows + first, mask=there[:, None] & inside[None, :], other=0.0)
            b = tl.load(columns + first, mask=inside[:, None] & (n < hidden)[None, :], other=0.0)
            acc = tl.dot(a, b, acc)
        dst = out + entry.to(tl.int64)[:, None] * hidden + n[None, :]
        tl.store(dst, acc.to(out.dtype.element_ty), mask=there[:, None] & (n < hidden)[None, :])


@triton.jit
def sum_kernel(parts, weights, out, hidden, TOP_K: tl.constexpr, BN: tl.constexpr):
    """out[t] = the weighted sum of a token's TOP_K parts, in their order and in float32."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BN], tl.float32)
    for i in tl.static_range(TOP_K):
        part = tl.load(parts + (t * TOP_K + i) * hidden + n, mask=n < hidden, other=0.0).to(tl.float32)
        acc += part * tl.load(weights + t * TOP_K + i)
    tl.store(out + t * hidden + n, acc.to(out.dtype.element_ty), mask=n < hidden)


def run_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, tiles: Tiles) -> Tensor:
    """The candidate. x [T, hidden]; gate_up [E, 2 I, hidden]; down [E, hidden, I]; weights [T, K] float32 and ids
    [T, K] int32 of a token's experts -> [T, hidden]. Deterministic."""
    (tokens, hidden), top_k, (experts, _, inter) = x.shape, ids.shape[1], down.shape
    count = tokens * top_k
    most = min(count, experts + count // tiles.bm)  # blocks
    entries = torch.empty(most * tiles.bm, dtype=torch.int32, device=x.device)
    block_expert = torch.empty(most, dtype=torch.int32, device=x.device)
    num_blocks = torch.empty(1, dtype=torch.int32, device=x.device)
    align_kernel[(experts,)](
        ids, entries, block_expert, num_blocks, count, experts, BM=tiles.bm,
        EXPERTS=triton.next_power_of_2(experts + 1), CHUNK=min(CHUNK, triton.next_power_of_2(count)),
    )  # fmt: skip
    options = dict(BM=tiles.bm, BN=tiles.bn, BK=tiles.bk, num_warps=tiles.warps, num_stages=tiles.stages)
    h = torch.empty(count, inter, dtype=x.dtype, device=x.device)
    across = triton.cdiv(inter, tiles.bn)
    gate_up_kernel[(most * across,)](
        x, gate_up, entries, block_expert, num_blocks, h, count, top_k, hidden, inter, across, **options
    )
    parts = torch.empty(count, hidden, dtype=x.dtype, device=x.device)
    across = triton.cdiv(hidden, tiles.bn)
    down_kernel[(most * across,)](
        h, down, entries, block_expert, num_blocks, parts, count, hidden, inter, across, **options
    )
    out = torch.empty_like(x)
    sum_kernel[(tokens, triton.cdiv(hidden, 1024))](parts, weights, out, hidden, TOP_K=top_k, BN=1024)
    return out


def run_grouped_mm(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """What minidcp/models/layers.py does: the twin."""
    experts, top_k = len(down), ids.shape[1]
    expert, order = ids.flatten().sort(stable=True)
    offs = torch.searchsorted(expert, torch.arange(experts, device=x.device), right=True).to(torch.int32)
    gate, up = F.grouped_mm(x[order // top_k], gate_up.mT, offs=offs).chunk(2, -1)
    out = F.grouped_mm(F.silu(gate) * up, down.mT, offs=offs)
    weighted = out.float() * weights.flatten()[order, None]
    return torch.empty_like(weighted).index_copy_(0, order, weighted).view(-1, top_k, x.shape[1]).sum(1).to(x.dtype)


def make_inputs(shape: Shape, tokens: int, layers: int, device: str, dtype: torch.dtype) -> list[Inputs]:
    """For each layer other weights of std 0.02, and for each token other experts, the shared ones last."""
    inputs: list[Inputs] = []
    for _ in range(layers):
        gate_up = torch.randn(shape.experts, 2 * shape.inter, shape.hidden, device=device).mul_(0.02).to(dtype)
        down = torch.randn(shape.experts, shape.hidden, shape.inter, device=device).mul_(0.02).to(dtype)
        routed = shape.experts - shape.shared
        ids = torch.rand(tokens, routed, device=device).topk(shape.top_k - shape.shared).indices
        always = torch.arange(routed, shape.experts, device=device).expand(tokens, -1)
        weights = torch.rand(tokens, shape.top_k, device=device)
        x = torch.randn(tokens, shape.hidden, device=device).to(dtype)
        inputs.append((x, gate_up, down, weights, torch.cat([ids, always], 1).to(torch.int32)))
    return inputs


def check(shape: Shape, tokens: int, tiles: Tiles, device: str, dtype: torch.dtype) -> float:
    """Relative error of the candidate against fp64; raises if it is larger than rounding explains."""
    ((x, gate_up, down, weights, ids),) = make_inputs(shape, tokens, 1, device, dtype)
    out = run_experts(x, gate_up, down, weights, ids, tiles)
    expected = torch.zeros(tokens, shape.hidden, dtype=torch.float64, device=device)
    for t, i in itertools.product(range(tokens), range(shape.top_k)):
        gate, up = (gate_up[ids[t, i]].double() @ x[t].double()).chunk(2)
        expected[t] += weights[t, i] * (down[ids[t, i]].double() @ (F.silu(gate) * up))
    error = float((out.double() - expected).norm() / expected.norm())
    assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"{shape.name}, {tokens} tokens, {tiles}: {error:.2e}"
    return error


def list_tiles(tokens_per_expert: float) -> list[Tiles]:
    """Candidates for so many tokens of an expert."""
    bms = [16] if tokens_per_expert <= 8 else [16, 32, 64] if tokens_per_expert <= 48 else [64, 128]
    sizes = itertools.product(bms, (32, 64, 128), (64, 128), (4, 8), (3, 4))
    fits = (Tiles(*size) for size in sizes)
    return [
        t for t in fits if t.stages * t.bk * (t.bm + 2 * t.bn) * 2 <= 220 << 10 and t.warps * 16 <= t.bm * t.bn // 8
    ]


def search(shape: Shape, tokens: int) -> dict[str, object]:
    """The fastest tiles for a batch, beside grouped_mm and the floor."""
    inputs = make_inputs(shape, tokens, 4, "cuda", torch.bfloat16)
    used = sum(int(ids.unique().numel()) for *_, ids in inputs) / len(inputs)
    floor = used * 3 * shape.inter * shape.hidden * 2 / BANDWIDTH
    base = seconds_per_call([lambda i=i: run_grouped_mm(*i) for i in inputs])  # type: ignore[misc]
    times = {}
    for tiles in list_tiles(tokens * shape.top_k / shape.experts):
        try:
            times[tiles] = seconds_per_call([lambda i=i, t=tiles: run_experts(*i, tiles=t) for i in inputs])  # type: ignore[misc]
        except (triton.runtime.errors.OutOfResources, RuntimeError):
            continue
    best = min(times, key=lambda t: times[t])
    check(shape, min(tokens, 16), best, "cuda", torch.bfloat16)
    print(f"{shape.name:14} batch {tokens:5}: grouped_mm {base * 1e6:7.1f} µs, ours {times[best] * 1e6:7.1f}, "
          f"floor {floor * 1e6:7.1f}, ratio {times[best] / floor:5.2f}  {best}")  # fmt: skip
    return {"shape": shape.name, "batch": tokens, "grouped_us": base * 1e6, "us": times[best] * 1e6,
            "floor_us": floor * 1e6, "tiles": vars(best)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="small shapes only, on whatever is there")
    parser.add_argument("--batch", default="1,8,32,128,256,512", help="tokens")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for tokens, experts, bm in ((1, 5, 16), (3, 5, 16), (9, 7, 16), (40, 4, 32)):
        shape = Shape("small", experts, 4, 48, 24)
        error = check(shape, tokens, Tiles(bm, 16, 16), device, torch.float32)
        print(f"{tokens:3} tokens, {experts} experts: relative error {error:.1e}")
    if not args.check:
        batches = [int(b) for b in args.batch.split(",")]
        print(json.dumps([search(shape, batch) for shape in SHAPES for batch in batches]))


if __name__ == "__main__":
    main()
