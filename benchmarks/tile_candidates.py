"""The tiles that `experts.py` tries, and the shapes that it tries them for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from minidcp.kernels import get_device_properties
from minidcp.kernels.tiles import MAX_DIRECT_TOKENS, Tile

MAX_SHARED_MEMORY = 220 << 10  # bytes


@dataclass(frozen=True)
class Shape:
    """The experts of one layer.

    Attributes:
        experts: number of experts, with the shared ones.
        top_k: number of experts that a token uses, with the shared ones.
        inter: this rank's share of an expert's intermediate dim.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    inter: int
    shared: int = 2

    @property
    def key(self) -> str:
        """The name of this shape in tiles.json."""
        return f"{self.experts}x{self.hidden}x{self.inter}"


SHAPES = (
    Shape("V2-Lite", experts=66, top_k=8, hidden=2048, inter=1408),
    Shape("V2, rank of 8", experts=162, top_k=8, hidden=5120, inter=192),
)


class Blocking(NamedTuple):
    """How choices are put into blocks, see `align`."""

    bm: int
    sort: bool


# Candidates for tiles: bn, bk, warps, stages. On CUDA cores, for a few tokens:
VECTOR_TILES = [
    Tile(4, 1024, 4, 1),
    Tile(4, 512, 4, 1),
    Tile(2, 1024, 4, 1),
    Tile(4, 2048, 8, 1),
    Tile(2, 2048, 4, 1),
    Tile(8, 1024, 4, 1),
    Tile(8, 512, 4, 1),
    Tile(16, 256, 4, 1),
]
# On tensor cores, where an expert has few tokens, and where it has many:
SMALL_TILES = [
    Tile(64, 64, 4, 4),
    Tile(64, 64, 4, 6),
    Tile(64, 128, 4, 3),
    Tile(64, 128, 4, 4),
    Tile(64, 256, 4, 3),
    Tile(128, 64, 4, 4),
    Tile(128, 64, 8, 4),
    Tile(128, 64, 8, 5),
    Tile(128, 128, 8, 3),
    Tile(256, 64, 8, 3),
]
LARGE_TILES = [
    Tile(128, 64, 8, 3),
    Tile(128, 64, 8, 4),
    Tile(128, 64, 4, 3),
    Tile(64, 64, 4, 4),
    Tile(64, 64, 8, 4),
    Tile(256, 64, 8, 3),
    Tile(256, 64, 8, 4),
    Tile(128, 128, 8, 2),
]


def list_candidates(shape: Shape, tokens: int) -> list[tuple[Blocking, Tile]]:
    """The blockings and tiles that are worth a try for this number of tokens."""
    if tokens <= MAX_DIRECT_TOKENS:
        candidates = [(Blocking(1, False), tile) for tile in VECTOR_TILES]
        candidates.append((Blocking(16, False), Tile(64, 128, 4, 4)))
        candidates.append((Blocking(16, False), Tile(64, 256, 4, 3)))
        return candidates

    tokens_per_expert = tokens * shape.top_k / shape.experts
    if tokens_per_expert > 60:
        blockings = [Blocking(64, False), Blocking(128, False)]
        if get_device_properties().capability >= (9, 0):
            blockings.append(Blocking(128, True))
        return list(product(blockings, LARGE_TILES))

    blockings = [Blocking(16, False)]
    if tokens_per_expert >= 3:
        blockings.append(Blocking(32, False))
    if tokens_per_expert >= 10:
        blockings.append(Blocking(64, False))
    return list(product(blockings, SMALL_TILES))


def fits(blocking: Blocking, tile: Tile, gated: bool) -> bool:
    """Whether the stages fit into shared memory. Only tensor cores use it."""
    if blocking.bm == 1:
        return True
    rows_per_stage = blocking.bm + tile.bn * (2 if gated else 1)
    return tile.stages * tile.bk * rows_per_stage * 2 <= MAX_SHARED_MEMORY
