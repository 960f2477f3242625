"""The experts' products of prompts on Hopper GPUs, in Gluon (read `grouped.py` and `grouped_fp8.py`
first). With Triton's tiles prompts are bound by the L2 cache. A tile of 128 rows by 256 weights
needs half as many bytes for a product. Some warps only copy (`hopper_copies.py`), ahead of two
groups of four warps, which multiply 64 rows each. In FP8 they add up behind the tensor cores."""

from functools import cache
from typing import Any

from torch import Tensor

from minidcp.kernels import get_device_properties
from minidcp.kernels.align import Blocks
from minidcp.kernels.compiler import GluonDescriptor, gl, gluon, hopper, triton
from minidcp.kernels.fp8 import E4M3_MAX, TINY, Fp8Stack, Fp8Tensor
from minidcp.kernels.hopper_copies import GROUP, HALF, X_BLOCK, copy_tiles
from minidcp.kernels.tiles import Tile

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def multiply_half(rows, weights, scales, mma: gl.constexpr):
    """rows [GROUP, K] @ weights [HALF, K].T, and the weights' scales."""
    zero = gl.full([GROUP, HALF], 0.0, gl.float32, mma)
    part = hopper.warpgroup_mma(rows, weights.permute((1, 0)), zero, use_acc=False, is_async=True)
    scale = scales.reshape([HALF]).load(gl.SliceLayout(0, mma))
    return hopper.warpgroup_mma_wait(0, [part]), scale


@gluon.jit
def add_products(
    rows, weights, full, empty, step, num_blocks,
    GROUP_ID: gl.constexpr, STAGES: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """A group's rows @ both halves of the weights. Tensor cores always have a step to do next."""
    acc = gl.full([GROUP, HALF], 0.0, gl.float32, mma)
    other = gl.full([GROUP, HALF], 0.0, gl.float32, mma)
    for i in range(num_blocks):
        stage = step % STAGES
        hopper.mbarrier.wait(full.index(stage), step // STAGES & 1)
        own_rows = rows.index(2 * stage + GROUP_ID)
        first = weights.index(2 * stage).permute((1, 0))
        second = weights.index(2 * stage + 1).permute((1, 0))
        acc = hopper.warpgroup_mma(own_rows, first, acc, is_async=True)
        other = hopper.warpgroup_mma(own_rows, second, other, is_async=True)
        # The products of the step before are done.
        acc, other = hopper.warpgroup_mma_wait(2, [acc, other])
        hopper.mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=i > 0)
        step += 1
    acc, other = hopper.warpgroup_mma_wait(0, [acc, other])
    hopper.mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    return acc, other, step


@gluon.jit
def multiply_tiles(
    x_scales, experts, choices, out, out_scales,
    rows, row_scales, weights, scales, full, empty,
    max_blocks, num_choices, num_x_rows, num_blocks, dim_out, num_tiles,
    GROUP_ID: gl.constexpr, GATED: gl.constexpr, GATHERS: gl.constexpr, SCALED: gl.constexpr,
    STORE: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What a group of four warps does. STORE is the layout in which it writes its outputs."""
    # The last number is how many inputs an instruction has.
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32 if SCALED else 16])
    tile_outs: gl.constexpr = HALF if GATED else 2 * HALF
    first_row: gl.constexpr = GROUP_ID * GROUP
    m = first_row + gl.arange(0, GROUP, gl.SliceLayout(1, mma))
    m_store = first_row + gl.arange(0, GROUP, gl.SliceLayout(1, STORE))

    step = 0
    end = gl.load(experts + max_blocks) * num_tiles
    next_place = gl.program_id(0) // num_tiles * (2 * GROUP)
    next_choice = gl.load(choices + next_place + first_row)
    if SCALED and not GATHERS:
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
            if SCALED:
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
            else:
                acc, other, step = add_products(
                    rows, weights, full, empty, step, num_blocks, GROUP_ID, STAGES, mma
                )

            n_store = first_out + gl.arange(0, HALF, gl.SliceLayout(0, STORE))
            pointers = out + out_row.to(gl.int64)[:, None] * dim_out + n_store[None, :]
            is_inside = (n_store < dim_out)[None, :]
            if GATED:
                if SCALED:
                    n = first_out + gl.arange(0, HALF, gl.SliceLayout(0, mma))
                    acc = gl.where((n < dim_out)[None, :], apply_silu(acc) * other, 0.0)
                    scale = gl.maximum(gl.max(gl.abs(acc), 1) / E4M3_MAX, TINY)
                    scale_row = tile % num_tiles
                    num_out_rows = max_blocks * (2 * GROUP)
                    gl.store(out_scales + scale_row * num_out_rows + place + m, scale)
                    acc = acc * (1.0 / scale)[:, None]
                else:
                    # Rounded where the torch definition rounds.
                    gate = apply_silu(round_to(acc, out.dtype.element_ty))
                    up = round_to(other, out.dtype.element_ty)
                    acc = round_to(gate, out.dtype.element_ty) * up
                values = gl.convert_layout(acc.to(out.dtype.element_ty), STORE)
                gl.store(pointers, values, mask=is_inside)
            else:
                is_row = (out_row < num_choices)[:, None]
                values = gl.convert_layout(acc.to(out.dtype.element_ty), STORE)
                gl.store(pointers, values, mask=is_row & is_inside)
                values = gl.convert_layout(other.to(out.dtype.element_ty), STORE)
                is_inside = (n_store + HALF < dim_out)[None, :]
                gl.store(pointers + HALF, values, mask=is_row & is_inside)
        else:
            if SCALED and not GATHERS:
                x_scale = gl.load(x_scales + next_place + m)
            # The copying warps wait for this group, too.
            for _ in range(num_blocks):
                stage = step % STAGES
                hopper.mbarrier.wait(full.index(stage), step // STAGES & 1)
                hopper.mbarrier.arrive(empty.index(stage))
                step += 1


@gluon.jit
def round_to(x, dtype: gl.constexpr):
    return x.to(dtype).to(gl.float32)


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
def multiply_hopper_kernel(
    x, x_scales, weight, weight_scales, experts, choices, out, out_scales,
    max_blocks, num_choices, top_k, num_x_rows, num_blocks, dim_out, num_tiles,
    GATED: gl.constexpr, GATHERS: gl.constexpr, STORE: gl.constexpr,
    K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`multiply_sorted_kernel` or, if there are scales, `multiply_fp8_kernel` for sorted rows: in
    blocks of 2 · GROUP, K inputs at a time. Programs take tiles in turn.

    weight and weight_scales are descriptors of the tensor memory accelerator, of all experts' rows
    or blocks below each other. In FP8, K inputs share a scale of the weight. If GATHERS, x has a
    row for each token. Otherwise x is a descriptor, too, of rows in the order of the blocks.
    """
    # The copies, in STAGES stages: of both groups' rows, of both halves of the weights, and of
    # their scales. A stage is full, then both groups have read it, and it is empty.
    has_scales: gl.constexpr = weight_scales is not None
    bits: gl.constexpr = weight.dtype.primitive_bitwidth
    swizzled: gl.constexpr = gl.NVMMASharedLayout(K * bits // 8, element_bitwidth=bits, rank=2)
    rows = gl.allocate_shared_memory(weight.dtype, [2 * STAGES, GROUP, K], swizzled)
    weights = gl.allocate_shared_memory(weight.dtype, [2 * STAGES, HALF, K], swizzled)
    if has_scales:
        plain: gl.constexpr = gl.NVMMASharedLayout(0, element_bitwidth=32, rank=2)
        scales = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, HALF], plain)
        # Of gathered rows. Other scales lie next to each other: the groups read them themselves.
        row_scales = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2 * GROUP], plain)
    else:
        scales: gl.constexpr = None  # type: ignore[no-redef]
        row_scales: gl.constexpr = None  # type: ignore[no-redef]
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
                first_group, GATED, GATHERS, has_scales, STORE, K, STAGES,
            )),
            (multiply_tiles, (
                x_scales, experts, choices, out, out_scales,
                rows, row_scales, weights, scales, full, empty,
                max_blocks, num_choices, num_x_rows, num_blocks, dim_out, num_tiles,
                second_group, GATED, GATHERS, has_scales, STORE, K, STAGES,
            )),
            (copy_tiles, (
                x, x_scales, weight, weight_scales, experts, choices,
                rows, row_scales, weights, scales, full, empty,
                max_blocks, num_choices, top_k, num_x_rows, num_blocks, dim_out, num_tiles,
                GATED, GATHERS, has_scales, K, STAGES,
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
    x: Tensor | Fp8Tensor,
    weight: Tensor | Fp8Stack,
    blocks: Blocks,
    tile: Tile,
    gated: bool,
    out: Tensor,
    out_scales: Tensor | None = None,
) -> None:
    """The contracts of `multiply_blocks` and `multiply_fp8_blocks`, for sorted blocks and tiles for
    Hopper. The result is written to `out`."""
    assert blocks.is_sorted and blocks.bm == 2 * GROUP.value
    assert tile.bn == (HALF.value if gated else 2 * HALF.value)
    _, num_rows, dim_in = weight.shape
    dim_out = num_rows // 2 if gated else num_rows
    num_tiles = triton.cdiv(dim_out, tile.bn)
    num_programs = get_device_properties().multiprocessors
    top_k = max(1, blocks.num_choices // len(x))

    make_boxes = GluonDescriptor.from_tensor
    x_values, x_scales, weight_scales = x, None, None
    if isinstance(weight, Fp8Stack):
        assert isinstance(x, Fp8Tensor)
        k = weight.block
        plain: Any = gl.NVMMASharedLayout(0, element_bitwidth=32, rank=2)
        weight_rows = weight.values.flatten(0, 2)
        weight_scales = make_boxes(weight.scales.flatten(0, 1), [1, HALF.value], plain)
        x_values, x_scales = x.values, x.scales
    else:
        k = tile.bk
        weight_rows = weight.flatten(0, 1)
    bits = 8 * weight_rows.element_size()
    swizzled: Any = gl.NVMMASharedLayout(k * bits // 8, element_bitwidth=bits, rank=2)
    x_operand: Any = x_values
    if not tile.gathers:
        x_operand = make_boxes(x_values, [GROUP.value, k], swizzled)
    multiply_hopper_kernel[(min(num_programs, blocks.max_blocks * num_tiles),)](
        x_operand, x_scales,
        make_boxes(weight_rows, [HALF.value, k], swizzled), weight_scales,
        blocks.experts, blocks.choices, out, out_scales,
        blocks.max_blocks, blocks.num_choices, top_k, len(x), triton.cdiv(dim_in, k),
        dim_out, num_tiles,
        GATED=gated, GATHERS=tile.gathers, STORE=make_store_layout(out.element_size()),
        K=k, STAGES=tile.stages, num_warps=4,
    )  # fmt: skip
