"""Products in FP8 of one to four rows, in Gluon: all that counts is how fast weights come from
memory. They are multiplied on CUDA cores, in float32. Threads keep their sums to themselves until
the end, so nothing waits inside of the loop. For more rows: `grouped_fp8.py`, on tensor cores."""

from typing import Any

from torch import Tensor

from minidcp.kernels import launch_early, wait_for_previous
from minidcp.kernels.align import Blocks
from minidcp.kernels.compiler import gl, gluon, triton
from minidcp.kernels.fp8 import BLOCK, E4M3_MAX, TINY, Fp8Stack, Fp8Tensor
from minidcp.kernels.grouped_fp8 import make_operand
from minidcp.kernels.tiles import MAX_DIRECT_TOKENS, Tile

# A thread loads 16 values at once, 16 bytes of weights: a part. A block of x has 8 of them.
# Weights and x are [rows, blocks, parts of a block, values of a part].
X_BLOCK = gl.constexpr(BLOCK)
PART = gl.constexpr(16)


@gluon.jit
def find_parts(first, BK: gl.constexpr, layout: gl.constexpr):
    """Of the inputs [first, first + BK): the blocks of x [1, blocks, 1], the parts of each block
    [1, 1, 8], and the values of each part [1, 1, 1, 16]."""
    by_part: gl.constexpr = gl.SliceLayout(3, layout)
    block_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, by_part))
    part_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, by_part))
    value_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    block = first // X_BLOCK + gl.arange(0, BK // X_BLOCK, block_layout)
    part = gl.arange(0, X_BLOCK // PART, part_layout)
    value = gl.arange(0, PART, value_layout)
    return block[None, :, None], part[None, None, :], value[None, None, None, :]


@gluon.jit
def load_inputs(
    x, x_scales, row, num_x_rows, first, dim_in, BK: gl.constexpr, layout: gl.constexpr
):
    """Inputs [first, first + BK) of a row of x: values [1, blocks, 8, 16] in float32, and scales
    [1, blocks, 1]. If x has no scales, it is quantised here."""
    block, part, value = find_parts(first, BK, layout)
    k = block * X_BLOCK + part * PART
    pointers = x + row * dim_in + k[:, :, :, None] + value
    values = gl.load(pointers, mask=(k < dim_in)[:, :, :, None], other=0.0).to(gl.float32)
    if x_scales is not None:
        in_row = block * X_BLOCK < dim_in
        scales = gl.load(x_scales + row + block * num_x_rows, mask=in_row, other=0.0)
    else:
        largest = gl.max(gl.max(gl.abs(values), 3), 2)
        scales = gl.maximum(largest / E4M3_MAX, TINY)[:, :, None]
        values = (values / scales[:, :, :, None]).to(gl.float8e4nv).to(gl.float32)
    return values, scales


@gluon.jit
def load_weights(
    weight, weight_scales, row, first, dim_in, num_rows, weight_b, weight_n,
    W_BLOCK: gl.constexpr, BK: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Inputs [first, first + BK) of these rows [N, 1, 1] of the weight: values [N, blocks, 8, 16]
    in e4m3, and a scale for each part, [N, blocks, 8]."""
    block, part, value = find_parts(first, BK, layout)
    inside = block * X_BLOCK + part * PART < dim_in
    # A block of x has one or more of the weight's.
    parts: gl.constexpr = W_BLOCK // PART
    w_block = block * (X_BLOCK // W_BLOCK) + part // parts
    offset = row.to(gl.int64) * weight_n + w_block.to(gl.int64) * weight_b + part % parts * PART
    pointers = weight + offset[:, :, :, None] + value
    values = gl.load(pointers, mask=inside[:, :, :, None], other=0.0)
    return values, gl.load(weight_scales + row + w_block * num_rows, mask=inside, other=0.0)


@gluon.jit
def multiply_parts(w, w_scales, inputs, scales):
    """The products of each part, added up: [N, blocks, 8]."""
    return gl.sum(w.to(gl.float32) * inputs, 3) * (w_scales * scales)


@gluon.jit(do_not_specialize=["num_x_rows", "choices_per_row", "num_tiles"])
def multiply_gated_vector_kernel(
    x, x_scales, weight, weight_scales, experts, out,
    num_x_rows, choices_per_row, dim_in, dim_out, num_tiles, weight_e, weight_b, weight_n,
    W_BLOCK: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, LAYOUT: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """BN outputs of one choice: silu(gate) · up.

    The names are those of `grouped.py`. The last three numbers are strides of the weight: of an
    expert, a block and a row.
    """
    wait_for_previous(EARLY)
    by_part: gl.constexpr = gl.SliceLayout(3, LAYOUT)
    by_row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, by_part))
    choice = (gl.program_id(0) // num_tiles).to(gl.int64)
    n = gl.program_id(0) % num_tiles * BN + gl.arange(0, BN, by_row)
    row = (n % dim_out)[:, None, None]
    num_rows = dim_out * 2
    expert = gl.load(experts + choice).to(gl.int64)
    weight += expert * weight_e
    weight_scales += expert * (dim_in // W_BLOCK) * num_rows

    gate = gl.zeros([BN, BK // X_BLOCK, X_BLOCK // PART], gl.float32, by_part)
    up = gl.zeros_like(gate)
    for first in range(0, dim_in, BK):
        inputs, scales = load_inputs(
            x, x_scales, choice // choices_per_row, num_x_rows, first, dim_in, BK, LAYOUT
        )
        gate_w, gate_scales = load_weights(
            weight, weight_scales, row, first, dim_in, num_rows, weight_b, weight_n,
            W_BLOCK, BK, LAYOUT,
        )  # fmt: skip
        up_w, up_scales = load_weights(
            weight, weight_scales, row + dim_out, first, dim_in, num_rows, weight_b, weight_n,
            W_BLOCK, BK, LAYOUT,
        )  # fmt: skip
        gate += multiply_parts(gate_w, gate_scales, inputs, scales)
        up += multiply_parts(up_w, up_scales, inputs, scales)

    gate_sum = gl.sum(gl.sum(gate, 2), 1)
    result = gate_sum / (1 + gl.exp(-gate_sum)) * gl.sum(gl.sum(up, 2), 1)
    gl.store(out + choice * dim_out + n, result.to(out.dtype.element_ty), mask=n < dim_out)


@gluon.jit(do_not_specialize=["num_x_rows", "choices_per_row", "num_tiles"])
def multiply_vector_kernel(
    x, x_scales, weight, weight_scales, experts, out,
    num_x_rows, choices_per_row, dim_in, dim_out, num_tiles, weight_e, weight_b, weight_n,
    ROWS: gl.constexpr, WHOLE: gl.constexpr,
    W_BLOCK: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, LAYOUT: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """BN outputs of one choice. If there is only one expert: of ROWS rows of x.

    The first weights are loaded while the kernel before this one still runs. So `experts` must have
    been written before that kernel. WHOLE says that BK covers all inputs: without a loop there are
    fewer registers.
    """
    by_part: gl.constexpr = gl.SliceLayout(3, LAYOUT)
    by_row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, by_part))
    choice = (gl.program_id(0) // num_tiles).to(gl.int64)
    n = gl.program_id(0) % num_tiles * BN + gl.arange(0, BN, by_row)
    row = (n % dim_out)[:, None, None]
    if experts is not None:
        expert = gl.load(experts + choice).to(gl.int64)
        weight += expert * weight_e
        weight_scales += expert * (dim_in // W_BLOCK) * dim_out

    w, w_scales = load_weights(
        weight, weight_scales, row, 0, dim_in, dim_out, weight_b, weight_n, W_BLOCK, BK, LAYOUT
    )
    wait_for_previous(EARLY)
    x_row = choice // choices_per_row
    inputs, scales = load_inputs(x, x_scales, x_row, num_x_rows, 0, dim_in, BK, LAYOUT)
    acc = multiply_parts(w, w_scales, inputs, scales)
    if ROWS == 2:
        inputs, scales = load_inputs(x, x_scales, x_row + 1, num_x_rows, 0, dim_in, BK, LAYOUT)
        second = multiply_parts(w, w_scales, inputs, scales)

    if not WHOLE:
        for first in range(BK, dim_in, BK):
            w, w_scales = load_weights(
                weight, weight_scales, row, first, dim_in, dim_out, weight_b, weight_n,
                W_BLOCK, BK, LAYOUT,
            )  # fmt: skip
            inputs, scales = load_inputs(x, x_scales, x_row, num_x_rows, first, dim_in, BK, LAYOUT)
            acc += multiply_parts(w, w_scales, inputs, scales)
            if ROWS == 2:
                inputs, scales = load_inputs(
                    x, x_scales, x_row + 1, num_x_rows, first, dim_in, BK, LAYOUT
                )
                second += multiply_parts(w, w_scales, inputs, scales)

    result = gl.sum(gl.sum(acc, 2), 1)
    gl.store(out + choice * dim_out + n, result.to(out.dtype.element_ty), mask=n < dim_out)
    if ROWS == 2:
        result = gl.sum(gl.sum(second, 2), 1)
        gl.store(out + dim_out + n, result.to(out.dtype.element_ty), mask=n < dim_out)


def multiply_vector(
    x: Tensor | Fp8Tensor,
    weight: Fp8Tensor | Fp8Stack,
    blocks: Blocks,
    tile: Tile,
    out: Tensor,
    gated: bool = False,
) -> None:
    """One product where every choice is a block of its own.

    Args:
        x: [T, I], or [T · K, I] with a row for each choice, contiguous. Each program quantises what
            is not in FP8 yet, so that no launch is needed for it.
        weight: [E, O, I], or [E, 2 O, I] if gated; a matrix [O, I] stands for one expert, and then
            T is at most 2: its weights are read once for both rows.
        blocks: unless gated, the experts must have been chosen before the kernel just before this.
        out: [T · K, O], where the result is written.
        gated: the result is silu(gate) · up.
    """
    w = make_operand(weight)
    num_choices, dim_out = out.shape
    rows = num_choices if blocks.experts is None else 1
    assert rows <= MAX_DIRECT_TOKENS
    x_values, x_scales = (x.values, x.scales) if isinstance(x, Fp8Tensor) else (x, None)

    num_tiles = triton.cdiv(dim_out, tile.bn)
    grid = (num_choices // rows * num_tiles,)
    arguments = (
        x_values, x_scales, w.values, w.scales, blocks.experts, out,
        len(x), num_choices // len(x), w.dim_in, dim_out, num_tiles, *w.strides,
    )  # fmt: skip
    options: dict[str, Any] = {
        "W_BLOCK": w.block, "BN": tile.bn, "BK": tile.bk, "LAYOUT": make_layout(tile),
        "num_warps": tile.warps, **launch_early(),
    }  # fmt: skip
    if gated:
        multiply_gated_vector_kernel[grid](*arguments, **options)
    else:
        is_whole = w.dim_in <= tile.bk
        multiply_vector_kernel[grid](*arguments, ROWS=rows, WHOLE=is_whole, **options)


def make_layout(tile: Tile) -> Any:
    """Which thread has which weights [BN, blocks, parts of a block, values of a part]: a part at a
    time, and blocks of one row beside each other, as far as there are some."""
    blocks = tile.bk // BLOCK
    lanes = min(4, blocks)
    warps = min(tile.warps, blocks // lanes)
    return gl.BlockedLayout(
        size_per_thread=[1, 1, 1, 16],
        threads_per_warp=[4 // lanes, lanes, BLOCK // 16, 1],
        warps_per_cta=[tile.warps // warps, warps, 1, 1],
        order=[3, 2, 1, 0],
    )
