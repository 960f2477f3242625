"""Which KV cache blocks are in use, and which can be reused for a prompt with the same beginning.
Blocks are integers here: no ranks, no tensors. Next: `batch.py`."""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence

HASH_BYTES = 16


class BlockManager:
    """Reference-counted blocks with a prefix cache. Every block is in one of three states:

    free    nobody uses it, and its content is worthless
    live    at least one request uses it
    cached  nobody uses it, but its content is known by a hash, and kept until the room is needed

    The hash of a block covers its tokens and its parent's hash. So equal hashes mean equal tokens
    from the beginning of the sequence on, and equal cache salts, because the first block's hash
    covers the salt. The least recently used blocks are evicted first.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.prefix_cache = prefix_cache

        self.free: deque[int] = deque(range(num_blocks))
        self.live: dict[int, int] = {}  # block -> number of requests that use it
        self.cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

        # Of all blocks with known content, live ones and cached ones.
        self.hash_of: dict[int, bytes] = {}
        self.block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """How many blocks `allocate` can hand out."""
        return len(self.free) + len(self.cached)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and no change) if there are too few."""
        if count > self.num_available:
            return None
        while len(self.free) < count:
            self.evict()

        blocks = [self.free.popleft() for _ in range(count)]
        for block in blocks:
            self.live[block] = 1
        return blocks

    def evict(self) -> None:
        """Forget the content of the least recently used cached block, which becomes free."""
        block, _ = self.cached.popitem(last=False)
        digest = self.hash_of.pop(block)
        del self.block_of[digest]
        self.free.append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block of a sequence, given in order."""
        # The end of a sequence is worth less than its beginning, so it is made the older entry.
        for block in reversed(blocks):
            self.live[block] -= 1
            if self.live[block] > 0:
                continue
            del self.live[block]
            if block in self.hash_of:
                self.cached[block] = None
            else:
                self.free.append(block)

    def hash_blocks(
        self,
        tokens: Sequence[int],
        hashes: list[bytes],
        num_tokens: int,
        cache_salt: str | None = None,
    ) -> None:
        """Extend `hashes` to cover every full block of `tokens[:num_tokens]`."""
        for index in range(len(hashes), num_tokens // self.tokens_per_block):
            parent = hashes[-1] if hashes else hash_salt(cache_salt)
            begin = index * self.tokens_per_block
            content = array("q", tokens[begin : begin + self.tokens_per_block]).tobytes()
            hashes.append(hashlib.blake2b(parent + content, digest_size=HASH_BYTES).digest())

    def share(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix of `hashes`, with one more reference to each."""
        blocks = []
        for digest in hashes:
            if digest not in self.block_of:
                break
            blocks.append(self.block_of[digest])

        for block in blocks:
            self.live[block] = self.live.get(block, 0) + 1
            self.cached.pop(block, None)
        return blocks

    def publish(self, blocks: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Make the content of live, full blocks known, so that other requests can share them.

        If a block with equal content is known already, that one stays the known one.
        """
        for block, digest in zip(blocks, hashes, strict=True):
            if digest not in self.block_of and block not in self.hash_of:
                self.block_of[digest] = block
                self.hash_of[block] = digest


def hash_salt(cache_salt: str | None) -> bytes:
    """What takes the place of the first block's parent.

    It is no block's hash, whatever the salt: `person` makes this another hash function. Else a
    client could choose a salt whose bytes are the tokens of a block, and pass for its successor.
    """
    if cache_salt is None:
        return b""
    salt = cache_salt.encode(errors="surrogatepass")
    return hashlib.blake2b(salt, digest_size=HASH_BYTES, person=b"cache_salt").digest()
