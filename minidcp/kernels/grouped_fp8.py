"""The experts' products in FP8; a dense product is that of one expert. Weights and rows meet on
tensor cores. Their scales are applied behind them, block by block: the tensor cores' own sum is not
exact enough for a whole row (arXiv:2412.19437, §3.3.2). Few rows go to `vector_fp8.py`."""

from typing import Any, NamedTuple

from torch import Tensor

from minidcp.kernels import launch_early, wait_for_previous
from minidcp.kernels.align import Blocks
from minidcp.kernels.compiler import TensorDescriptor, tl, triton
from minidcp.kernels.fp8 import BLOCK, Fp8Stack, Fp8Tensor, allocate_rows, find_scale
from minidcp.kernels.grouped import can_copy_boxes, limit_stages
from minidcp.kernels.grouped_hopper import multiply_on_hopper
from minidcp.kernels.tiles import Tile

X_BLOCK = tl.constexpr(BLOCK)


@triton.jit(
    do_not_specialize=["max_blocks", "num_choices", "num_x_rows", "choices_per_row", "num_tiles"]
)
def multiply_fp8_kernel(
    x, x_scales, weight, weight_scales, experts, choices, out, out_scales,
    max_blocks, num_choices, num_x_rows, choices_per_row, dim_in, dim_out, num_tiles,
    weight_e, weight_b, weight_n,
    GATED: tl.constexpr, SORTED: tl.constexpr, BOXES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BN outputs of one block of up to BM choices, BK inputs at a time, which share a scale.

    If SORTED, x's rows are in the order of the blocks, and x is a descriptor of the tensor memory
    accelerator. The output is in that order too if it is also GATED. If BOXES, so is the weight, of
    all experts' blocks below each other; else its strides count. `out_scales` is not None if the
    output is to be quantised; BN is then the block of its scales.
    """
    wait_for_previous(EARLY)
    block = tl.program_id(0) // num_tiles
    first_out = tl.program_id(0) % num_tiles * BN
    m = tl.arange(0, BM)
    n = first_out + tl.arange(0, BN)
    k = tl.arange(0, BK)

    place = block * BM + m
    if experts is None:
        active_blocks = max_blocks
        expert = 0
        choice = tl.minimum(place, num_choices)
    else:
        active_blocks = tl.load(experts + max_blocks)
        expert = tl.load(experts + block)
        choice = tl.load(choices + place)
    if block < active_blocks:
        # Outputs and choices beyond the last wrap around: their products are not stored.
        num_rows = dim_out * (2 if GATED else 1)
        num_blocks = dim_in // BK
        first_row = expert * num_blocks * num_rows  # of blocks below each other
        row = n % dim_out
        if SORTED:
            x_row = place % num_x_rows
        else:
            x_row = choice % num_choices // choices_per_row
            x_columns = x + x_row.to(tl.int64)[None, :] * dim_in + k[:, None]
        if not BOXES:
            weight += tl.cast(expert, tl.int64) * weight_e
            weight_rows = weight + row.to(tl.int64)[:, None] * weight_n + k[None, :]
            up_rows = weight_rows + dim_out.to(tl.int64) * weight_n
        row_scales = weight_scales + tl.cast(first_row, tl.int64) + row
        column_scales = x_scales + x_row

        acc = tl.zeros([BN, BM], tl.float32)
        up = tl.zeros([BN, BM], tl.float32)
        scale = tl.load(row_scales)
        up_scale = scale
        if GATED:
            up_scale = tl.load(row_scales + dim_out)
        x_scale = tl.load(column_scales)
        for i in range(num_blocks):
            # The next scales are asked for before the products, behind which they are needed.
            following = tl.minimum(i + 1, num_blocks - 1)
            next_scales = row_scales + following * num_rows
            next_scale = tl.load(next_scales)
            next_up_scale = next_scale
            if GATED:
                next_up_scale = tl.load(next_scales + dim_out)
            next_x_scale = tl.load(column_scales + following * BK // X_BLOCK * num_x_rows)

            first_box = first_row + i * num_rows + first_out
            offset = tl.cast(i, tl.int64) * weight_b
            inputs = x.load([block * BM, i * BK]).T if SORTED else tl.load(x_columns + i * BK)
            w = weight.load([first_box, 0]) if BOXES else tl.load(weight_rows + offset)
            acc += tl.dot(w, inputs) * scale[:, None] * x_scale[None, :]
            if GATED:
                w = weight.load([first_box + dim_out, 0]) if BOXES else tl.load(up_rows + offset)
                up += tl.dot(w, inputs) * up_scale[:, None] * x_scale[None, :]
            scale = next_scale
            up_scale = next_up_scale
            x_scale = next_x_scale

        if GATED:
            acc = acc / (1 + tl.exp(-acc)) * up
        out_row = place if SORTED and GATED else choice
        num_out_rows = num_x_rows if SORTED and GATED else num_choices
        is_row = out_row < num_out_rows
        if out_scales is not None:
            acc = tl.where((n < dim_out)[:, None], acc, 0.0)
            scale = find_scale(acc, 0)
            tile = tl.program_id(0) % num_tiles
            tl.store(out_scales + tile * num_out_rows + out_row, scale, mask=is_row)
            acc = acc / scale[None, :]
        pointers = out + out_row.to(tl.int64)[None, :] * dim_out + n[:, None]
        mask = is_row[None, :] & (n < dim_out)[:, None]
        tl.store(pointers, acc.to(out.dtype.element_ty), mask=mask)


class Operand(NamedTuple):
    """A weight as the kernels take it.

    Attributes:
        dim_out: rows, of gate and up together.
        strides: of an expert, a block and a row.
    """

    values: Tensor
    scales: Tensor
    block: int
    dim_in: int
    dim_out: int
    strides: tuple[int, int, int]


def make_operand(weight: Fp8Tensor | Fp8Stack) -> Operand:
    """A matrix is a stack of one, whose rows are whole in memory."""
    values = weight.values
    if isinstance(weight, Fp8Tensor):
        dim_out, dim_in = values.shape
        strides = (0, weight.block, dim_in)
    else:
        _, dim_out, dim_in = weight.shape
        strides = (values.stride(0), values.stride(1), values.stride(2))
    assert dim_in % weight.block == 0
    return Operand(values, weight.scales, weight.block, dim_in, dim_out, strides)


def multiply_fp8_blocks(
    x: Fp8Tensor,
    weight: Fp8Tensor | Fp8Stack,
    blocks: Blocks,
    tile: Tile,
    out: Tensor,
    out_scales: Tensor | None = None,
) -> None:
    """One product for all choices, written to `out`; with out_scales, silu(gate) · up in FP8.

    Args:
        x: [T, I], or [T · K, I] with a row for each choice. If the blocks are sorted, it is
            [max_blocks · bm, I] with a row for each place in the blocks, unless the tile gathers.
        weight: [E, O, I], or with out_scales [E, 2 O, I], gate and up; a matrix [O, I] stands for
            one expert.
        out: [T · K, O], in the order of choices; with out_scales and sorted [max_blocks · bm, O].
        out_scales: the scales of `out`, as in `Fp8Tensor`.
    """
    gated = out_scales is not None
    if tile.is_for_hopper:
        assert isinstance(weight, Fp8Stack)
        multiply_on_hopper(x, weight, blocks, tile, gated, out, out_scales)
        return

    w = make_operand(weight)
    num_rows, dim_out = out.shape
    bm = blocks.bm
    x_operand: Any = x.values
    weight_operand: Any = w.values
    has_boxes = isinstance(weight, Fp8Stack) and can_copy_boxes(w.values)
    if has_boxes:
        rows = w.values.flatten(0, 2)
        weight_operand = TensorDescriptor.from_tensor(rows, [tile.bn, w.block])
    if blocks.is_sorted:
        x_operand = TensorDescriptor.from_tensor(x.values, [bm, w.block])

    num_tiles = triton.cdiv(dim_out, tile.bn)
    stage_bytes = w.block * (bm + tile.bn * (2 if gated else 1))
    multiply_fp8_kernel[(blocks.max_blocks * num_tiles,)](
        x_operand, x.scales, weight_operand, w.scales,
        blocks.experts, blocks.choices, out, out_scales,
        blocks.max_blocks, blocks.num_choices, len(x), max(1, num_rows // len(x)),
        w.dim_in, dim_out, num_tiles, *w.strides,
        GATED=gated, SORTED=blocks.is_sorted, BOXES=has_boxes,
        BM=bm, BN=tile.bn, BK=w.block, num_warps=tile.warps,
        num_stages=limit_stages(tile.stages, stage_bytes), **launch_early(),
    )  # fmt: skip


def multiply_gated(x: Fp8Tensor, weight: Fp8Stack, blocks: Blocks, tile: Tile) -> Fp8Tensor:
    """silu(gate) · up for all choices, in the order of the blocks if they are sorted."""
    num_rows = blocks.max_blocks * blocks.bm if blocks.is_sorted else blocks.num_choices
    out = allocate_rows(num_rows, weight.shape[1] // 2, x.device)
    assert tile.bn == out.block
    multiply_fp8_blocks(x, weight, blocks, tile, out.values, out.scales)
    return out
