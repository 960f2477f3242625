"""CUDA graphs of steps, one for each number of tokens of a ladder, and of the MTP layer. In a graph
every token is a decode row of its own, also those of short prompts. Steps of fewer tokens are
padded. A padded row has local length 0 and slot_mapping -1: it reads nothing from the cache, writes
nothing there, and nobody looks at its token. Next: `prompt_graphs.py`."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidcp.attention import AttentionBackend
from minidcp.batch import (
    Array,
    BlockTables,
    CacheQueries,
    ForwardBatch,
    StepPlan,
    find_positions,
    find_wanted_tokens,
    list_decode_tokens,
    upload,
)
from minidcp.kv_cache.interleave import Interleave
from minidcp.parallel.state import ParallelState
from minidcp.resolve import ResolvedConfig

# Runs a batch: this rank's logits [S, V / tp], the best tokens [S], and hidden states [T, hidden],
# which are left out where no drafts are made of them.
Forward = Callable[[ForwardBatch], tuple[Tensor, Tensor, Tensor]]
# Runs the MTP layer: next tokens [T], hidden states [T, hidden], batch -> hidden states, tokens.
Predict = Callable[[Tensor, Tensor, ForwardBatch], tuple[Tensor, Tensor]]

# So many tokens of prompts fit into a graph even where fewer requests can decode at once.
SHORT_PROMPTS = 512


def ladder(max_size: int) -> list[int]:
    """1, 2, 4, 8, and then steps of 8, 16, 32 and 64, up to `max_size`.

    From 16 rows on at most a third of a batch is padding.
    """
    sizes = [1, 2, 4]
    sizes += range(8, 33, 8)
    sizes += range(48, 129, 16)
    sizes += range(160, 257, 32)
    sizes += range(320, max_size + 1, 64)
    return [size for size in sizes if size < max_size] + [max_size]


@dataclass(frozen=True)
class CapturedStep:
    """A graph of a step, or of a piece of one."""

    graph: torch.cuda.CUDAGraph
    outputs: tuple[Tensor, ...]  # each [B, …], written by each replay
    received_bytes: int  # what a replay receives from other ranks


def capture(run: Callable[[], tuple[Tensor, ...]], pool: Any, state: ParallelState) -> CapturedStep:
    """Capture what `run` launches. `pool` is the memory to take, or None for memory of its own."""
    received_before = state.received_bytes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = run()
    return CapturedStep(graph, outputs, state.received_bytes - received_before)


class GraphInputs:
    """The tensors that all graphs read. The graph of size B reads the first B rows.

    A row is a token of the plan.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        # The first fields are views of one tensor, so that one copy fills them.
        self.fields = torch.zeros(5, rows, dtype=torch.int32, device=device)
        self.positions, self.slot_mapping, self.decode_slots, self.local_lens = self.fields[:4]
        self.decode_tokens = self.fields[4]
        self.block_table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self.host_lens = np.zeros(rows, dtype=np.int64)  # local_lens, on the host

        self.slot_mapping.fill_(-1)

    def make_batch(self, size: int, narrow: bool) -> ForwardBatch:
        """A decode batch of the first `size` rows."""
        positions = self.positions[:size]
        decode_slots = self.decode_slots[:size]
        decode = CacheQueries(
            block_table=self.block_table[:size],
            local_lens=self.local_lens[:size],
            host_lens=self.host_lens[:size],
            narrow=narrow,
            is_replayed=True,
        )
        return ForwardBatch(
            num_decode_tokens=size,
            prefill_tokens=positions[:0],
            positions=positions,
            slot_mapping=self.slot_mapping[:size],
            decode_slots=decode_slots,
            sample_index=slice(None),
            sample_slots=decode_slots,
            decode_tokens=self.decode_tokens[:size],
            decode=decode,
        )

    def fill(self, fields: Sequence[Array], block_table: Array, size: int) -> None:
        """Copy positions, slot_mapping, decode_slots, local_lens and decode_tokens of n rows, and
        their block_table [n, W]. They are padded to `size`.

        It takes two copies on the device, which lie between the graphs of two steps.
        """
        num_rows, width = block_table.shape
        padded = np.zeros((len(fields), size), dtype=np.int64)
        padded[1, num_rows:] = -1  # slot_mapping
        padded[:, :num_rows] = fields
        self.host_lens[:size] = padded[3]
        tensors = upload({"fields": padded, "block_table": block_table}, self.fields.device)
        self.fields[:, :size].copy_(tensors["fields"])
        self.block_table[:num_rows, :width].copy_(tensors["block_table"])

    def copy(self, batch: ForwardBatch) -> None:
        """Take over a decode batch that is on the device, and make all other rows padding."""
        assert batch.decode is not None
        num_rows, width = batch.decode.block_table.shape
        self.local_lens.zero_()
        self.slot_mapping.fill_(-1)
        self.positions[:num_rows].copy_(batch.positions)
        self.slot_mapping[:num_rows].copy_(batch.slot_mapping)
        self.local_lens[:num_rows].copy_(batch.decode.local_lens)
        self.block_table[:num_rows, :width].copy_(batch.decode.block_table)


class GraphLadder:
    """Graphs for batches of any size up to the largest of `sizes`, which rise.

    `prepare` gives what runs a batch of one of them.
    """

    def __init__(
        self,
        sizes: list[int],
        prepare: Callable[[int], Callable[[], tuple[Tensor, ...]]],
        state: ParallelState,
        pool: Any = None,
    ) -> None:
        """`pool` is the memory of other graphs: what they have put out stays valid."""
        self.sizes = sizes
        self.state = state
        self.steps: dict[int, CapturedStep] = {}
        self.pool = pool  # the memory that all graphs share
        for size in reversed(sizes):  # the largest first: the smaller ones fit in its memory
            self.steps[size] = self.capture(prepare(size))
            self.pool = self.pool or self.steps[size].graph.pool()

    def capture(self, run: Callable[[], tuple[Tensor, ...]]) -> CapturedStep:
        run()  # compiles kernels and fills caches, which a capture must not do
        return capture(run, self.pool, self.state)

    def find_size(self, num_rows: int) -> int:
        """The smallest graph that so many rows fit in."""
        return self.sizes[bisect.bisect_left(self.sizes, num_rows)]

    def has_room(self, num_rows: int) -> bool:
        return num_rows <= self.sizes[-1]

    def run(self, num_rows: int) -> tuple[Tensor, ...]:
        """Replay the graph for so many rows: its outputs for them.

        They are valid until the next replay, of this graph or of one for prompts.
        """
        step = self.steps[self.find_size(num_rows)]
        step.graph.replay()
        # The groups do not see what a graph receives. Note it with one of them.
        self.state.tp.received_bytes += step.received_bytes
        return tuple(output[:num_rows] for output in step.outputs)


class DecodeGraphs(GraphLadder):
    """Graphs of `forward`: from a batch to tokens. The largest has room for all decode rows that
    there can be, and for SHORT_PROMPTS."""

    def __init__(
        self,
        forward: Forward,
        attention: AttentionBackend,
        config: ResolvedConfig,
        state: ParallelState,
        tables: BlockTables,
        device: torch.device,
        pool: Any = None,
    ) -> None:
        """`pool` is the memory of graphs that leave nothing in it behind their replay."""
        self.attention = attention
        self.layout = Interleave(config.dcp_size, config.block_size)
        self.tables = tables
        self.config = config
        width = tables.table.shape[1]
        short_prompts = min(SHORT_PROMPTS, config.max_num_batched_tokens)
        most_rows = max(config.max_decode_tokens, short_prompts)
        self.inputs = GraphInputs(most_rows, width, device)

        self.queries: dict[int, CacheQueries] = {}  # what attention reads, by size

        def prepare(size: int) -> Callable[[], tuple[Tensor, ...]]:
            batch = self.inputs.make_batch(size, config.exchanges_narrow(size))
            if size < most_rows:
                # All write the same logits: those of all sizes would take many times as much.
                logits, _, _ = self.steps[most_rows].outputs
                batch = replace(batch, logits=logits[:size])
            assert batch.decode is not None
            self.queries[size] = batch.decode
            attention.plan(batch.decode)
            return lambda: forward(batch)

        super().__init__(ladder(most_rows), prepare, state, pool)

    def replay(self, plan: StepPlan) -> tuple[ForwardBatch, Tensor, Tensor, Tensor]:
        """Run a step of T tokens: its batch, and what `forward` gives for it. The hidden states
        [T, hidden] are there only if drafts are made of them.

        All are valid until the next replay.
        """
        num_tokens = plan.num_tokens
        size = self.find_size(num_tokens)
        self.fill_inputs(plan, size)
        self.attention.plan(self.queries[size])
        logits, best, hidden = self.run(num_tokens)
        batch = self.inputs.make_batch(num_tokens, self.config.exchanges_narrow(num_tokens))
        if not plan.tokens:
            return batch, logits, best, hidden

        # A graph computes logits of all its tokens. Of prompts only a few of them are wanted.
        wanted = {
            "tokens": find_wanted_tokens(plan, np.cumsum(plan.lengths)),
            "slots": np.array([plan.slots[row] for row in plan.sampling], dtype=np.int64),
        }
        tensors = upload(wanted, logits.device)
        tokens = tensors["tokens"]
        batch = replace(batch, sample_index=tokens, sample_slots=tensors["slots"])
        return batch, logits[tokens], best[tokens[: len(plan.sampling)]], hidden

    def fill_inputs(self, plan: StepPlan, size: int) -> None:
        rank = self.state.dcp.rank
        positions = find_positions(plan)
        slots = np.repeat(np.array(plan.slots, dtype=np.int64), plan.lengths)
        slot_mapping = self.tables.find_cache_rows(slots, positions, self.layout, rank)
        local_lens = self.layout.local_len(positions + 1, rank)
        tokens = np.concatenate([list_decode_tokens(plan), np.array(plan.tokens, dtype=np.int64)])
        fields = [positions, slot_mapping, slots, local_lens, tokens]
        width = self.layout.num_blocks(int(positions.max()) + 1)
        block_table = self.tables.table[slots, :width]
        self.inputs.fill(fields, block_table, size)


class PredictionGraphs(GraphLadder):
    """Graphs of the MTP layer, for the rows in the inputs of `decode_graphs`, which it shares."""

    def __init__(
        self,
        predict: Predict,
        decode_graphs: DecodeGraphs,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.inputs = decode_graphs.inputs
        config = decode_graphs.config
        device = self.inputs.fields.device
        rows = decode_graphs.sizes[-1]
        self.next_tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.hidden = torch.zeros(rows, hidden_size, dtype=dtype, device=device)

        def prepare(size: int) -> Callable[[], tuple[Tensor, ...]]:
            batch = self.inputs.make_batch(size, config.exchanges_narrow(size))
            return lambda: predict(self.next_tokens[:size], self.hidden[:size], batch)

        super().__init__(decode_graphs.sizes, prepare, decode_graphs.state, decode_graphs.pool)

    def replay(self, next_tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Run the layer over the first n rows of the inputs: hidden states [n, hidden] and the
        tokens [n] that it predicts, both valid until the next replay."""
        num_rows = len(next_tokens)
        self.next_tokens[:num_rows].copy_(next_tokens)
        self.hidden[:num_rows].copy_(hidden)
        new_hidden, tokens = self.run(num_rows)
        return new_hidden, tokens
