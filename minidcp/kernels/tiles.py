"""How the experts' products are cut into tiles, by shape and number of tokens. The numbers are in
tiles.json, which `benchmarks/experts.py` finds on a GPU; for other shapes there is a rule."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent / "tiles.json"
MAX_DIRECT_TOKENS = 2  # up to this many tokens every choice is a block of its own; see `align.py`
ANY_NUMBER_OF_TOKENS = 1 << 20


class Tile(NamedTuple):
    """What one program computes of a product: `bn` outputs, `bk` inputs (of bf16) at a time."""

    bn: int
    bk: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of both products, for blocks of up to `bm` choices of one expert. With `sort`, the
    rows of x are first copied into the order of the blocks."""

    bm: int
    sort: bool
    gate_up: Tile
    down: Tile


@cache
def list_tiles(num_experts: int, top_k: int, hidden: int, inter: int) -> dict[int, Tiles]:
    """The tiles to use up to each number of tokens, in rising order.

    Args:
        num_experts: shared ones included, like top_k.
        inter: the intermediate dim of an expert, or this rank's share of it.
    """
    table = json.loads(TABLE.read_text())
    rows = table.get(f"{num_experts}x{hidden}x{inter}")
    if rows is None:
        return make_tiles_by_rule(num_experts / top_k)

    tiles_up_to = {}
    for max_tokens, (bm, sort, gate_up, down) in rows.items():
        tiles_up_to[int(max_tokens)] = Tiles(bm, sort, Tile(*gate_up), Tile(*down))
    return tiles_up_to


def make_tiles_by_rule(experts_per_choice: float) -> dict[int, Tiles]:
    """The tokens that an expert gets on average fill one block, so its weights are read once.

    There are `experts_per_choice` times as many tokens as an expert gets on average.
    """
    vector = Tile(16, 512, 4, 1)
    small = Tile(64, 128, 4, 4)
    large = Tile(128, 64, 8, 3)
    return {
        MAX_DIRECT_TOKENS: Tiles(1, False, vector, vector),
        int(12 * experts_per_choice): Tiles(16, False, small, small),
        int(24 * experts_per_choice): Tiles(32, False, small, small),
        int(64 * experts_per_choice): Tiles(64, False, small, small),
        ANY_NUMBER_OF_TOKENS: Tiles(128, True, large, large),
    }


def choose_tiles(tokens: int, num_experts: int, top_k: int, hidden: int, inter: int) -> Tiles:
    """The first tiles of the list that are for this many tokens, or else the last ones."""
    tiles_up_to = list_tiles(num_experts, top_k, hidden, inter)
    for max_tokens, tiles in tiles_up_to.items():
        if tokens <= max_tokens:
            return tiles
    return list(tiles_up_to.values())[-1]
