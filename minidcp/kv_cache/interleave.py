"""Which rank holds token p, and where: the only place where this arithmetic stands. Token p of a request lives on DCP
rank p % N. A block covers block_size × N consecutive tokens and has the same id on every rank, so there is one block
table. Functions take an int or an integer array. Read `block_manager.py` next."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = TypeVar("Ints", int, NDArray[np.int64])


@dataclass(frozen=True)
class Interleave:
    """The layout of `size` ranks' shards with `block_size` local slots per block.

    size 4, block_size 2:   block      |     0     |     1
                            rank 0     |  0     4  |  8    12
                            rank 1     |  1     5  |  9    13
                            rank 2     |  2     6  | 10    14
                            rank 3     |  3     7  | 11    15"""

    size: int
    block_size: int

    @property
    def tokens_per_block(self) -> int:
        return self.size * self.block_size

    def owner_of(self, pos: Ints) -> Ints:
        """The rank that stores token `pos`."""
        return pos % self.size

    def local_slot(self, pos: Ints) -> Ints:
        """The index of token `pos` within its owner's shard; block `local_slot // block_size`."""
        return pos // self.size

    def local_len(self, seq_len: Ints, rank: int) -> Ints:
        """How many of the tokens [0, seq_len) rank `rank` stores."""
        return (seq_len + self.size - 1 - rank) // self.size

    def cache_slot(self, block_id: Ints, local_slot: Ints) -> Ints:
        """The row of a rank's flat cache for `local_slot`, whose block got the id `block_id`."""
        return block_id * self.block_size + local_slot % self.block_size

    def num_blocks(self, seq_len: int) -> int:
        """How many blocks hold the tokens [0, seq_len)."""
        return -(-seq_len // self.tokens_per_block)
