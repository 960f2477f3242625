"""The experts' products in FP8 for prompts on Hopper GPUs, in Gluon (read `grouped_fp8.py` first).
With Triton's tiles prompts are bound by the L2 cache. A tile of 128 rows by 256 weights needs half
as many bytes for a product. Some warps only copy, ahead of two groups of four warps. Each of these
multiplies 64 rows, and adds up the products, with their scales, behind the tensor cores."""

from functools import cache
from typing import Any

from torch import Tensor

from minidcp.kernels import get_device_properties
from minidcp.kernels.align import Blocks
from minidcp.kernels.compiler import (
    GluonDescriptor,
    gl,
    gluon,
    hopper,
    load_box,
    load_pieces,
    triton,
)
from minidcp.kernels.fp8 import BLOCK, E4M3_MAX, TINY, Fp8Stack, Fp8Tensor
from minidcp.kernels.tiles import Tile

X_BLOCK = gl.constexpr(BLOCK)
GROUP = gl.constexpr(64)  # rows that a group of warps multiplies
HALF = gl.constexpr(128)  # weights of a half of a tile: gate and up, or neighbours
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def copy_tiles(
    x, x_scales, weight, weight_scales, experts, choices,
    rows, row_scales, weights, scales, full, empty,
    max_blocks, num_choices, top_k, num_x_rows, num_blocks, dim_out, num_tiles,
    GATED: gl.constexpr, GATHERS: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What the copying warps do: one, if all that it copies is boxes; four, if they gather rows."""
    num_rows = dim_out * 2 if GATED else dim_out
    to_second = dim_out if GATED else HALF
    tile_outs: gl.constexpr = HALF if GATED else 2 * HALF
    weight_bytes: gl.constexpr = 2 * (HALF * K + HALF * 4)
    stage_bytes: gl.constexpr = weight_bytes + 2 * GROUP * K
    if GATHERS:
        lanes: gl.constexpr = K // 16  # of a row: each copies 16 bytes
        layout: gl.constexpr = gl.BlockedLayout([1, 16], [32 // lanes, lanes], [4, 1], [1, 0])
        k = gl.arange(0, K, gl.SliceLayout(0, layout))
        m = gl.arange(0, GROUP, gl.SliceLayout(1, layout))
        m_scale = gl.arange(0, 2 * GROUP, gl.BlockedLayout([1], [32], [4], [0]))

    step = 0
    end = gl.load(experts + max_blocks) * num_tiles
    next_block = gl.program_id(0) // num_tiles
    next_expert = gl.load(experts + next_block)
    next_choice = gl.load(choices + next_block * (2 * GROUP) + GROUP)
    for tile in range(gl.program_id(0), end, gl.num_programs(0)):
        block = next_block
        first_out = tile % num_tiles * tile_outs
        first_scale = next_expert * num_blocks
        has_second_group = next_choice < num_choices
        # What the next tile needs is asked for now.
        next_block = gl.minimum(tile + gl.num_programs(0), end - 1) // num_tiles
        next_expert = gl.load(experts + next_block)
        next_choice = gl.load(choices + next_block * (2 * GROUP) + GROUP)
        if GATHERS:
            first_place = choices + block * (2 * GROUP)
            first_tokens = find_tokens(first_place + m, num_choices, top_k)
            second_tokens = find_tokens(first_place + GROUP + m, num_choices, top_k)
            tokens = find_tokens(first_place + m_scale, num_choices, top_k)

        for i in range(num_blocks):
            stage = step % STAGES
            is_full = full.index(stage)
            hopper.mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
            if GATHERS:
                hopper.mbarrier.expect(is_full, weight_bytes)
            else:
                hopper.mbarrier.expect(is_full, stage_bytes, pred=has_second_group)
                half_bytes: gl.constexpr = stage_bytes - GROUP * K
                hopper.mbarrier.expect(is_full, half_bytes, pred=has_second_group == 0)
            scale_row = first_scale + i
            for half in gl.static_range(2):
                place = 2 * stage + half
                out = first_out + half * to_second
                if not GATHERS:
                    row = (2 * block + half) * GROUP
                    copies_rows = has_second_group | (half == 0)
                    load_box(x, [row, i * K], is_full, rows.index(place), pred=copies_rows)
                load_box(weight, [scale_row * num_rows + out, 0], is_full, weights.index(place))
                load_box(weight_scales, [scale_row, out], is_full, scales.index(place))
            if GATHERS:
                columns = x + i * K + k
                load_rows(columns, first_tokens, num_blocks * K, rows.index(2 * stage))
                if has_second_group:
                    load_rows(columns, second_tokens, num_blocks * K, rows.index(2 * stage + 1))
                token_scales = x_scales + i * K // X_BLOCK * num_x_rows + tokens
                load_pieces(row_scales.index(stage).reshape([2 * GROUP]), token_scales)
                hopper.async_copy.commit_group()
                # Those of the step before are there now. Tensor cores shall see them, too.
                hopper.async_copy.wait_group(1)
                hopper.fence_async_shared()
                hopper.mbarrier.arrive(full.index((step + STAGES - 1) % STAGES), pred=step > 0)
            step += 1
    if GATHERS:
        hopper.async_copy.wait_group(0)
        hopper.fence_async_shared()
        hopper.mbarrier.arrive(full.index((step + STAGES - 1) % STAGES), pred=step > 0)


@gluon.jit
def find_tokens(choices, num_choices, top_k):
    """The tokens of some choices; any token where there is no choice."""
    return gl.minimum(gl.load(choices), num_choices - 1) // top_k


@gluon.jit
def load_rows(columns, tokens, dim_in, rows):
    load_pieces(rows, columns[None, :] + tokens.to(gl.int64)[:, None] * dim_in)


@gluon.jit
def multiply_half(rows, weights, scales, mma: gl.constexpr):
    """rows [GROUP, K] @ weights [HALF, K].T, and the weights' scales."""
    zero = gl.full([GROUP, HALF], 0.0, gl.float32, mma)
    part = hopper.warpgroup_mma(rows, weights.permute((1, 0)), zero, use_acc=False, is_async=True)
    scale = scales.reshape([HALF]).load(gl.SliceLayout(0, mma))
    return hopper.warpgroup_mma_wait(0, [part]), scale


@gluon.jit
def multiply_tiles(
    x_scales, experts, choices, out, out_scales,
    rows, row_scales, weights, scales, full, empty,
    max_blocks, num_choices, num_x_rows, num_blocks, dim_out, num_tiles,
    GROUP_ID: gl.constexpr, GATED: gl.constexpr, GATHERS: gl.constexpr, STORE: gl.constexpr,
    K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What a group of four warps does. STORE is the layout in which it writes its outputs."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    tile_outs: gl.constexpr = HALF if GATED else 2 * HALF
    first_row: gl.constexpr = GROUP_ID * GROUP
    m = first_row + gl.arange(0, GROUP, gl.SliceLayout(1, mma))
    m_store = first_row + gl.arange(0, GROUP, gl.SliceLayout(1, STORE))

    step = 0
    end = gl.load(experts + max_blocks) * num_tiles
    next_place = gl.program_id(0) // num_tiles * (2 * GROUP)
    next_choice = gl.load(choices + next_place + first_row)
    if not GATHERS:
        x_scale = gl.load(x_scales + next_place + m)
    for tile in range(gl.program_id(0), end, gl.num_programs(0)):
        place = next_place
        has_rows = next_choice < num_choices
        first_out = tile % num_tiles * tile_outs
        # What the next tile needs is asked for now.
        next_place = gl.minimum(tile + gl.num_programs(0), end - 1) // num_tiles * (2 * GROUP)
        next_choice = gl.load(choices + next_place + first_row)
        if has_rows:
            out_row = place + m_store if GATED else gl.load(choices + place + m_store)
            acc = gl.full([GROUP, HALF], 0.0, gl.float32, mma)
            other = gl.full([GROUP, HALF], 0.0, gl.float32, mma)
            for i in range(num_blocks):
                if not GATHERS:
                    # The next scales are asked for before the products.
                    scale_row = (i + 1) * K // X_BLOCK
                    is_last = i + 1 == num_blocks
                    following = gl.where(is_last, next_place, scale_row * num_x_rows + place)
                    next_x_scale = gl.load(x_scales + following + m)

                stage = step % STAGES
                hopper.mbarrier.wait(full.index(stage), step // STAGES & 1)
                if GATHERS:
                    both_scales = row_scales.index(stage).reshape([2 * GROUP])
                    own_scales = both_scales.slice(first_row, GROUP)
                    x_scale = own_scales.load(gl.SliceLayout(1, mma))
                own_rows = rows.index(2 * stage + GROUP_ID)
                first = 2 * stage
                part, scale = multiply_half(
                    own_rows, weights.index(first), scales.index(first), mma
                )
                acc += part * x_scale[:, None] * scale[None, :]
                part, scale = multiply_half(
                    own_rows, weights.index(first + 1), scales.index(first + 1), mma
                )
                hopper.mbarrier.arrive(empty.index(stage))
                other += part * x_scale[:, None] * scale[None, :]
                if not GATHERS:
                    x_scale = next_x_scale
                step += 1

            n = first_out + gl.arange(0, HALF, gl.SliceLayout(0, mma))
            n_store = first_out + gl.arange(0, HALF, gl.SliceLayout(0, STORE))
            pointers = out + out_row.to(gl.int64)[:, None] * dim_out + n_store[None, :]
            if GATED:
                acc = gl.where((n < dim_out)[None, :], apply_silu(acc) * other, 0.0)
                scale = gl.maximum(gl.max(gl.abs(acc), 1) / E4M3_MAX, TINY)
                scale_row = tile % num_tiles
                num_out_rows = max_blocks * (2 * GROUP)
                gl.store(out_scales + scale_row * num_out_rows + place + m, scale)
                values = (acc * (1.0 / scale)[:, None]).to(gl.float8e4nv)
                mask = (n_store < dim_out)[None, :]
                gl.store(pointers, gl.convert_layout(values, STORE), mask=mask)
            else:
                is_row = (out_row < num_choices)[:, None]
                values = gl.convert_layout(acc.to(out.dtype.element_ty), STORE)
                gl.store(pointers, values, mask=is_row & (n_store < dim_out)[None, :])
                values = gl.convert_layout(other.to(out.dtype.element_ty), STORE)
                is_inside = (n_store + HALF < dim_out)[None, :]
                gl.store(pointers + HALF, values, mask=is_row & is_inside)
        else:
            if not GATHERS:
                x_scale = gl.load(x_scales + next_place + m)
            # The copying warps wait for this group, too.
            for _ in range(num_blocks):
                stage = step % STAGES
                hopper.mbarrier.wait(full.index(stage), step // STAGES & 1)
                hopper.mbarrier.arrive(empty.index(stage))
                step += 1


@gluon.jit
def apply_silu(x):
    """x / (1 + exp(-x)), by instructions that err by two units in the last place."""
    power = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x * -LOG2E], gl.float32, is_pure=True, pack=1
    )
    inverse = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [1.0 + power], gl.float32, is_pure=True, pack=1
    )
    return x * inverse


@gluon.jit(
    do_not_specialize=[
        "max_blocks", "num_choices", "top_k", "num_x_rows", "num_blocks", "num_tiles",
    ]
)  # fmt: skip
def multiply_fp8_hopper_kernel(
    x, x_scales, weight, weight_scales, experts, choices, out, out_scales,
    max_blocks, num_choices, top_k, num_x_rows, num_blocks, dim_out, num_tiles,
    GATED: gl.constexpr, GATHERS: gl.constexpr, STORE: gl.constexpr,
    K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`multiply_fp8_kernel` for sorted rows, in blocks of 2 · GROUP. Programs take tiles in turn.

    weight and weight_scales are descriptors of the tensor memory accelerator, of all experts'
    blocks below each other. K inputs share a scale of the weight. If GATHERS, x has a row for each
    token. Otherwise x is a descriptor, too, of rows in the order of the blocks.
    """
    # The copies, in STAGES stages: of both groups' rows, of both halves of the weights, and of
    # their scales. A stage is full, then both groups have read it, and it is empty.
    swizzled: gl.constexpr = gl.NVMMASharedLayout(K, element_bitwidth=8, rank=2)
    plain: gl.constexpr = gl.NVMMASharedLayout(0, element_bitwidth=32, rank=2)
    rows = gl.allocate_shared_memory(weight.dtype, [2 * STAGES, GROUP, K], swizzled)
    weights = gl.allocate_shared_memory(weight.dtype, [2 * STAGES, HALF, K], swizzled)
    scales = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, HALF], plain)
    # Of gathered rows. Other scales lie next to each other, so the groups read them themselves.
    row_scales = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2 * GROUP], plain)
    barrier: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(stage), count=2 if GATHERS else 1)
        hopper.mbarrier.init(empty.index(stage), count=2)
    hopper.fence_async_shared()

    first_group: gl.constexpr = 0
    second_group: gl.constexpr = 1
    copying_warps: gl.constexpr = 4 if GATHERS else 1
    registers: gl.constexpr = 232 if GATHERS else 240
    copying_registers: gl.constexpr = 40 if GATHERS else 24
    gl.warp_specialize(
        [
            (multiply_tiles, (
                x_scales, experts, choices, out, out_scales,
                rows, row_scales, weights, scales, full, empty,
                max_blocks, num_choices, num_x_rows, num_blocks, dim_out, num_tiles,
                first_group, GATED, GATHERS, STORE, K, STAGES,
            )),
            (multiply_tiles, (
                x_scales, experts, choices, out, out_scales,
                rows, row_scales, weights, scales, full, empty,
                max_blocks, num_choices, num_x_rows, num_blocks, dim_out, num_tiles,
                second_group, GATED, GATHERS, STORE, K, STAGES,
            )),
            (copy_tiles, (
                x, x_scales, weight, weight_scales, experts, choices,
                rows, row_scales, weights, scales, full, empty,
                max_blocks, num_choices, top_k, num_x_rows, num_blocks, dim_out, num_tiles,
                GATED, GATHERS, K, STAGES,
            )),
        ],
        worker_num_warps=[4, copying_warps], worker_num_regs=[registers, copying_registers],
    )  # fmt: skip


@cache
def make_store_layout(itemsize: int) -> Any:
    """How lanes hold outputs [GROUP, HALF] to write them: four lanes have 64 bytes of a row.

    It differs from the tensor cores' layout only in which lane of a warp has which columns.
    """
    columns = [[0, 1 << bit] for bit in range(HALF.value.bit_length() - 1)]
    rows = [[1 << bit, 0] for bit in range(GROUP.value.bit_length() - 1)]
    of_lane = (16 // itemsize).bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[*columns[:of_lane], rows[3], *columns[of_lane + 2 :]],
        lane_bases=columns[of_lane : of_lane + 2] + rows[:3],
        warp_bases=rows[4:],
        block_bases=[],
        shape=[GROUP.value, HALF.value],
    )


def multiply_on_hopper(
    x: Fp8Tensor,
    weight: Fp8Stack,
    blocks: Blocks,
    tile: Tile,
    out: Tensor,
    out_scales: Tensor | None = None,
) -> None:
    """The contract of `multiply_fp8_blocks`, for sorted blocks and tiles for Hopper."""
    assert blocks.is_sorted and blocks.bm == 2 * GROUP.value
    gated = out_scales is not None
    num_rows = weight.shape[1]
    dim_out = num_rows // 2 if gated else num_rows
    k = weight.block
    assert tile.bn == (HALF.value if gated else 2 * HALF.value)
    num_tiles = triton.cdiv(dim_out, tile.bn)
    num_programs = get_device_properties().multiprocessors

    swizzled: Any = gl.NVMMASharedLayout(k, element_bitwidth=8, rank=2)
    plain: Any = gl.NVMMASharedLayout(0, element_bitwidth=32, rank=2)
    make_boxes = GluonDescriptor.from_tensor
    x_operand: Any = x.values
    if not tile.gathers:
        x_operand = make_boxes(x.values, [GROUP.value, k], swizzled)
    multiply_fp8_hopper_kernel[(min(num_programs, blocks.max_blocks * num_tiles),)](
        x_operand, x.scales,
        make_boxes(weight.values.flatten(0, 2), [HALF.value, k], swizzled),
        make_boxes(weight.scales.flatten(0, 1), [1, HALF.value], plain),
        blocks.experts, blocks.choices, out, out_scales,
        blocks.max_blocks, blocks.num_choices, max(1, blocks.num_choices // len(x)), len(x),
        len(weight.values[0]), dim_out, num_tiles,
        GATED=gated, GATHERS=tile.gathers, STORE=make_store_layout(out.element_size()),
        K=k, STAGES=tile.stages, num_warps=4,
    )  # fmt: skip
