"""The tiles that `experts.py` tries, and the shapes that it tries them for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from minidcp.kernels import get_device_properties
from minidcp.kernels.fp8 import BLOCK
from minidcp.kernels.tiles import MAX_DIRECT_TOKENS, MAX_SPARSE_TOKENS, Tile, name_shape

MAX_SHARED_MEMORY = 220 << 10  # bytes


@dataclass(frozen=True)
class Shape:
    """The experts of one layer.

    Attributes:
        experts: number of experts, with the shared ones.
        top_k: number of experts that a token uses, with the shared ones.
        inter: this rank's share of an expert's intermediate dim.
        fp8: whether the weights are in FP8.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    inter: int
    shared: int = 2
    fp8: bool = False

    @property
    def key(self) -> str:
        """The name of this shape in tiles.json."""
        return name_shape(self.experts, self.hidden, self.inter, self.fp8)


V2_LITE = Shape("V2-Lite", experts=66, top_k=8, hidden=2048, inter=1408)
V2_RANK = Shape("V2, rank of 8", experts=162, top_k=8, hidden=5120, inter=192)
V2_RANK_OF_4 = Shape("V2, rank of 4", experts=162, top_k=8, hidden=5120, inter=384)
R1_RANK = Shape("R1, rank of 8", experts=257, top_k=9, hidden=7168, inter=256, shared=1)
SHAPES = (
    V2_LITE,
    V2_RANK,
    replace(V2_LITE, name="V2-Lite, FP8", fp8=True),
    replace(V2_RANK, name="V2, rank of 8, FP8", fp8=True),
    replace(V2_RANK_OF_4, name="V2, rank of 4, FP8", fp8=True),
    replace(R1_RANK, name="R1, rank of 8, FP8", fp8=True),
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
# In FP8 BK is given. The output of gate|up is quantised 128 values at a time, so its BN is 128.
FP8_VECTOR_TILES = [
    Tile(bn, bk, warps, 1)
    for bn, bk, warps in product((2, 4, 8, 16, 32, 64), (128, 256, 512, 1024, 2048), (4, 8))
    if 4096 <= bn * bk <= 16384 and bn * bk <= 2048 * warps
]
FP8_SMALL_TILES = [
    Tile(bn, BLOCK, warps, stages)
    for bn, warps, stages in product((32, 64, 128), (4, 8), (3, 4, 5, 6))
    if bn == 128 or warps == 4
]
FP8_LARGE_TILES = [
    Tile(bn, BLOCK, warps, stages)
    for bn, warps, stages in product((64, 128, 256), (4, 8), (2, 3, 4))
    if not (bn == 256 and warps == 4)
]


def list_fp8_candidates(tokens: int, tokens_per_expert: float) -> list[tuple[Blocking, Tile]]:
    vector_tiles = [(Blocking(1, False), tile) for tile in FP8_VECTOR_TILES]
    if tokens <= MAX_DIRECT_TOKENS:
        return vector_tiles
    if tokens_per_expert > 60:
        blockings = [Blocking(bm, True) for bm in (64, 128, 256)]
        return list(product(blockings, FP8_LARGE_TILES))

    blockings = [Blocking(16, False)]
    if tokens_per_expert >= 3:
        blockings.append(Blocking(32, False))
    if tokens_per_expert >= 10:
        blockings += [Blocking(64, False), Blocking(64, True)]
    small_tiles = list(product(blockings, FP8_SMALL_TILES))
    return [*vector_tiles, *small_tiles] if tokens <= MAX_SPARSE_TOKENS else small_tiles


def list_candidates(shape: Shape, tokens: int) -> list[tuple[Blocking, Tile]]:
    """The blockings and tiles that are worth a try for this number of tokens."""
    tokens_per_expert = tokens * shape.top_k / shape.experts
    if shape.fp8:
        return list_fp8_candidates(tokens, tokens_per_expert)
    if tokens <= MAX_DIRECT_TOKENS:
        candidates = [(Blocking(1, False), tile) for tile in VECTOR_TILES]
        candidates.append((Blocking(16, False), Tile(64, 128, 4, 4)))
        candidates.append((Blocking(16, False), Tile(64, 256, 4, 3)))
        return candidates

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


def fits(shape: Shape, blocking: Blocking, tile: Tile, gated: bool) -> bool:
    """Whether a product can have this tile: the output of a gated one is quantised in blocks, and
    the stages must fit into shared memory, which only tensor cores use."""
    if blocking.bm == 1:
        return True
    if shape.fp8 and gated and tile.bn != BLOCK:
        return False
    rows_per_stage = blocking.bm + tile.bn * (2 if gated else 1)
    itemsize = 1 if shape.fp8 else 2
    return tile.stages * tile.bk * rows_per_stage * itemsize <= MAX_SHARED_MEMORY
