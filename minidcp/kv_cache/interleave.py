"""Which rank of a DCP group stores token p of a request, and where. All of this arithmetic is here.
The functions take an int, or an integer array or tensor. Next: `block_manager.py`."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ints = TypeVar("Ints", int, NDArray[np.int64], Tensor)


@dataclass(frozen=True)
class Interleave:
    """Token p of a request lives on rank p % size of its DCP group.

    A block covers block_size * size consecutive tokens. It has block_size slots on every rank and
    the same id everywhere, so one block table serves all ranks. With size 4 and block_size 2:

        block   |    0    |    1
        rank 0  |  0   4  |  8  12
        rank 1  |  1   5  |  9  13
        rank 2  |  2   6  | 10  14
        rank 3  |  3   7  | 11  15
    """

    size: int  # ranks of the group
    block_size: int  # tokens per block and rank

    @property
    def tokens_per_block(self) -> int:
        return self.size * self.block_size

    def owner_of(self, pos: Ints) -> Ints:
        """The rank that stores token `pos`."""
        return pos % self.size

    def local_slot(self, pos: Ints) -> Ints:
        """The index of token `pos` among the tokens of the request that its owner stores."""
        return pos // self.size

    def local_len(self, seq_len: Ints, rank: int) -> Ints:
        """How many of the tokens [0, seq_len) rank `rank` stores."""
        return (seq_len + self.size - 1 - rank) // self.size

    def cache_row(self, block_id: Ints, local_slot: Ints) -> Ints:
        """The row of a rank's flat cache that `local_slot` has in the block `block_id`.

        The block is entry local_slot // block_size of the request's block table.
        """
        return block_id * self.block_size + local_slot % self.block_size

    def num_blocks(self, seq_len: int) -> int:
        """How many blocks the tokens [0, seq_len) take."""
        return -(-seq_len // self.tokens_per_block)
