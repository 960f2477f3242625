"""Mixture of experts: routing, and the experts' products over the tokens that chose them. Triton kernels and twins.

A choice is a (token, expert) pair; entry t · K + i is token t's i-th. Shared experts are experts that every token
chooses, with weight 1. All results are sums in a fixed order: deterministic."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minidcp.kernels import gpu, launch_early, use_triton, wait_for_previous
from minidcp.kernels.linear import add_product
from minidcp.kernels.norm import sum_ref
from minidcp.model_config import ModelConfig

CHUNK, MOST_TOKENS = 4096, 2048  # choices, and tokens, that one program counts and aligns at once
DIRECT_TOKENS = 2  # up to which every choice is a block of its own


class Tile(NamedTuple):
    """What one program computes: BN outputs, BK inputs at a time."""

    bn: int
    bk: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Of both products; BM choices of one expert form a block, for which tokens may be sorted beforehand."""

    bm: int
    sort: bool
    gate_up: Tile
    down: Tile


@cache
def list_tiles(experts: int, top_k: int, hidden: int, inter: int) -> dict[int, Tiles]:
    """By the number of tokens up to which they are the best ones: from tiles.json, which `benchmarks/experts.py` finds,
    or by a rule: the tokens that an expert gets in the mean fill one block, so that its weights are read once."""
    found = json.loads((Path(__file__).parent / "tiles.json").read_text()).get(f"{experts}x{hidden}x{inter}")
    if found:
        return {int(most): Tiles(bm, sort, *(Tile(*t) for t in both)) for most, (bm, sort, *both) in found.items()}
    tile, most = Tile(64, 128, 4, 4), experts / top_k
    rule = {DIRECT_TOKENS: Tiles(1, False, Tile(16, 512, 4, 1), Tile(16, 512, 4, 1))}
    rule |= {int(mean * most): Tiles(bm, False, tile, tile) for mean, bm in ((12, 16), (24, 32), (64, 64))}
    return rule | {1 << 20: Tiles(128, True, Tile(128, 64, 8, 3), Tile(128, 64, 8, 3))}


class Blocks(NamedTuple):
    """Entries by expert, in blocks of `bm` of one expert each; `most` is how many blocks there may be. Where every
    entry is a block of its own only ids are read."""

    ids: Tensor  # [T, K] int32
    bm: int
    most: int
    entries: Tensor | None = None  # [most * bm] int32; T * K stands for none
    experts: Tensor | None = None  # [most + 1] int32 of the blocks, and last the number of blocks
    sorted: bool = False  # rows between the products are in this order, not that of the entries


def align(ids: Tensor, num_experts: int, bm: int, sort: bool = False) -> Blocks:
    count = ids.numel()
    if len(ids) <= DIRECT_TOKENS:
        return Blocks(ids, bm, count)
    most = min(count, num_experts + count // bm)
    entries = torch.empty(most * bm, dtype=torch.int32, device=ids.device)
    experts = torch.empty(most + 1, dtype=torch.int32, device=ids.device)
    chunk, counts = min(CHUNK, triton.next_power_of_2(count)), None
    if count > chunk:
        counts = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
        count_kernel[(num_experts,)](ids, counts, count, CHUNK=chunk, **launch_early())
    tokens, top_k = ids.shape
    align_kernel[(num_experts,)](
        ids, counts, entries, experts, most, tokens, num_experts, BM=bm, TOP_K=top_k, CHUNK=chunk,
        EXPERTS=triton.next_power_of_2(num_experts + 1), TOKENS=min(triton.next_power_of_2(tokens), MOST_TOKENS),
        SLOTS=triton.next_power_of_2(top_k), num_warps=4 if chunk < 4096 else 16, **launch_early(),
    )  # fmt: skip
    return Blocks(ids, bm, most, entries, experts, sort)


def sort_rows(x: Tensor, blocks: Blocks) -> Tensor:
    """x [T, I] -> where blocks are sorted, the row of each place's entry: [most · bm, I]."""
    if not blocks.sorted:
        return x
    rows, per_row = x.new_empty(blocks.most * blocks.bm, x.shape[1]), blocks.ids.shape[1]
    gather_kernel[triton.cdiv(len(rows), 8), triton.cdiv(x.shape[1], 512)](
        x, blocks.entries, rows, blocks.ids.numel(), per_row, x.shape[1], BM=8, BN=512, **launch_early()
    )
    return rows


def multiply_blocks(x: Tensor, weight: Tensor, blocks: Blocks, tile: Tile, gated: bool) -> Tensor:
    """x [T, I], or [T · K, I] one row per entry; weight [E, O, I], or [E, 2 O, I] GATED -> [T · K, O] by entry. Where
    blocks are sorted, x, and the result if GATED, have a row for each place in the blocks, [most · bm, …]."""
    dim_in, dim_out = x.shape[1], weight.shape[1] // (2 if gated else 1)
    count = len(x) if blocks.sorted and gated else blocks.ids.numel()
    out = x.new_empty(count, dim_out)
    across, bk = triton.cdiv(dim_out, tile.bn), tile.bk * 2 // x.element_size()  # tiles are for bf16
    stage_bytes = bk * (blocks.bm + tile.bn * (2 if gated else 1)) * x.element_size()
    stages = max(1, min(tile.stages, gpu().shared_memory // stage_bytes))
    boxes = (x, [blocks.bm, bk]), (weight.flatten(0, 1), [tile.bn, bk])
    experts_kernel[(blocks.most * across,)](
        *(TensorDescriptor.from_tensor(*box) if blocks.sorted else box[0] for box in boxes), blocks.ids,
        blocks.entries, blocks.experts, out, blocks.most, count, max(1, count // len(x)), dim_in, dim_out, across,
        GATED=gated, DIRECT=blocks.entries is None, SORTED=blocks.sorted, EVEN=dim_in % bk == 0,
        BM=blocks.bm, BN=tile.bn, BK=bk, num_warps=tile.warps, num_stages=stages, **launch_early(),
    )  # fmt: skip
    return out


class Parts(NamedTuple):
    """Each token's results of its experts, [T, K, hidden], whose sum by `weights` [T, K] float32 is wanted."""

    values: Tensor
    weights: Tensor

    def sum(self) -> Tensor:
        """[T, hidden], added in float32 and in the experts' order."""
        if not use_triton(self.values):
            return sum_ref(self.values, self.weights)
        tokens, top_k, hidden = self.values.shape
        out = self.values.new_empty(tokens, hidden)
        sum_kernel[tokens, triton.cdiv(hidden, 1024)](
            self.values, self.weights, out, hidden, TOP_K=top_k, BN=1024, **launch_early()
        )
        return out


def run_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Parts:
    """down(silu(gate(x[t])) · up(x[t])) of every expert ids[t, i]. x [T, hidden], gate_up [E, 2 I, hidden] and down
    [E, hidden, I] are contiguous, of one dtype; weights [T, K] float32, ids [T, K] int32; T > 0."""
    (tokens, top_k), (experts, hidden, inter) = ids.shape, down.shape
    if not use_triton(x):
        return run_experts_ref(x, gate_up, down, weights, ids)
    table = list_tiles(experts, top_k, hidden, inter)
    tiles = next((tiles for most, tiles in table.items() if tokens <= most), [*table.values()][-1])
    # Hopper's tensor memory accelerator copies boxes of rows that begin at multiples of 16 bytes.
    can_copy_boxes = gpu().capability >= (9, 0) and all(n * x.element_size() % 16 == 0 for n in (hidden, inter))
    blocks = align(ids, experts, tiles.bm, tiles.sort and can_copy_boxes)
    h = multiply_blocks(sort_rows(x, blocks), gate_up, blocks, tiles.gate_up, gated=True)
    return Parts(multiply_blocks(h, down, blocks, tiles.down, gated=False).view(tokens, top_k, hidden), weights)


def run_experts_ref(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Parts:
    top_k = ids.shape[1]
    expert, order = ids.flatten().sort(stable=True)  # choices by expert
    offs = torch.searchsorted(expert, torch.arange(len(down), device=x.device), right=True).to(torch.int32)
    gate, up = F.grouped_mm(x[order // top_k], gate_up.mT, offs=offs).chunk(2, -1)
    out = F.grouped_mm(F.silu(gate) * up, down.mT, offs=offs)
    return Parts(torch.empty_like(out).index_copy_(0, order, out).view(-1, top_k, out.shape[-1]), weights)


@triton.jit(do_not_specialize=["count"])
def count_kernel(ids, counts, count, CHUNK: tl.constexpr, EARLY: tl.constexpr):
    """counts[e] = how often expert e is chosen."""
    wait_for_previous(EARLY)
    found = tl.zeros([CHUNK], tl.int32)
    for first in range(0, count, CHUNK):
        choice = first + tl.arange(0, CHUNK)
        found += (tl.load(ids + choice, mask=choice < count, other=-1) == tl.program_id(0)).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(found, 0))


@triton.jit(do_not_specialize=["most", "tokens", "experts"])
def align_kernel(
    ids, counts, entries, block_expert, most, tokens, experts, BM: tl.constexpr, TOP_K: tl.constexpr,
    CHUNK: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program e lists the entries of expert e, one of a token at most, in blocks of BM behind those of the experts
    before it; T · K stands for none. Choices that make one chunk are counted here."""
    wait_for_previous(EARLY)
    e, expert, count = tl.program_id(0), tl.arange(0, EXPERTS), tokens * TOP_K
    if counts is None:
        choice = tl.arange(0, CHUNK)
        counted = tl.histogram(tl.load(ids + choice, mask=choice < count, other=EXPERTS - 1), EXPERTS)
    else:
        counted = tl.load(counts + expert, mask=expert < experts, other=0)
    needed = tl.where(expert < experts, (counted + BM - 1) // BM, 0)  # the padding's expert is none of ours
    before = tl.sum(tl.where(expert < e, needed, 0), 0)
    own = tl.sum(tl.where(expert == e, needed, 0), 0)
    if e == 0:
        tl.store(block_expert + most, tl.sum(needed, 0))
    for block in range(before, before + own):
        tl.store(block_expert + block, e)
        tl.store(entries + block * BM + tl.arange(0, BM), tl.zeros([BM], tl.int32) + count)
    tl.debug_barrier()  # the same places are written again
    slot, taken = tl.arange(0, SLOTS)[None, :], before * BM
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)[:, None]
        chosen = tl.load(ids + token * TOP_K + slot, mask=(token < tokens) & (slot < TOP_K), other=-1)
        entry = tl.max(tl.where(chosen == e, token * TOP_K + slot, -1), 1)
        mine = (entry >= 0).to(tl.int32)
        tl.store(entries + taken + tl.cumsum(mine, 0) - 1, entry, mask=entry >= 0)
        taken += tl.sum(mine, 0)


@triton.jit(do_not_specialize=["count"])
def gather_kernel(x, entries, rows, count, per_row, hidden, BM: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr):
    """rows[place] = the row of x that the entry there is of."""
    wait_for_previous(EARLY)
    place, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    entry = tl.load(entries + place)  # anything in blocks that are not used
    mask = ((entry >= 0) & (entry < count))[:, None] & (n < hidden)[None, :]
    value = tl.load(x + (entry // per_row).to(tl.int64)[:, None] * hidden + n[None, :], mask=mask)
    tl.store(rows + place.to(tl.int64)[:, None] * hidden + n[None, :], value, mask=mask)


@triton.jit
def load_inside(pointers, inside, EVEN: tl.constexpr):
    """0 for what is not inside; where K is a multiple of the tile's, all is."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["most", "count", "per_row", "across"])
def experts_kernel(
    x, weight, ids, entries, block_expert, out, most, count, per_row, dim_in, dim_out, across,
    GATED: tl.constexpr, DIRECT: tl.constexpr, SORTED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program computes BN outputs for a block of BM entries of one expert: its weights [dim_out, dim_in] times row
    entry // per_row of x, or GATED silu(gate) · up of weights [2 dim_out, dim_in]. The weights are the left operand,
    so that a few tokens fill a tensor core's instruction. If SORTED, x and weight are descriptors of boxes."""
    wait_for_previous(EARLY)
    block, first = tl.program_id(0) // across, tl.program_id(0) % across * BN
    m, n, k = tl.arange(0, BM), first + tl.arange(0, BN), tl.arange(0, BK)
    if DIRECT:
        num_blocks = most
        expert = tl.load(ids + block)
        entry = tl.where(m == 0, block, count)
    else:
        num_blocks = tl.load(block_expert + most)
        expert = tl.load(block_expert + block)
        entry = block * BM + m if SORTED and GATED else tl.load(entries + block * BM + m)
    if block < num_blocks:
        # What lies beyond the outputs or entries reads something and is not stored.
        begin = expert * dim_out * (2 if GATED else 1)
        if not SORTED:
            columns = x + (entry % count // per_row).to(tl.int64)[None, :] * dim_in + k[:, None]
            rows = weight + (begin + n % dim_out).to(tl.int64)[:, None] * dim_in + k[None, :]
        acc, up = tl.zeros([BN, BM], tl.float32), tl.zeros([BN, BM], tl.float32)
        for at in range(0, dim_in, BK):
            inside, others = k < dim_in - at, at + dim_out * dim_in
            a = x.load([block * BM, at]).T if SORTED else load_inside(columns + at, inside[:, None], EVEN)
            w = weight.load([begin + first, at]) if SORTED else load_inside(rows + at, inside[None, :], EVEN)
            acc = add_product(w, a, acc)
            if GATED:
                box = begin + dim_out + first, at
                w = weight.load(box) if SORTED else load_inside(rows + others, inside[None, :], EVEN)
                up = add_product(w, a, up)
        dtype = out.dtype.element_ty
        if GATED:  # rounded where the twin rounds
            gate, up = acc.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
            acc = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
        place = out + entry.to(tl.int64)[None, :] * dim_out + n[:, None]
        tl.store(place, acc.to(dtype), mask=(entry < count)[None, :] & (n < dim_out)[:, None])


@triton.jit
def sum_kernel(parts, weights, out, hidden, TOP_K: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr):
    """out[t] = the weighted sum of a token's TOP_K parts, in their order and in float32."""
    wait_for_previous(EARLY)
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BN], tl.float32)
    for i in tl.static_range(TOP_K):
        part = tl.load(parts + (t * TOP_K + i) * hidden + n, mask=n < hidden, other=0.0).to(tl.float32)
        acc += part * tl.load(weights + t * TOP_K + i)
    tl.store(out + t * hidden + n, acc.to(out.dtype.element_ty), mask=n < hidden)


def route(logits: Tensor, config: ModelConfig, shared: int) -> tuple[Tensor, Tensor]:
    """Router logits [T, experts] float32 -> weights [T, K] float32 and ids [T, K] int32 of each token's experts: the
    `shared` ones, which have the first numbers and weight 1, and then the routed ones, best first."""
    c, (tokens, experts) = config, logits.shape
    if not use_triton(logits):
        return route_ref(logits, config, shared)
    top_k = c.num_experts_per_tok + shared
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    route_kernel[(tokens,)](
        logits, weights, ids, experts, c.routed_scaling_factor, shared, top_k,
        EXPERTS=triton.next_power_of_2(experts), SLOTS=triton.next_power_of_2(top_k), GROUPS=c.n_group,
        TOP_GROUPS=c.topk_group, NORM=c.norm_topk_prob and c.num_experts_per_tok > 1,
        num_warps=1, **launch_early(),
    )  # fmt: skip
    return weights, ids


def route_ref(logits: Tensor, config: ModelConfig, shared: int) -> tuple[Tensor, Tensor]:
    c, (tokens, experts) = config, logits.shape
    scores = logits.softmax(-1)
    if c.n_group > 1:
        by_group = scores.view(-1, c.n_group, experts // c.n_group)
        groups = by_group.amax(-1).topk(c.topk_group, -1).indices
        chosen = torch.zeros_like(by_group[..., 0]).scatter_(1, groups, 1.0) > 0
        scores = by_group.masked_fill(~chosen[..., None], 0.0).flatten(1)
    weights, ids = scores.topk(c.num_experts_per_tok, -1)
    # The original either normalises or scales; transformers always scales.
    if c.norm_topk_prob and c.num_experts_per_tok > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    else:
        weights = weights * c.routed_scaling_factor
    always = torch.arange(shared, device=ids.device).expand(tokens, -1)
    return torch.cat([weights.new_ones(always.shape), weights], 1), torch.cat([always, ids + shared], 1).to(torch.int32)


@triton.jit(do_not_specialize=["experts", "shared", "top_k"])
def route_kernel(
    logits, weights, ids, experts, scale, shared, top_k, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program routes one token."""
    wait_for_previous(EARLY)
    t = tl.program_id(0).to(tl.int64)
    e, slot = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    x = tl.load(logits + t * experts + e, mask=e < experts, other=-float("inf"))
    x = tl.exp(x - tl.max(x, 0))
    scores = tl.where(e < experts, x / tl.sum(x, 0), -1.0)
    if GROUPS > 1:
        group = e // (experts // GROUPS)
        left = scores  # of the groups that are not chosen
        for _ in tl.static_range(TOP_GROUPS):
            left = tl.where(group == tl.argmax(left, 0) // (experts // GROUPS), -1.0, left)
        scores = tl.where((left >= 0) & (e < experts), 0.0, scores)
    own_weights, own_ids = tl.full([SLOTS], 1.0, tl.float32), slot
    total = 0.0
    for i in range(shared, top_k):
        best, most = tl.minimum(tl.argmax(scores, 0), experts - 1), tl.max(scores, 0)  # NaN must not reach beyond
        own_ids = tl.where(slot == i, shared + best, own_ids)
        own_weights = tl.where(slot == i, most, own_weights)
        scores = tl.where(e == best, -1.0, scores)
        total += most
    factor = scale
    if NORM:
        factor = 1.0 / (total + 1e-20)
    own_weights = tl.where(slot < shared, 1.0, own_weights * factor)
    tl.store(weights + t * top_k + slot, own_weights, mask=slot < top_k)
    tl.store(ids + t * top_k + slot, own_ids, mask=slot < top_k)
