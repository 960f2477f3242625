"""The experts' products: down(silu(gate(x)) · up(x)) for every token and each expert it chose.

`route.py` chooses the experts, `align.py` groups the choices into blocks, `tiles.py` says how the
work is cut. Every sum has a fixed order, so results are deterministic."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidcp.kernels import get_device_properties, launch_early, use_triton, wait_for_previous
from minidcp.kernels.align import Blocks, align, gather_rows
from minidcp.kernels.compiler import TensorDescriptor, tl, triton
from minidcp.kernels.linear import add_product
from minidcp.kernels.norm import sum_scaled_ref
from minidcp.kernels.tiles import Tile, choose_tiles


class ExpertOutputs(NamedTuple):
    """The outputs of each token's experts, not yet added up: the layer's output is their weighted
    sum, which `rms_norm` can do on the way.

    Attributes:
        values: [T, K, hidden].
        weights: [T, K] float32.
    """

    values: Tensor
    weights: Tensor

    def sum(self) -> Tensor:
        """[T, hidden], added in float32 and in the order of a token's experts."""
        if not use_triton(self.values):
            return sum_scaled_ref(self.values, self.weights)

        tokens, top_k, hidden = self.values.shape
        out = self.values.new_empty(tokens, hidden)
        sum_experts_kernel[tokens, triton.cdiv(hidden, 1024)](
            self.values, self.weights, out, hidden, TOP_K=top_k, BN=1024, **launch_early()
        )
        return out


def run_experts_ref(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor
) -> ExpertOutputs:
    tokens, top_k = ids.shape
    num_experts, hidden, _ = down.shape

    # Choices sorted by expert; those of expert e end at ends[e].
    expert, choice = ids.flatten().sort(stable=True)
    experts = torch.arange(num_experts, device=x.device)
    ends = torch.searchsorted(expert, experts, right=True).to(torch.int32)

    gate, up = F.grouped_mm(x[choice // top_k], gate_up.mT, offs=ends).chunk(2, -1)
    out = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    values = torch.empty_like(out).index_copy_(0, choice, out)
    return ExpertOutputs(values.view(tokens, top_k, hidden), weights)


# The next three kernels each compute one product, for three ways to arrange the choices. A program
# computes BN outputs of one block, which is up to BM choices of one expert, BK inputs at a time.
# The weights are the left operand, so that a few tokens fill a tensor core's instruction.
#
# GATED: weight is [E, 2 · dim_out, dim_in], gate and up, and the output is silu(gate) · up.
#     Otherwise weight is [E, dim_out, dim_in], and the output is the product.
# choices_per_row: how many choices in a row have the same row of x as input.
# num_tiles: how many tiles of BN outputs a block has.


@triton.jit(do_not_specialize=["num_choices", "choices_per_row", "num_tiles"])
def multiply_direct_kernel(
    x, weight, ids, out,
    num_choices, choices_per_row, dim_in, dim_out, num_tiles,
    GATED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For one or two tokens: every choice is a block of its own."""
    wait_for_previous(EARLY)
    block = tl.program_id(0) // num_tiles
    first_out = tl.program_id(0) % num_tiles * BN
    m = tl.arange(0, BM)
    n = first_out + tl.arange(0, BN)
    k = tl.arange(0, BK)

    expert = tl.load(ids + block)
    choice = tl.where(m == 0, block, num_choices)
    multiply_block(
        x, weight, out, expert, choice, n, k,
        num_choices, choices_per_row, dim_in, dim_out,
        GATED, EVEN, BM, BN, BK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["max_blocks", "num_choices", "choices_per_row", "num_tiles"])
def multiply_blocks_kernel(
    x, weight, choices, block_expert, out,
    max_blocks, num_choices, choices_per_row, dim_in, dim_out, num_tiles,
    GATED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For more tokens: x's rows are read from where they are."""
    wait_for_previous(EARLY)
    block = tl.program_id(0) // num_tiles
    first_out = tl.program_id(0) % num_tiles * BN
    m = tl.arange(0, BM)
    n = first_out + tl.arange(0, BN)
    k = tl.arange(0, BK)

    num_blocks = tl.load(block_expert + max_blocks)
    expert = tl.load(block_expert + block)
    choice = tl.load(choices + block * BM + m)
    if block < num_blocks:
        multiply_block(
            x, weight, out, expert, choice, n, k,
            num_choices, choices_per_row, dim_in, dim_out,
            GATED, EVEN, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def multiply_block(
    x, weight, out, expert, choice, n, k,
    num_choices, choices_per_row, dim_in, dim_out,
    GATED: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Outputs n [BN] of one expert for `choice` [BM], where num_choices stands for none."""
    # Outputs and choices beyond the last wrap around: their products are not stored.
    first_weight = expert * dim_out * (2 if GATED else 1)
    x_row = (choice % num_choices // choices_per_row).to(tl.int64)
    x_columns = x + x_row[None, :] * dim_in + k[:, None]
    weight_row = (first_weight + n % dim_out).to(tl.int64)
    weight_rows = weight + weight_row[:, None] * dim_in + k[None, :]

    acc = tl.zeros([BN, BM], tl.float32)
    up = tl.zeros([BN, BM], tl.float32)
    for first in range(0, dim_in, BK):
        inside = k < dim_in - first
        first_of_up = first + dim_out * dim_in
        inputs = load_inside(x_columns + first, inside[:, None], EVEN)
        w = load_inside(weight_rows + first, inside[None, :], EVEN)
        acc = add_product(w, inputs, acc)
        if GATED:
            w = load_inside(weight_rows + first_of_up, inside[None, :], EVEN)
            up = add_product(w, inputs, up)

    store_outputs(acc, up, out, choice, n, num_choices, dim_out, GATED)


@triton.jit
def load_inside(pointers, inside, EVEN: tl.constexpr):
    """0 for what is not inside. If EVEN, dim_in is a multiple of BK, so all is inside."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["max_blocks", "num_rows", "num_tiles"])
def multiply_sorted_kernel(
    x, weight, choices, block_expert, out,
    max_blocks, num_rows, dim_in, dim_out, num_tiles,
    GATED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For many tokens on Hopper: x's rows are in the order of the blocks, so that the tensor memory
    accelerator can copy boxes of them. x and weight are its descriptors.

    The num_rows rows of the output are in that order too if GATED, else in the order of choices.
    """
    wait_for_previous(EARLY)
    block = tl.program_id(0) // num_tiles
    first_out = tl.program_id(0) % num_tiles * BN
    m = tl.arange(0, BM)
    n = first_out + tl.arange(0, BN)

    num_blocks = tl.load(block_expert + max_blocks)
    expert = tl.load(block_expert + block)
    out_row = block * BM + m if GATED else tl.load(choices + block * BM + m)
    if block < num_blocks:
        # A box may reach beyond the outputs or choices of this block: that part is not stored.
        first_weight = expert * dim_out * (2 if GATED else 1)
        acc = tl.zeros([BN, BM], tl.float32)
        up = tl.zeros([BN, BM], tl.float32)
        for first in range(0, dim_in, BK):
            inputs = x.load([block * BM, first]).T
            w = weight.load([first_weight + first_out, first])
            acc = add_product(w, inputs, acc)
            if GATED:
                w = weight.load([first_weight + dim_out + first_out, first])
                up = add_product(w, inputs, up)
        store_outputs(acc, up, out, out_row, n, num_rows, dim_out, GATED)


@triton.jit
def store_outputs(acc, up, out, out_row, n, num_rows, dim_out, GATED: tl.constexpr):
    """Write acc [BN, BM], or silu(acc) · up if GATED, to outputs n [BN] of rows out_row [BM]."""
    dtype = out.dtype.element_ty
    if GATED:
        # Rounded where the torch definition rounds.
        gate = acc.to(dtype).to(tl.float32)
        up = up.to(dtype).to(tl.float32)
        acc = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32) * up

    pointers = out + out_row.to(tl.int64)[None, :] * dim_out + n[:, None]
    mask = (out_row < num_rows)[None, :] & (n < dim_out)[:, None]
    tl.store(pointers, acc.to(dtype), mask=mask)


@triton.jit
def sum_experts_kernel(
    values, weights, out, hidden, TOP_K: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr
):
    """One program adds BN columns of one token's outputs, in float32 and in the experts' order."""
    wait_for_previous(EARLY)
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BN], tl.float32)
    for i in tl.static_range(TOP_K):
        value_row = values + (t * TOP_K + i) * hidden
        value = tl.load(value_row + n, mask=n < hidden, other=0.0).to(tl.float32)
        acc += value * tl.load(weights + t * TOP_K + i)
    tl.store(out + t * hidden + n, acc.to(out.dtype.element_ty), mask=n < hidden)


def run_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor
) -> ExpertOutputs:
    """down(silu(gate(x[t])) · up(x[t])) of each token t and expert ids[t, i].

    Args:
        x: [T, hidden], T > 0. x, gate_up and down are contiguous and have the same dtype.
        gate_up: [E, 2 I, hidden], first the rows of gate and then those of up.
        down: [E, hidden, I].
        weights: [T, K] float32, for the sum of a token's outputs.
        ids: [T, K] int32. Shared experts are like all others here; see `route`.
    """
    if not use_triton(x):
        return run_experts_ref(x, gate_up, down, weights, ids)

    tokens, top_k = ids.shape
    num_experts, hidden, inter = down.shape
    tiles = choose_tiles(tokens, num_experts, top_k, hidden, inter)
    sort = tiles.sort and can_copy_boxes(hidden, inter, x.element_size())
    blocks = align(ids, num_experts, tiles.bm, sort)

    rows = gather_rows(x, blocks) if blocks.is_sorted else x
    h = multiply_blocks(rows, gate_up, blocks, tiles.gate_up, gated=True)
    values = multiply_blocks(h, down, blocks, tiles.down, gated=False)
    return ExpertOutputs(values.view(tokens, top_k, hidden), weights)


def can_copy_boxes(hidden: int, inter: int, itemsize: int) -> bool:
    """Whether there is a tensor memory accelerator (Hopper's), which needs rows that begin at
    multiples of 16 bytes."""
    has_accelerator = get_device_properties().capability >= (9, 0)
    return has_accelerator and hidden * itemsize % 16 == 0 and inter * itemsize % 16 == 0


def multiply_blocks(x: Tensor, weight: Tensor, blocks: Blocks, tile: Tile, gated: bool) -> Tensor:
    """One product for all choices.

    Args:
        x: [T, I], or [T · K, I] with a row for each choice. If the blocks are sorted, it is
            [max_blocks · bm, I] with a row for each place in the blocks.
        weight: [E, O, I], or [E, 2 O, I] if gated.
        gated: the result is silu(gate) · up.

    Returns:
        [T · K, O], in the order of choices; gated and sorted: [max_blocks · bm, O].
    """
    num_weights = 2 if gated else 1
    dim_in = x.shape[1]
    dim_out = weight.shape[1] // num_weights
    num_rows = len(x) if blocks.is_sorted and gated else blocks.ids.numel()
    out = x.new_empty(num_rows, dim_out)

    # As many stages as fit into shared memory.
    bm = blocks.bm
    bk = tile.bk * 2 // x.element_size()  # tiles are for bf16
    stage_bytes = bk * (bm + tile.bn * num_weights) * x.element_size()
    stages_that_fit = get_device_properties().shared_memory // stage_bytes

    num_tiles = triton.cdiv(dim_out, tile.bn)
    grid = (blocks.max_blocks * num_tiles,)
    choices_per_row = max(1, num_rows // len(x))
    is_even = dim_in % bk == 0
    options: dict[str, Any] = dict(
        GATED=gated,
        BM=bm,
        BN=tile.bn,
        BK=bk,
        num_warps=tile.warps,
        num_stages=max(1, min(tile.stages, stages_that_fit)),
        **launch_early(),
    )

    if blocks.choices is None:
        multiply_direct_kernel[grid](
            x, weight, blocks.ids, out,
            num_rows, choices_per_row, dim_in, dim_out, num_tiles,
            EVEN=is_even, **options,
        )  # fmt: skip
    elif blocks.is_sorted:
        x_boxes = TensorDescriptor.from_tensor(x, [bm, bk])
        weight_boxes = TensorDescriptor.from_tensor(weight.flatten(0, 1), [tile.bn, bk])
        multiply_sorted_kernel[grid](
            x_boxes, weight_boxes, blocks.choices, blocks.experts, out,
            blocks.max_blocks, num_rows, dim_in, dim_out, num_tiles,
            **options,
        )  # fmt: skip
    else:
        multiply_blocks_kernel[grid](
            x, weight, blocks.choices, blocks.experts, out,
            blocks.max_blocks, num_rows, choices_per_row, dim_in, dim_out, num_tiles,
            EVEN=is_even, **options,
        )  # fmt: skip
    return out
