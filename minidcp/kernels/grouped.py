"""The experts' products in bf16: a product of blocks of rows, where the rows of a block share a
weight. `align.py` makes the blocks, `experts.py` puts two products together, and `grouped_fp8.py`
has the same in FP8. Every sum has a fixed order, so results are deterministic."""

from typing import Any

from torch import Tensor

from minidcp.kernels import get_device_properties, launch_early, wait_for_previous
from minidcp.kernels.align import Blocks
from minidcp.kernels.compiler import TensorDescriptor, tl, triton
from minidcp.kernels.grouped_hopper import multiply_on_hopper
from minidcp.kernels.linear import add_product
from minidcp.kernels.tiles import Tile

# The three kernels each compute one product, for three ways to arrange the choices. A program
# computes BN outputs of one block, which is up to BM choices of one expert, BK inputs at a time.
# The weights are the left operand, so that a few tokens fill a tensor core's instruction.
#
# GATED: weight is [E, 2 · dim_out, dim_in], gate and up, and the output is silu(gate) · up.
#     Otherwise weight is [E, dim_out, dim_in], and the output is the product.
# choices_per_row: how many choices in a row have the same row of x as input.
# num_tiles: how many tiles of BN outputs a block has.


@triton.jit(do_not_specialize=["num_choices", "choices_per_row", "num_tiles"])
def multiply_direct_kernel(
    x, weight, experts, out,
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

    expert = tl.load(experts + block)
    choice = tl.where(m == 0, block, num_choices)
    multiply_block(
        x, weight, out, expert, choice, n, k,
        num_choices, choices_per_row, dim_in, dim_out,
        GATED, EVEN, BM, BN, BK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["max_blocks", "num_choices", "choices_per_row", "num_tiles"])
def multiply_blocks_kernel(
    x, weight, experts, choices, out,
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

    num_blocks = tl.load(experts + max_blocks)
    expert = tl.load(experts + block)
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
    x, weight, experts, choices, out,
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

    num_blocks = tl.load(experts + max_blocks)
    expert = tl.load(experts + block)
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


def can_copy_boxes(weight: Tensor) -> bool:
    """Whether there is a tensor memory accelerator (Hopper's), which needs rows that begin at
    multiples of 16 bytes."""
    has_accelerator = get_device_properties().capability >= (9, 0)
    return has_accelerator and weight.shape[-1] * weight.element_size() % 16 == 0


def multiply_blocks(x: Tensor, weight: Tensor, blocks: Blocks, tile: Tile, gated: bool) -> Tensor:
    """One product for all choices.

    Args:
        x: [T, I], or [T · K, I] with a row for each choice. If the blocks are sorted, it is
            [max_blocks · bm, I] with a row for each place in the blocks, unless the tile gathers.
        weight: [E, O, I], or [E, 2 O, I] if gated.
        gated: the result is silu(gate) · up.

    Returns:
        [T · K, O], in the order of choices; gated and sorted: [max_blocks · bm, O].
    """
    num_weights = 2 if gated else 1
    dim_in = x.shape[1]
    dim_out = weight.shape[1] // num_weights
    num_rows = blocks.num_choices
    if blocks.is_sorted and gated:
        num_rows = blocks.max_blocks * blocks.bm
    out = x.new_empty(num_rows, dim_out)
    if tile.is_for_hopper:
        multiply_on_hopper(x, weight, blocks, tile, gated, out)
        return out

    bm = blocks.bm
    bk = tile.bk * 2 // x.element_size()  # tiles are for bf16
    stage_bytes = bk * (bm + tile.bn * num_weights) * x.element_size()
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
        num_stages=limit_stages(tile.stages, stage_bytes),
        **launch_early(),
    )

    if blocks.is_direct:
        multiply_direct_kernel[grid](
            x, weight, blocks.experts, out,
            num_rows, choices_per_row, dim_in, dim_out, num_tiles,
            EVEN=is_even, **options,
        )  # fmt: skip
    elif blocks.is_sorted:
        x_boxes = TensorDescriptor.from_tensor(x, [bm, bk])
        weight_boxes = TensorDescriptor.from_tensor(weight.flatten(0, 1), [tile.bn, bk])
        multiply_sorted_kernel[grid](
            x_boxes, weight_boxes, blocks.experts, blocks.choices, out,
            blocks.max_blocks, num_rows, dim_in, dim_out, num_tiles,
            **options,
        )  # fmt: skip
    else:
        multiply_blocks_kernel[grid](
            x, weight, blocks.experts, blocks.choices, out,
            blocks.max_blocks, num_rows, choices_per_row, dim_in, dim_out, num_tiles,
            EVEN=is_even, **options,
        )  # fmt: skip
    return out


def limit_stages(stages: int, stage_bytes: int) -> int:
    """As many stages as fit into shared memory."""
    return max(1, min(stages, get_device_properties().shared_memory // stage_bytes))
