"""Products in FP8 of one to four rows, in Gluon: all that counts is how fast weights come from
memory. So they are multiplied on CUDA cores, with few instructions and few registers, of programs
that are all resident together. For more rows: `grouped_fp8.py`, on tensor cores."""

import torch
from torch import Tensor

from minidcp.kernels import launch_early, wait_for_previous
from minidcp.kernels.align import Blocks
from minidcp.kernels.compiler import gl, gluon, triton
from minidcp.kernels.fp8 import BLOCK, E4M3_MAX, TINY, Fp8Stack, Fp8Tensor
from minidcp.kernels.grouped_fp8 import make_operand
from minidcp.kernels.tiles import MAX_DIRECT_TOKENS, Tile

# A thread loads a part at once: 16 values, which are 4 words. A block of BLOCK values has 8 parts.
# Tensors of weights and of x are [rows, blocks, parts of a block, words or values of a part].
X_BLOCK = gl.constexpr(BLOCK)
PARTS = gl.constexpr(BLOCK // 16)

# Two products at a time are computed in half precision, where those of e4m3 values are exact. Up to
# eight are added up there. x is made smaller, so that even 8 · 448 · 448 stays below 65,504.
SHRINK = gl.constexpr(2.0**-5)


@gluon.jit
def shrink_words(words):
    """The four e4m3 values of a word, made smaller: two pairs in half precision."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        .reg .b32 first, second, shrink;
        mov.b32 shrink, 0x28002800;  // 2^-5 twice
        mov.b32 {low, high}, $2;
        cvt.rn.f16x2.e4m3x2 first, low;
        cvt.rn.f16x2.e4m3x2 second, high;
        mul.rn.f16x2 $0, first, shrink;
        mul.rn.f16x2 $1, second, shrink;
        }""",
        "=r,=r,r", [words], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def join_halves(low, high):
    """A pair in half precision."""
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;",
        "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def multiply_words(words, first, second):
    """Four e4m3 values times two pairs: a pair of sums of two products."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        .reg .b32 a, b, product;
        mov.b32 {low, high}, $1;
        cvt.rn.f16x2.e4m3x2 a, low;
        cvt.rn.f16x2.e4m3x2 b, high;
        mul.rn.f16x2 product, a, $2;
        fma.rn.f16x2 $0, b, $3, product;
        }""",
        "=r,r,r,r", [words, first, second], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def add_pairs(a, b):
    return gl.inline_asm_elementwise(
        "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def multiply_parts(words, first, second):
    """The products of weights [rows, blocks, parts, words] and of x, added up by part: float32."""
    pairs = gl.reduce(multiply_words(words, first, second), 3, add_pairs)
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b16 a, b;
        mov.b32 {a, b}, $2;
        cvt.f32.f16 $0, a;
        cvt.f32.f16 $1, b;
        }""",
        "=f,=f,r", [pairs], dtype=(gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip
    return low + high


@gluon.jit
def find_parts(first, BK: gl.constexpr, layout: gl.constexpr):
    """Of the inputs [first, first + BK): the blocks [1, blocks, 1], the parts [1, 1, 8] of each,
    and the elements of a part, [1, 1, 1, elements]."""
    by_part: gl.constexpr = gl.SliceLayout(3, layout)
    block_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, by_part))
    part_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, by_part))
    element_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    block = first // X_BLOCK + gl.arange(0, BK // X_BLOCK, block_layout)
    part = gl.arange(0, PARTS, part_layout)
    element = gl.arange(0, layout.size_per_thread[3], element_layout)
    return block[None, :, None], part[None, None, :], element[None, None, None, :]


@gluon.jit
def load_inputs(
    x, x_scales, row, num_x_rows, first, dim_in,
    BK: gl.constexpr, words: gl.constexpr, values: gl.constexpr,
):  # fmt: skip
    """Inputs [first, first + BK) of a row as `multiply_words` takes them, in layout `words`, and
    what the products are to be multiplied by, [1, blocks, 1]. They are quantised if they are wide;
    `values` is a layout for that."""
    if x_scales is not None:
        block, part, word = find_parts(first, BK, words)
        inside = block * X_BLOCK + part * 16 < dim_in
        pointers = x + row * (dim_in // 16 * 4) + (block * PARTS + part) * 4
        loaded = gl.load(pointers[:, :, :, None] + word, mask=inside[:, :, :, None], other=0)
        low, high = shrink_words(loaded)
        in_row = block * X_BLOCK < dim_in
        scales = gl.load(x_scales + row + block * num_x_rows, mask=in_row, other=0.0)
    else:
        block, part, value = find_parts(first, BK, values)
        inside = block * X_BLOCK + part * 16 < dim_in
        pointers = x + row * dim_in + (block * PARTS + part) * 16
        wide = gl.load(pointers[:, :, :, None] + value, mask=inside[:, :, :, None], other=0.0)
        wide = wide.to(gl.float32)
        scales = gl.max(gl.max(gl.abs(wide), 3), 2) / E4M3_MAX
        scales = gl.maximum(scales, TINY)
        wide = (wide / scales[:, :, None, None]).to(gl.float8e4nv).to(gl.float32) * SHRINK
        # From 16 values to 4 words of two pairs.
        pairs = gl.reshape(wide, [1, BK // X_BLOCK, PARTS, 4, 2, 2])
        even, odd = gl.split(pairs)
        even_low, even_high = gl.split(even)
        odd_low, odd_high = gl.split(odd)
        low = gl.convert_layout(join_halves(even_low, odd_low), words)
        high = gl.convert_layout(join_halves(even_high, odd_high), words)
        by_block: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, words))
        scales = gl.convert_layout(scales, by_block)[:, :, None]
    return low, high, scales / SHRINK


@gluon.jit
def load_weights(
    weight, weight_scales, row, first, dim_in, num_rows, weight_b, weight_n,
    W_BLOCK: gl.constexpr, BK: gl.constexpr, words: gl.constexpr,
):  # fmt: skip
    """Inputs [first, first + BK) of these rows [N, 1, 1]: words, and a scale for each part."""
    block, part, word = find_parts(first, BK, words)
    inside = block * X_BLOCK + part * 16 < dim_in
    w_parts: gl.constexpr = W_BLOCK // 16
    w_block = block * (X_BLOCK // W_BLOCK) + part // w_parts
    offset = row.to(gl.int64) * weight_n + w_block.to(gl.int64) * weight_b + part % w_parts
    pointers = weight + (offset * 4)[:, :, :, None] + word
    loaded = gl.load(pointers, mask=inside[:, :, :, None], other=0)
    return loaded, gl.load(weight_scales + row + w_block * num_rows, mask=inside, other=0.0)


@gluon.jit(do_not_specialize=["num_x_rows", "choices_per_row", "num_tiles"])
def multiply_vector_kernel(
    x, x_scales, weight, weight_scales, experts, out,
    num_x_rows, choices_per_row, dim_in, dim_out, num_tiles, weight_e, weight_b, weight_n,
    GATED: gl.constexpr, ROWS: gl.constexpr, AHEAD: gl.constexpr, WHOLE: gl.constexpr,
    W_BLOCK: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    WARPS_N: gl.constexpr, WARPS_K: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """BN outputs of one choice; or of ROWS rows of x, if there is but one expert.

    The names are those of `grouped.py`. The weight is in words, and its last three numbers are
    strides in parts: of an expert, a block and a row. x is in words, too, or it is wide and has no
    scales. If AHEAD, weights are loaded before the products of those before them, the first ones
    even while the kernel before this one runs: then `experts` must be older than that. WHOLE says
    that BK covers all inputs.
    """
    lanes_k: gl.constexpr = 4 if BK >= 4 * X_BLOCK else BK // X_BLOCK
    threads: gl.constexpr = [4 // lanes_k, lanes_k, PARTS, 1]
    warps: gl.constexpr = [WARPS_N, WARPS_K, 1, 1]
    words: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], threads, warps, [3, 2, 1, 0])
    values: gl.constexpr = gl.BlockedLayout([1, 1, 1, 16], threads, warps, [3, 2, 1, 0])
    by_part: gl.constexpr = gl.SliceLayout(3, words)
    by_row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, by_part))

    if not AHEAD:
        wait_for_previous(EARLY)
    choice = (gl.program_id(0) // num_tiles).to(gl.int64)
    n = gl.program_id(0) % num_tiles * BN + gl.arange(0, BN, by_row)
    num_rows = dim_out * (2 if GATED else 1)
    if experts is not None:
        expert = gl.load(experts + choice).to(gl.int64)
        weight += expert * weight_e * 4
        weight_scales += expert * (dim_in // W_BLOCK) * num_rows
    row = (n % dim_out)[:, None, None]
    up_row = row + dim_out
    x_row = choice // choices_per_row

    if AHEAD:
        w, scale = load_weights(
            weight, weight_scales, row, 0, dim_in, num_rows, weight_b, weight_n, W_BLOCK, BK, words
        )
        wait_for_previous(EARLY)

    acc = gl.zeros([BN, BK // X_BLOCK, PARTS], gl.float32, by_part)
    second = gl.zeros([BN, BK // X_BLOCK, PARTS], gl.float32, by_part)  # up, or of the second row
    for first in range(0, dim_in, BK):
        low, high, x_scale = load_inputs(
            x, x_scales, x_row, num_x_rows, first, dim_in, BK, words, values
        )
        if ROWS == 2:
            second_low, second_high, second_scale = load_inputs(
                x, x_scales, x_row + 1, num_x_rows, first, dim_in, BK, words, values
            )
        if AHEAD:
            w_now = w
            scale_now = scale
            if not WHOLE:
                w, scale = load_weights(
                    weight, weight_scales, row, first + BK, dim_in, num_rows, weight_b, weight_n,
                    W_BLOCK, BK, words,
                )  # fmt: skip
        else:
            w_now, scale_now = load_weights(
                weight, weight_scales, row, first, dim_in, num_rows, weight_b, weight_n,
                W_BLOCK, BK, words,
            )  # fmt: skip
        if GATED:
            up, up_scale = load_weights(
                weight, weight_scales, up_row, first, dim_in, num_rows, weight_b, weight_n,
                W_BLOCK, BK, words,
            )  # fmt: skip
        acc += multiply_parts(w_now, low, high) * (scale_now * x_scale)
        if GATED:
            second += multiply_parts(up, low, high) * (up_scale * x_scale)
        if ROWS == 2:
            second += multiply_parts(w_now, second_low, second_high) * (scale_now * second_scale)

    result = gl.sum(gl.sum(acc, 2), 1)
    other = gl.sum(gl.sum(second, 2), 1)
    in_row = n < dim_out
    if GATED:
        result = result / (1 + gl.exp(-result)) * other
    gl.store(out + choice * dim_out + n, result.to(out.dtype.element_ty), mask=in_row)
    if ROWS == 2:
        gl.store(out + dim_out + n, other.to(out.dtype.element_ty), mask=in_row)


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
        tile: with two stages weights are loaded ahead. Not for gate and up: there the experts were
            chosen by the kernel before.
        out: [T · K, O], where the result is written.
        gated: the result is silu(gate) · up.
    """
    w = make_operand(weight)
    num_choices, dim_out = out.shape
    rows = num_choices if blocks.experts is None else 1
    loads_ahead = tile.stages > 1
    assert rows <= MAX_DIRECT_TOKENS and not (gated and loads_ahead)
    x_values = x.values.view(torch.int32) if isinstance(x, Fp8Tensor) else x
    x_scales = x.scales if isinstance(x, Fp8Tensor) else None

    num_tiles = triton.cdiv(dim_out, tile.bn)
    warps_k = max(1, min(tile.warps, tile.bk // (4 * BLOCK)))
    multiply_vector_kernel[(num_choices // rows * num_tiles,)](
        x_values, x_scales, w.values.view(torch.int32), w.scales, blocks.experts, out,
        len(x), num_choices // len(x), w.dim_in, dim_out, num_tiles,
        *(stride // 16 for stride in w.strides),
        GATED=gated, ROWS=rows, AHEAD=loads_ahead, WHOLE=w.dim_in <= tile.bk,
        W_BLOCK=w.block, BN=tile.bn, BK=tile.bk,
        WARPS_N=tile.warps // warps_k, WARPS_K=warps_k,
        num_warps=tile.warps, **launch_early(),
    )  # fmt: skip
