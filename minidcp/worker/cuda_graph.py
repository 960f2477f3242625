"""CUDA graphs of pure decode steps, one for each batch size of a ladder. Smaller batches are
padded. A padded row has local length 0 and slot_mapping -1: it reads nothing from the cache,
writes nothing there, and nobody looks at its token. Next: `sampler.py`."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    list_drafts,
    upload,
)
from minidcp.kv_cache.interleave import Interleave
from minidcp.parallel.state import ParallelState
from minidcp.resolve import ResolvedConfig

# Runs a batch: this rank's logits [S, V / tp], and the best tokens [S].
Forward = Callable[[ForwardBatch], tuple[Tensor, Tensor]]


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
    graph: torch.cuda.CUDAGraph
    logits: Tensor  # [B, V / tp], written by each replay
    tokens: Tensor  # [B]
    queries: CacheQueries  # what attention reads
    received_bytes: int  # what a replay receives from other ranks


class GraphInputs:
    """The tensors that all graphs read. The graph of size B reads the first B rows.

    A row is a token of a decode row of the plan. `drafts` is there only if there can be any.
    """

    def __init__(self, rows: int, width: int, has_drafts: bool, device: torch.device) -> None:
        # The first fields are views of one tensor, so that one copy fills them.
        num_fields = 5 if has_drafts else 4
        self.fields = torch.zeros(num_fields, rows, dtype=torch.int32, device=device)
        self.positions, self.slot_mapping, self.decode_slots, self.local_lens = self.fields[:4]
        self.drafts = self.fields[4] if has_drafts else None
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
            drafts=None if self.drafts is None else self.drafts[:size],
            decode=decode,
        )

    def fill(self, fields: Sequence[Array], block_table: Array, size: int) -> None:
        """Copy positions, slot_mapping, decode_slots, local_lens, and drafts where there can be
        any, of n rows, padded to `size`.

        block_table is [n, W]. It takes two copies on the device, which lie between the graphs of
        two steps.
        """
        num_rows, width = block_table.shape
        padded = np.zeros((len(fields), size), dtype=np.int64)
        padded[1, num_rows:] = -1  # slot_mapping
        padded[:, :num_rows] = fields
        self.host_lens[:size] = padded[3]
        tensors = upload({"fields": padded, "block_table": block_table}, self.fields.device)
        self.fields[:, :size].copy_(tensors["fields"])
        self.block_table[:num_rows, :width].copy_(tensors["block_table"])


class DecodeGraphs:
    """Graphs of `forward` for up to `config.max_decode_tokens` rows: from a batch to tokens."""

    def __init__(
        self,
        forward: Forward,
        attention: AttentionBackend,
        config: ResolvedConfig,
        state: ParallelState,
        tables: BlockTables,
        device: torch.device,
    ) -> None:
        self.attention = attention
        self.layout = Interleave(config.dcp_size, config.block_size)
        self.state = state
        self.tables = tables
        self.device = device
        self.sizes = ladder(config.max_decode_tokens)
        width = tables.table.shape[1]
        has_drafts = config.num_speculative_tokens > 0
        self.inputs = GraphInputs(config.max_decode_tokens, width, has_drafts, device)

        self.steps: dict[int, CapturedStep] = {}
        pool: Any = None  # the memory that all graphs share
        for size in reversed(self.sizes):  # the largest first: the smaller ones fit in its memory
            batch = self.inputs.make_batch(size, config.exchanges_narrow(size))
            step = self.capture(forward, batch, pool)
            pool = pool or step.graph.pool()
            self.steps[size] = step

    def capture(self, forward: Forward, batch: ForwardBatch, pool: Any) -> CapturedStep:
        assert batch.decode is not None
        self.attention.plan(batch.decode)
        forward(batch)  # compiles kernels and fills caches, which a capture must not do
        torch.cuda.synchronize(self.device)
        received_before = self.state.received_bytes
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits, tokens = forward(batch)
        received_bytes = self.state.received_bytes - received_before
        return CapturedStep(graph, logits, tokens, batch.decode, received_bytes)

    def replay(self, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Run a pure decode step of D tokens: logits [D, V / tp] and their best tokens [D].

        Both are valid until the next replay.
        """
        num_tokens = plan.num_decode_tokens
        size = self.sizes[bisect.bisect_left(self.sizes, num_tokens)]
        self.fill_inputs(plan, size)
        step = self.steps[size]
        self.attention.plan(step.queries)
        step.graph.replay()
        # The groups do not see what a graph receives. Note it with one of them.
        self.state.tp.received_bytes += step.received_bytes
        return step.logits[:num_tokens], step.tokens[:num_tokens]

    def fill_inputs(self, plan: StepPlan, size: int) -> None:
        rank = self.state.dcp.rank
        positions = find_positions(plan)
        slots = np.repeat(np.array(plan.slots, dtype=np.int64), plan.lengths)
        slot_mapping = self.tables.find_cache_rows(slots, positions, self.layout, rank)
        local_lens = self.layout.local_len(positions + 1, rank)
        fields = [positions, slot_mapping, slots, local_lens]
        if self.inputs.drafts is not None:
            fields.append(list_drafts(plan))
        width = self.layout.num_blocks(int(positions.max()) + 1)
        block_table = self.tables.table[slots, :width]
        self.inputs.fill(fields, block_table, size)
