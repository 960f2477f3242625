"""Blocks as integers: who uses which, and which can be reused for a prompt with the same beginning. A block is free
(nobody uses it), live (requests use it) or cached (nobody uses it, but its content is known by a hash and kept until
the room is needed). Ranks and tensors do not appear here."""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import takewhile


class BlockManager:
    """Reference-counted blocks with a prefix cache: `free + cached + live == total` at any time. A block's hash chains
    its parent's: equal hashes mean equal tokens from the beginning on. The least recently used are evicted first."""

    def __init__(self, num_blocks: int, tokens_per_block: int, prefix_cache: bool = True) -> None:
        self.num_blocks, self.tokens_per_block, self.prefix_cache = num_blocks, tokens_per_block, prefix_cache
        self.free: deque[int] = deque(range(num_blocks))
        self.live: dict[int, int] = {}  # with how many requests use it
        self.cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.hash_of: dict[int, bytes] = {}
        self.block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: the free and the cached ones."""
        return len(self.free) + len(self.cached)

    def allocate(self, count: int, spare: int = 0) -> list[int] | None:
        """`count` blocks with one reference each, or None (and no change) if there are too few, `spare` left over."""
        if count + spare > self.num_available:
            return None
        while len(self.free) < count:
            block, _ = self.cached.popitem(last=False)
            del self.block_of[self.hash_of.pop(block)]
            self.free.append(block)
        blocks = [self.free.popleft() for _ in range(count)]
        self.live |= dict.fromkeys(blocks, 1)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block; an unused one is cached if its content is known."""
        # The end of a sequence is worth less than its beginning: it becomes the older entry.
        for block in reversed(blocks):
            self.live[block] -= 1
            if self.live[block] == 0:
                del self.live[block]
                if block in self.hash_of:
                    self.cached[block] = None
                else:
                    self.free.append(block)

    def hash_blocks(self, tokens: Sequence[int], hashes: list[bytes], num_tokens: int) -> None:
        """Extend `hashes` to cover every full block of `tokens[:num_tokens]`."""
        size = self.tokens_per_block
        for index in range(len(hashes), num_tokens // size):
            parent = hashes[-1] if hashes else b""
            content = array("q", tokens[index * size : (index + 1) * size]).tobytes()
            hashes.append(hashlib.blake2b(parent + content, digest_size=16).digest())

    def share(self, hashes: Sequence[bytes]) -> list[int]:
        """The longest run of known blocks for these hashes from the beginning, with one more reference to each."""
        blocks = [self.block_of[digest] for digest in takewhile(self.block_of.__contains__, hashes)]
        for block in blocks:
            self.live[block] = self.live.get(block, 0) + 1
            self.cached.pop(block, None)
        return blocks

    def publish(self, blocks: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Make the content of live, fully written blocks known. Of two equal blocks the first stays."""
        for block, digest in zip(blocks, hashes, strict=True):
            if digest not in self.block_of and block not in self.hash_of:
                self.block_of[digest] = block
                self.hash_of[block] = digest
