"""Drafts by the model's MTP layer, on one rank. Behind each step the layer runs over all tokens of
the step, because its cache must have them, and once more for each further draft, over the rows that
sampled. Nothing of it is on the host: the next plan says how many drafts are checked. Next:
`cuda_graph.py`."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidcp.batch import (
    BlockTables,
    CacheQueries,
    ForwardBatch,
    StepPlan,
    find_positions,
    upload,
)
from minidcp.kv_cache.interleave import Interleave
from minidcp.models.mtp import PredictionLayer
from minidcp.parallel.state import ParallelState
from minidcp.resolve import ResolvedConfig
from minidcp.worker.cuda_graph import PredictionGraphs
from minidcp.worker.drafts import Verdict

# Where drafts are is known on the device only. Back-ends that plan on the host are refused.
UNKNOWN_LENS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class SampledRows:
    """The R rows of a step after which tokens were sampled; all tensors are int32."""

    slots: Tensor  # [R]
    first: Tensor  # [R] the first of its tokens among the S sampled ones
    row_of_token: Tensor  # [S]
    room: Tensor  # [R] tokens that its blocks have room for
    block_table: Tensor  # [R, W]

    @classmethod
    def build(
        cls,
        plan: StepPlan,
        tables: BlockTables,
        layout: Interleave,
        max_len: int,
        num_more: int,
        device: torch.device,
    ) -> "SampledRows":
        """`num_more` positions behind the step's may be computed, all of them below max_len.

        Without any, the block table is empty.
        """
        sampling = np.array(plan.sampling, dtype=np.int64)
        rows, first, row_of_token = np.unique(sampling, return_index=True, return_inverse=True)
        slots = np.array(plan.slots, dtype=np.int64)[rows]
        width = 0
        if num_more > 0:
            longest = int(find_positions(plan).max()) + 1 + num_more
            width = layout.num_blocks(min(longest, max_len))
        arrays = {
            "slots": slots,
            "first": first,
            "row_of_token": row_of_token,
            "room": np.minimum(np.array(plan.room, dtype=np.int64), max_len),
            "block_table": tables.table[slots, :width],
        }
        return cls(**upload(arrays, device))

    def find_last(self, verdict: Verdict | None) -> Tensor:
        """The last of each row's sampled tokens that counts: [R]. Without drafts there is one."""
        if verdict is None:
            return self.first
        counts = verdict.counts
        num_counting = torch.zeros_like(self.first).index_add_(0, self.row_of_token, counts.int())
        return self.first + num_counting - 1

    def make_batch(
        self, positions: Tensor, layout: Interleave, rank: int, narrow: bool
    ) -> ForwardBatch:
        """A decode batch of one token of each row, at these positions [R].

        Where a row has no room left, nothing is stored, and its draft is none that is wanted.
        """
        has_room = positions < self.room
        positions = torch.minimum(positions, self.room - 1)
        local_slots = layout.local_slot(positions)
        places = (local_slots // layout.block_size)[:, None].long()
        cache_rows = layout.cache_row(self.block_table.gather(1, places)[:, 0], local_slots)
        is_own = has_room & (layout.owner_of(positions) == rank)
        local_lens = layout.local_len(positions + 1, rank)
        return ForwardBatch(
            num_decode_tokens=len(positions),
            prefill_tokens=positions[:0],
            positions=positions,
            slot_mapping=torch.where(is_own, cache_rows, -1),
            decode_slots=self.slots,
            sample_index=slice(None),
            sample_slots=self.slots,
            decode=CacheQueries(self.block_table, local_lens, UNKNOWN_LENS, narrow),
        )


class MadeDrafts(NamedTuple):
    slots: Tensor  # [R] request slots
    tokens: Tensor  # [R, K]


class Predictor:
    """Makes config.num_predicted drafts behind each row of a step that samples."""

    def __init__(
        self,
        layer: PredictionLayer,
        config: ResolvedConfig,
        state: ParallelState,
        tables: BlockTables,
        layout: Interleave,
    ) -> None:
        self.layer = layer
        self.config = config
        self.state = state
        self.tables = tables
        self.layout = layout
        self.kv: Tensor | None = None  # the layer's cache
        self.graphs: PredictionGraphs | None = None

    def run_layer(self, next_tokens: Tensor, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        assert self.kv is not None
        self.state.begin_step()
        return self.layer(next_tokens, hidden, self.kv, batch)

    def predict(
        self, next_tokens: Tensor, hidden: Tensor, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """The layer's hidden states of a decode batch and the tokens that it predicts."""
        hidden = self.run_layer(next_tokens, hidden, batch)
        return hidden, self.layer.choose_best(hidden)

    def make_drafts(
        self,
        plan: StepPlan,
        batch: ForwardBatch,
        hidden: Tensor,
        tokens: Tensor,
        verdict: Verdict | None = None,
    ) -> MadeDrafts | None:
        """Drafts for all requests for which the step has sampled; None if it has for none.

        hidden: [T, hidden] of the batch. tokens: [S] that were sampled. The verdict says which of
        them count; None: all, because there were no drafts.
        """
        is_replayed = batch.decode is not None and batch.decode.is_replayed
        next_tokens = find_next_tokens(plan, tokens)
        if not plan.sampling:
            if self.graphs is not None and is_replayed:
                self.graphs.replay(next_tokens, hidden)
            else:
                self.run_layer(next_tokens, hidden, batch)
            return None
        num_more = self.config.num_predicted - 1
        rows = SampledRows.build(
            plan, self.tables, self.layout, self.config.max_model_len, num_more, tokens.device
        )
        last = rows.find_last(verdict)
        if isinstance(batch.sample_index, Tensor):
            last = batch.sample_index[last]  # among all tokens of the step
        if self.graphs is not None and is_replayed:
            hidden, best = self.graphs.replay(next_tokens, hidden)
            hidden, best = hidden[last], best[last]
        else:
            hidden = self.run_layer(next_tokens, hidden, batch)[last]
            best = self.layer.choose_best(hidden)
        positions = batch.positions[last]

        drafts = [best]
        for place in range(1, 1 + num_more):
            hidden, best = self.go_on(rows, positions + place, best, hidden)
            drafts.append(best)
        return MadeDrafts(rows.slots, torch.stack(drafts, 1))

    def go_on(
        self, rows: SampledRows, positions: Tensor, tokens: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Behind drafts [R], the layer's own hidden states being those of the positions [R]."""
        rank = self.state.dcp.rank
        narrow = self.config.exchanges_narrow(len(positions))
        batch = rows.make_batch(positions, self.layout, rank, narrow)
        if self.graphs is None:
            return self.predict(tokens, hidden, batch)
        self.graphs.inputs.copy(batch)
        hidden, best = self.graphs.replay(tokens, hidden)
        return hidden, best.clone()


def find_next_tokens(plan: StepPlan, tokens: Tensor) -> Tensor:
    """The token behind each token of a step [T], given the sampled tokens [S].

    Behind a decode row's token it is what was sampled there, and not the draft: where these differ,
    what is computed for the draft does not count. Behind the last token of a cached block it is
    what followed in the request that computed the block. Another request that shares the block may
    go on otherwise, and get drafts that are a little worse for it.
    """
    num_decode_tokens = plan.num_decode_tokens
    if num_decode_tokens == len(tokens) and not plan.tokens:
        return tokens
    # Token ids, or -1 - i for sampled token i.
    codes = np.empty(plan.num_tokens, dtype=np.int64)
    codes[:num_decode_tokens] = -1 - np.arange(num_decode_tokens)
    codes[num_decode_tokens:-1] = plan.tokens[1:]
    ends = num_decode_tokens - 1 + np.cumsum(plan.lengths[plan.num_decode :])
    codes[ends] = plan.followers
    sampled = np.array(plan.sampling[num_decode_tokens:], dtype=np.int64) - plan.num_decode
    codes[ends[sampled]] = -1 - num_decode_tokens - np.arange(len(sampled))

    on_device = upload({"codes": codes}, tokens.device)["codes"].long()
    known = torch.cat([tokens, tokens.new_zeros(1)])  # never empty
    return torch.where(on_device < 0, known[(-1 - on_device).clamp(min=0)], on_device)
