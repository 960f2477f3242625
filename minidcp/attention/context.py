"""How a prompt's new tokens see the context that is in the cache already: an earlier chunk, or a
prefix that another request left. There are two exact ways, and a cost model that picks one.
`models/mla.py` attends to the pieces that are made here. Next: `models/deepseek.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minidcp.batch import (
    Array,
    BlockTables,
    CacheQueries,
    ContextPiece,
    ExchangesNarrow,
    StepPlan,
    Varlen,
    offsets,
    ranges,
    upload,
)
from minidcp.hardware import LINK_BYTES_PER_SECOND, PREFILL_FLOPS
from minidcp.kv_cache.interleave import Interleave
from minidcp.model_config import ModelConfig

LINK_VALUES_PER_SECOND = LINK_BYTES_PER_SECOND / 2  # in bf16
MULTIPLY_ADDS_PER_SECOND = PREFILL_FLOPS / 2
# (new token, seen token, own head) triples: 36 billion multiply-adds, 0.2 ms a layer.
MAX_DECODED_PAIRS = 1 << 25


@dataclass(frozen=True)
class ContextPolicy:
    """Chooses how new tokens reach their cached context, and prepares it. All ranks choose alike.

    gather_kv: every rank gets the latents of all ranks, a piece at a time, decompresses them for
        its own heads and attends in MHA form.
    gather_q: the ranks attend where the latents are. They gather the absorbed queries and exchange
        the results, as in decode. That is better for few new tokens on a long context.
    cheaper: whichever of the two takes less time by `estimate_gather_kv` and `estimate_gather_q`.

    Attributes:
        num_heads: attention heads of this rank.
        workspace: how many tokens of context are gathered at once.
        max_queries: how many new tokens' queries are gathered at once. Each has all heads of the
            DCP group: for the 128 heads of DeepSeek-V2, with latent output, a third of a megabyte.
    """

    config: ModelConfig
    num_heads: int
    layout: Interleave
    strategy: str = "cheaper"
    workspace: int = 8192
    max_queries: int = 1024

    def suits_decode(self, plan: StepPlan) -> bool:
        """Whether the prompts of a step may as well attend as decode rows, one for each token.

        Such a row attends absorbed, which costs more the more it sees. So it must see little.
        """
        if self.strategy == "gather_kv":
            return False
        new = np.array(plan.lengths[plan.num_decode :], dtype=np.int64)
        cached = np.array(plan.starts[plan.num_decode :], dtype=np.int64)
        num_seen = new @ cached + (new * (new + 1)).sum() // 2
        return bool(num_seen * self.num_heads <= MAX_DECODED_PAIRS)

    def gathers_q(self, new: Array, cached: Array) -> bool:
        """Whether to gather the queries of R rows that have new [R] and cached [R] tokens."""
        if self.strategy == "cheaper":
            return self.estimate_gather_q(new, cached) < self.estimate_gather_kv(new, cached)
        return self.strategy == "gather_q"

    def estimate_gather_q(self, new: Array, cached: Array) -> float:
        """Seconds per layer: absorb and project, send q and results, attend absorbed.

        Simplified: what crosses is counted as if narrow, products as if wide.
        """
        config = self.config
        num_peers = self.layout.size - 1
        values_per_head = config.qk_head_dim + config.v_head_dim + 2  # q, output, and a float32 LSE
        send_one = num_peers * self.num_heads * values_per_head / LINK_VALUES_PER_SECOND

        rows_with_context = np.flatnonzero(cached)
        sent_rows = slice(rows_with_context[0], rows_with_context[-1] + 1)
        num_sent = float(new[sent_rows].sum())
        multiply_adds = self.count_pairs(new, cached) * (config.latent_dim + config.kv_lora_rank)
        attend = multiply_adds / MULTIPLY_ADDS_PER_SECOND
        return attend + num_sent * (self.seconds_to_project() + send_one)

    def estimate_gather_kv(self, new: Array, cached: Array) -> float:
        """Seconds per layer: send latents, decompress them for this rank's heads, attend as MHA."""
        config = self.config
        num_peers = self.layout.size - 1
        values_per_token = num_peers * config.latent_dim / self.layout.size
        send_one = values_per_token / LINK_VALUES_PER_SECOND

        num_sent = float(cached.sum())
        multiply_adds = self.count_pairs(new, cached) * (config.qk_head_dim + config.v_head_dim)
        attend = multiply_adds / MULTIPLY_ADDS_PER_SECOND
        return num_sent * (self.seconds_to_project() + send_one) + attend

    def count_pairs(self, new: Array, cached: Array) -> float:
        """(new token, cached token, head) triples: how many scores attention computes."""
        return float(new @ cached) * self.num_heads

    def seconds_to_project(self) -> float:
        """W_UK and W_UV for one token and this rank's heads."""
        config = self.config
        widths = config.qk_nope_head_dim + config.v_head_dim
        return self.num_heads * widths * config.kv_lora_rank / MULTIPLY_ADDS_PER_SECOND

    def build_context(
        self,
        plan: StepPlan,
        tables: BlockTables,
        rank: int,
        exchanges_narrow: ExchangesNarrow,
        device: torch.device,
    ) -> Sequence[CacheQueries | ContextPiece]:
        """What the prefill rows of a step find in the cache, as seen by DCP rank `rank`."""
        new = np.array(plan.lengths[plan.num_decode :], dtype=np.int64)
        cached = np.array(plan.starts[plan.num_decode :], dtype=np.int64)
        if not cached.any():
            return ()
        block_table = tables.table[plan.slots[plan.num_decode :]]
        if self.gathers_q(new, cached):
            return self.split_queries(new, cached, block_table, rank, exchanges_narrow, device)
        return self.cut_context(new, cached, block_table, device)

    def split_queries(
        self,
        new: Array,
        cached: Array,
        block_table: Array,
        rank: int,
        exchanges_narrow: ExchangesNarrow,
        device: torch.device,
    ) -> list[CacheQueries]:
        """The new tokens as queries over this rank's shard, at most `max_queries` at once.

        They run from the first token that has context to the last. A token without context between
        them has local length 0.
        """
        row_of_token = np.repeat(np.arange(len(new)), new)
        tokens_with_context = np.flatnonzero(cached[row_of_token])
        begin = int(tokens_with_context[0])
        end = int(tokens_with_context[-1]) + 1
        row_of_token = row_of_token[begin:end]

        width = self.layout.num_blocks(int(cached.max()))
        arrays = {
            "block_table": block_table[:, :width],
            "row_of_token": row_of_token,
            "local_lens": self.layout.local_len(cached, rank)[row_of_token],
        }
        tensors = upload(arrays, device)
        token_table = tensors["block_table"][tensors["row_of_token"]]  # [end - begin, W]
        narrow = exchanges_narrow(end - begin)

        pieces = []
        for start in range(0, end - begin, self.max_queries):
            stop = min(start + self.max_queries, end - begin)
            pieces.append(
                CacheQueries(
                    block_table=token_table[start:stop],
                    local_lens=tensors["local_lens"][start:stop],
                    host_lens=arrays["local_lens"][start:stop],
                    narrow=narrow,
                    tokens=slice(begin + start, begin + stop),
                )
            )
        return pieces

    def cut_context(
        self, new: Array, cached: Array, block_table: Array, device: torch.device
    ) -> list[ContextPiece]:
        """The context of all rows, cut into pieces of at most `workspace` tokens.

        Each piece begins at a multiple of N in its row, so that all ranks send the same local
        slots. The shards of a run of tokens differ in length by one at most. Every rank sends as
        many rows as the longest shard has, which is rank 0's. The row that is one too many lies in
        a block that the request owns, and no index points at it.

        Example with N = 4 and a workspace of 12 tokens: row A has 6 cached tokens, row B has 7.
        Padded to multiples of 4 they take places [0, 8) and [8, 16), so the first piece has all of
        A and tokens 0 to 3 of B, and the second has tokens 4 to 6 of B. In the first piece every
        rank sends three cache rows (- is unused):

            rank             0     1     2     3
            sends of A       0 4   1 5   2 -   3 -
            sends of B       0     1     2     3

            packed token     A0 A1 A2 A3 A4 A5 B0 B1 B2 B3
            owner             0  1  2  3  0  1  0  1  2  3
            sent_index        0  0  0  0  1  1  2  2  2  2

        The new tokens of A and of B see it, each their own row's part.
        """
        size = self.layout.size
        padded = -(-cached // size) * size
        row_offsets = offsets(padded)
        piece_len = max(self.workspace // size, 1) * size

        pieces = []
        for piece_start in range(0, int(row_offsets[-1]), piece_len):
            # Tokens [start, end) of each row are in this piece.
            start = np.clip(piece_start - row_offsets[:-1], 0, cached)
            end = np.clip(piece_start + piece_len - row_offsets[:-1], 0, cached)
            rows_in_piece = np.flatnonzero(end > start)
            # One run of rows. Rows without context may lie between.
            rows = np.arange(rows_in_piece[0], rows_in_piece[-1] + 1)
            first_token = int(new[: rows[0]].sum())
            piece = self.make_piece(
                start=start[rows],
                lens_k=(end - start)[rows],
                lens_q=new[rows],
                block_table=block_table[rows],
                first_token=first_token,
                device=device,
            )
            pieces.append(piece)
        return pieces

    def make_piece(
        self,
        start: Array,
        lens_k: Array,
        lens_q: Array,
        block_table: Array,
        first_token: int,
        device: torch.device,
    ) -> ContextPiece:
        """Tokens [start[i], start[i] + lens_k[i]) of row i, which has lens_q[i] new tokens.

        `first_token` is the number of the first row's first new token among the prefill tokens.
        """
        layout = self.layout
        num_sent = layout.local_len(lens_k, 0)  # by each rank, for each row
        local_slots = np.repeat(layout.local_slot(start), num_sent) + ranges(num_sent)
        row_of_sent = np.repeat(np.arange(len(start)), num_sent)
        blocks = block_table[row_of_sent, local_slots // layout.block_size]

        place_in_row = ranges(lens_k)  # of each packed token
        # Where the cache rows that are sent for each token's row begin.
        first_sent = np.repeat(offsets(num_sent)[:-1], lens_k)
        arrays = {
            "cache_rows": layout.cache_row(blocks, local_slots),
            "sent_index": first_sent + layout.local_slot(place_in_row),
            "owner": layout.owner_of(place_in_row),
            "cu_seqlens_q": offsets(lens_q),
            "cu_seqlens_k": offsets(lens_k),
        }
        tensors = upload(arrays, device)
        varlen = Varlen(
            tensors["cu_seqlens_q"],
            tensors["cu_seqlens_k"],
            lens_q.tolist(),
            lens_k.tolist(),
            causal=False,
        )
        return ContextPiece(
            cache_rows=tensors["cache_rows"],
            sent_index=tensors["sent_index"],
            owner=tensors["owner"],
            tokens=slice(first_token, first_token + int(lens_q.sum())),
            varlen=varlen,
        )
