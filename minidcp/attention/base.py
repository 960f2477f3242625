"""The contract of an attention back-end. Next: `reference.py`, the shortest complete one."""

from typing import Protocol

from torch import Tensor

from minidcp.batch import CacheQueries, OutAndLse, Varlen


class AttentionBackend(Protocol):
    """Attention over one rank's shard of the latent cache, and among new tokens.

    Every `lse` is [tokens, heads] float32, a natural logarithm, and -inf where a token sees
    nothing. The output of such a token may be anything, NaN too. A back-end that computes in
    another base, or marks empty rows in another way, converts at its own edge.
    """

    name: str  # for the log
    graphs: bool  # whether CUDA graphs can capture it, which means it never waits for the device

    def plan(self, queries: CacheQueries) -> None:
        """Decide on the host what `decode` will do, if that is done there; set queries.planned.

        Called before each step, once for each of its CacheQueries, and never while a CUDA graph is
        captured. Before each replay of a graph it is called with the graph's own CacheQueries.
        """

    def prepare(self, queries: CacheQueries) -> None:
        """Set queries.prepared to what `decode` needs in every layer.

        Called before the first layer, once for each CacheQueries of a step. It is part of graphs.
        """

    def decode(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        kv: Tensor,
        queries: CacheQueries,
        out: Tensor | None = None,
    ) -> OutAndLse:
        """Absorbed attention of B queries over this rank's shard.

        "Absorbed" means that W_UK has been moved from the keys to the queries, so that queries
        meet the cached latents as they are: q · (W_UK c) = (W_UKᵀ q) · c.

        Args:
            q_latent: [B, H, kv_lora_rank], the query with W_UK absorbed.
            q_pe: [B, H, rope], rotated.
            kv: [num_blocks, block_size, kv_lora_rank + rope], the cache of one layer.
            out: [B, H, kv_lora_rank], contiguous. If given, the output is written there.

        Returns the output [B, H, kv_lora_rank], before W_UV, and lse [B, H].
        """

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> OutAndLse:
        """MHA over packed sequences.

        q [Tq, H, Dqk], k [Tk, H, Dqk], v [Tk, H, Dv] -> output [Tq, H, Dv] and lse [Tq, H].
        """
