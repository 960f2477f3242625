"""CUDA graphs of pure decode steps, one per batch size of a ladder; smaller batches are padded. A padded row has
length 0 and slot -1: it reads nothing, writes nothing, and its token goes to a slot that no request has.
`model_runner.py` decides which steps replay."""

import bisect
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minidcp.batch import BlockTables, CacheRows, ForwardBatch, StepPlan, upload
from minidcp.config import EngineConfig
from minidcp.kv_cache.interleave import Interleave
from minidcp.parallel.state import ParallelState

# batch -> this rank's logits [S, V / N] and the best tokens [S], which also become their slots' last ones.
Forward = Callable[[ForwardBatch], tuple[Tensor, Tensor]]


def ladder(most: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8, 16, 32 and 64, up to `most`: from 16 on padding is a third at most."""
    sizes = [1, 2, 4, *range(8, 33, 8), *range(48, 129, 16), *range(160, 257, 32), *range(320, most + 1, 64)]
    return [*(size for size in sizes if size < most), most]


class DecodeGraphs:
    """Graphs for up to `config.max_num_seqs` decode rows of `forward`: the whole step, from a batch to tokens."""

    def __init__(
        self, forward: Forward, config: EngineConfig, state: ParallelState, tables: BlockTables, device: torch.device
    ) -> None:
        self.layout, self.rank = Interleave(config.dcp_size, config.block_size), state.dcp.rank
        self.state, self.tables, self.device, self.spare_slot = state, tables, device, config.max_num_seqs
        self.sizes = ladder(config.max_num_seqs)
        # One set of input tensors: the graph of size B reads the first B rows.
        self.inputs = torch.zeros(4, config.max_num_seqs, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(tables.table.shape, dtype=torch.int32, device=device)
        # By size: a graph, the logits and tokens that it writes, and how many bytes a replay receives from other ranks.
        self.steps: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, int]] = {}
        pool = None
        for size in reversed(self.sizes):  # the largest first: the smaller ones fit into its memory
            positions, slot_mapping, decode_slots, local_lens = (row[:size] for row in self.inputs)
            slot_mapping.fill_(-1)
            decode_slots.fill_(self.spare_slot)
            batch = ForwardBatch(
                num_decode=size,
                prefill_tokens=positions[:0],
                positions=positions,
                slot_mapping=slot_mapping,
                decode_slots=decode_slots,
                sample_index=slice(None),
                sample_slots=decode_slots,
                decode=CacheRows(self.block_table[:size], local_lens, config.exchanges_narrow(size)),
            )
            forward(batch)  # compiles kernels and fills caches, which a capture must not do
            torch.cuda.synchronize(device)
            before, graph = state.received_bytes, torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits, tokens = forward(batch)
            pool = pool or graph.pool()
            self.steps[size] = graph, logits, tokens, state.received_bytes - before

    def replay(self, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Run a pure decode step; logits [num_decode, vocab] and their best tokens, valid until the next."""
        d, layout = plan.num_decode, self.layout
        size = self.sizes[bisect.bisect_left(self.sizes, d)]
        starts, slots = (np.array(x, dtype=np.int64) for x in (plan.starts, plan.slots))
        rows = np.repeat([[0], [-1], [self.spare_slot], [0]], size, 1)  # what a padded row has
        rows[0, :d], rows[2, :d] = starts, slots
        rows[1, :d] = self.tables.map_slots(slots, starts, layout, self.rank)
        rows[3, :d] = layout.local_len(starts + 1, self.rank)
        width = layout.num_blocks(int(starts.max()) + 1)
        new = upload({"rows": rows, "table": self.tables.table[slots, :width]}, self.device)
        self.inputs[:, :size].copy_(new["rows"])
        self.block_table[:d, :width].copy_(new["table"])
        graph, logits, tokens, received = self.steps[size]
        graph.replay()
        self.state.tp.received_bytes += received  # of both groups; they do not see it
        return logits[:d], tokens[:d]
