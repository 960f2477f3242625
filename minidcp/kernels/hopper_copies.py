"""What the copying warps of `grouped_hopper.py` do (read that first): they bring rows, weights and
scales into shared memory, ahead of the warps that multiply."""

from minidcp.kernels.compiler import gl, gluon, hopper, load_box, load_pieces
from minidcp.kernels.fp8 import BLOCK

X_BLOCK = gl.constexpr(BLOCK)
GROUP = gl.constexpr(64)  # rows that a group of warps multiplies
HALF = gl.constexpr(128)  # weights of a half of a tile: gate and up, or neighbours


@gluon.jit
def copy_tiles(
    x, x_scales, weight, weight_scales, experts, choices,
    rows, row_scales, weights, scales, full, empty,
    max_blocks, num_choices, top_k, num_x_rows, num_blocks, dim_out, num_tiles,
    GATED: gl.constexpr, GATHERS: gl.constexpr, SCALED: gl.constexpr,
    K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What the copying warps do: one, if all that it copies is boxes; four, if they gather rows."""
    num_rows = dim_out * 2 if GATED else dim_out
    to_second = dim_out if GATED else HALF
    tile_outs: gl.constexpr = HALF if GATED else 2 * HALF
    itemsize: gl.constexpr = weight.dtype.primitive_bitwidth // 8
    group_bytes: gl.constexpr = GROUP * K * itemsize
    weight_bytes: gl.constexpr = 2 * HALF * (K * itemsize + (4 if SCALED else 0))
    if GATHERS:
        items: gl.constexpr = 16 // itemsize  # that a lane copies of a row
        lanes: gl.constexpr = K // items
        layout: gl.constexpr = gl.BlockedLayout([1, items], [32 // lanes, lanes], [4, 1], [1, 0])
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
        expert = next_expert
        first_out = tile % num_tiles * tile_outs
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
                one_group: gl.constexpr = weight_bytes + group_bytes
                hopper.mbarrier.expect(is_full, one_group, pred=has_second_group == 0)
                hopper.mbarrier.expect(is_full, one_group + group_bytes, pred=has_second_group)
            for half in gl.static_range(2):
                place = 2 * stage + half
                out = first_out + half * to_second
                if not GATHERS:
                    row = (2 * block + half) * GROUP
                    copies_rows = has_second_group | (half == 0)
                    load_box(x, [row, i * K], is_full, rows.index(place), pred=copies_rows)
                if SCALED:
                    scale_row = expert * num_blocks + i
                    row = scale_row * num_rows + out
                    load_box(weight, [row, 0], is_full, weights.index(place))
                    load_box(weight_scales, [scale_row, out], is_full, scales.index(place))
                else:
                    row = expert * num_rows + out
                    load_box(weight, [row, i * K], is_full, weights.index(place))
            if GATHERS:
                columns = x + i * K + k
                load_rows(columns, first_tokens, num_blocks * K, rows.index(2 * stage))
                if has_second_group:
                    load_rows(columns, second_tokens, num_blocks * K, rows.index(2 * stage + 1))
                if SCALED:
                    token_scales = x_scales + i * K // X_BLOCK * num_x_rows + tokens
                    load_pieces(row_scales.index(stage).reshape([2 * GROUP]), token_scales)
                hopper.async_copy.commit_group()
                hand_over_rows(1, full, step, STAGES)
            step += 1
    if GATHERS:
        hand_over_rows(0, full, step, STAGES)


@gluon.jit
def hand_over_rows(num_later: gl.constexpr, full, step, STAGES: gl.constexpr):
    """Those of the step before, of which `num_later` steps' copies were asked for since. When they
    are there, tensor cores shall see them, too."""
    hopper.async_copy.wait_group(num_later)
    hopper.fence_async_shared()
    hopper.mbarrier.arrive(full.index((step + STAGES - 1) % STAGES), pred=step > 0)


@gluon.jit
def find_tokens(choices, num_choices, top_k):
    """The tokens of some choices; any token where there is no choice."""
    return gl.minimum(gl.load(choices), num_choices - 1) // top_k


@gluon.jit
def load_rows(columns, tokens, dim_in, rows):
    load_pieces(rows, columns[None, :] + tokens.to(gl.int64)[:, None] * dim_in)
