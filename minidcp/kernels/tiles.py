"""How the experts' products are cut into tiles, by shape and number of tokens. The numbers are in
tiles.json, which `benchmarks/experts.py` finds on a GPU; for other shapes there is a rule."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from minidcp.kernels import get_device_properties
from minidcp.kernels.fp8 import BLOCK

TABLE = Path(__file__).parent / "tiles.json"
# Up to this many tokens every choice is a block of its own; see `align.py`.
MAX_DIRECT_TOKENS = 2
MAX_SPARSE_TOKENS = 4  # the same for narrow experts that two tokens hardly ever choose both
ANY_NUMBER_OF_TOKENS = 1 << 20
# Rows that an expert gets on average, from which on tiles for Hopper are used.
MIN_HOPPER_ROWS = 35
# In FP8 the kernel for Hopper gathers rows itself if an expert has up to so many tiles of weights,
# for each tile anew. In bf16 it always does: that is faster, but for V2 at tp=2 and many tokens.
MAX_GATHERING_TILES = 3


class Tile(NamedTuple):
    """What one program computes of a product: `bn` outputs, `bk` inputs at a time.

    Inputs are in bf16 or FP8; half as many where they are in float32. On tensor cores those in FP8
    come as many at a time as share a scale, which is `bk` where a weight's rows allow it. Tiles for
    Hopper are those of `grouped_hopper.py`. With `gathers`, that kernel finds the rows of x
    where the tokens have them.
    """

    bn: int
    bk: int
    warps: int
    stages: int
    is_for_hopper: bool = False
    gathers: bool = False


class Tiles(NamedTuple):
    """The tiles of both products, for blocks of up to `bm` choices of one expert. With `sort`, the
    rows between the products are in the order of the blocks. The rows of x are first copied into
    that order, unless gate_up gathers them."""

    bm: int
    sort: bool
    gate_up: Tile
    down: Tile


@cache
def list_tiles(
    num_experts: int, top_k: int, hidden: int, inter: int, itemsize: int = 2
) -> dict[int, Tiles]:
    """The tiles to use up to each number of tokens, in rising order.

    Args:
        num_experts: shared ones included, like top_k.
        inter: the intermediate dim of an expert, or this rank's share of it.
        itemsize: bytes of a weight. One byte is FP8.
    """
    fp8 = itemsize == 1
    table = json.loads(TABLE.read_text())
    rows = table.get(name_shape(num_experts, hidden, inter, fp8))
    tiles_up_to = {}
    if rows is None:
        tiles_up_to = make_tiles_by_rule(num_experts / top_k, inter, fp8)
    else:
        for max_tokens, (bm, sort, gate_up, down) in rows.items():
            tiles_up_to[int(max_tokens)] = Tiles(bm, sort, Tile(*gate_up), Tile(*down))

    if has_hopper_kernel(hidden, inter, itemsize):
        most_tokens = int(MIN_HOPPER_ROWS * num_experts / top_k)
        limits = [limit for limit in tiles_up_to if limit < most_tokens]
        result = {limit: tiles_up_to[limit] for limit in limits}
        result[most_tokens] = choose_by_limit(tiles_up_to, most_tokens)
        result[ANY_NUMBER_OF_TOKENS] = make_hopper_tiles(hidden, inter, itemsize)
        return result
    return tiles_up_to


def has_hopper_kernel(hidden: int, inter: int, itemsize: int) -> bool:
    """Whether `grouped_hopper.py` has these products: on Hopper, but not in float32.

    Its boxes begin at multiples of 16 bytes, so rows of weights do.
    """
    is_even = hidden * itemsize % 16 == 0 and inter * itemsize % 16 == 0
    return get_device_properties().capability == (9, 0) and itemsize <= 2 and is_even


def make_hopper_tiles(hidden: int, inter: int, itemsize: int) -> Tiles:
    """What prompts use on Hopper: as much as registers and shared memory hold."""
    bk = BLOCK // itemsize
    num_tiles = -(-inter // 128)
    gathers = num_tiles <= MAX_GATHERING_TILES if itemsize == 1 else hidden % bk == 0
    gate_up = Tile(128, bk, 8, 4, is_for_hopper=True, gathers=gathers)
    down = Tile(256, bk, 8, 4, is_for_hopper=True)
    return Tiles(128, True, gate_up, down)


def name_shape(num_experts: int, hidden: int, inter: int, fp8: bool) -> str:
    """The name of a shape in tiles.json."""
    return f"{num_experts}x{hidden}x{inter}" + (" fp8" if fp8 else "")


def make_tiles_by_rule(experts_per_choice: float, inter: int, fp8: bool) -> dict[int, Tiles]:
    """The tokens that an expert gets on average fill one block, so its weights are read once.

    There are `experts_per_choice` times as many tokens as an expert gets on average.
    """
    vector = Tile(16, 512, 4, 1)
    direct = {MAX_DIRECT_TOKENS: Tiles(1, False, vector, vector)}
    small = Tile(64, 128, 4, 4)
    medium = small
    large = Tile(128, 64, 8, 3)
    largest_bm = 128
    if fp8:
        # A program quantises the outputs of gate_up, so it has a whole block of them.
        direct = make_vector_tiles(experts_per_choice, inter)
        small = Tile(BLOCK, BLOCK, 4, 4)
        large = Tile(BLOCK, BLOCK, 8, 3)
        medium = large
        largest_bm = 64
    return {
        **direct,
        int(12 * experts_per_choice): Tiles(16, False, small, small),
        int(24 * experts_per_choice): Tiles(32, False, small, small),
        int(64 * experts_per_choice): Tiles(64, False, medium, medium),
        ANY_NUMBER_OF_TOKENS: Tiles(largest_bm, True, large, large),
    }


def make_vector_tiles(experts_per_choice: float, inter: int) -> dict[int, Tiles]:
    """Those of `vector_fp8.py`."""
    if not has_vector_kernel():
        return {}
    gate_up = Tile(16, 512, 4, 1) if inter > 512 else Tile(4, 1024, 4, 1)
    down = Tile(32, 256, 4, 1) if inter > 1024 else Tile(64, 128, 4, 1)
    is_sparse = experts_per_choice >= 16 and inter <= 2 * BLOCK
    most_tokens = MAX_SPARSE_TOKENS if is_sparse else MAX_DIRECT_TOKENS
    return {most_tokens: Tiles(1, False, gate_up, down)}


def has_vector_kernel() -> bool:
    """Whether there is a GPU that knows FP8. The kernel is in Gluon, which has no interpreter."""
    return get_device_properties().capability >= (8, 9)


def choose_tiles(
    tokens: int, num_experts: int, top_k: int, hidden: int, inter: int, itemsize: int = 2
) -> Tiles:
    """The first tiles of the list that are for this many tokens, or else the last ones."""
    return choose_by_limit(list_tiles(num_experts, top_k, hidden, inter, itemsize), tokens)


def choose_by_limit(tiles_up_to: dict[int, Tiles], tokens: int) -> Tiles:
    for max_tokens, tiles in tiles_up_to.items():
        if tokens <= max_tokens:
            return tiles
    return list(tiles_up_to.values())[-1]


def choose_dense_tile(tokens: int, dim_in: int) -> tuple[int, Tile]:
    """`bm` and the tile of a dense product in FP8 that cuBLAS does not have."""
    if tokens <= MAX_DIRECT_TOKENS and has_vector_kernel():
        # Registers for all inputs of a row are left only for one token.
        return 1, Tile(8 if tokens == 1 and dim_in <= 2048 else 4, 2048, 4, 1)
    if tokens <= 32:
        return 16, Tile(64, BLOCK, 4, 6)
    if tokens <= 128:
        return 32, Tile(64, BLOCK, 4, 6)
    return 64, Tile(128, BLOCK, 4, 4)
