"""What one step is: a StepPlan of integers, and the ForwardBatch of tensors each rank makes of it.

The scheduler writes the plan once; it is the same for every rank. Only `ForwardBatch.build` knows
that ranks hold different tokens. Read `attention/base.py` next.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minidcp.kv_cache.interleave import Interleave

Array = NDArray[np.int64]


@dataclass
class SampleColumns:
    """The rows of a step that sample a token, and how; one entry per such row in every list."""

    rows: list[int] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    top_k: list[int] = field(default_factory=list)
    top_p: list[float] = field(default_factory=list)
    seed: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    logprobs: list[int] = field(default_factory=list)  # how many of the most likely; -1 is none at all


@dataclass
class StepPlan:
    """One step in integers. Rows [0, num_decode) decode one token each, the others prefill a chunk.

    Row i computes positions [starts[i], starts[i] + lengths[i]) of the request in slot slots[i]. A
    decode row's token is the one its slot sampled last, which only the workers may know yet; the
    prefill rows' tokens lie in `tokens`, one row after another.
    """

    num_decode: int = 0
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, index, block id)
    sample: SampleColumns = field(default_factory=SampleColumns)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


class BlockTables:
    """Block ids by slot on the host: [max_num_seqs, width], kept up to date by each plan's new blocks."""

    def __init__(self, max_num_seqs: int, width: int) -> None:
        self.table: Array = np.zeros((max_num_seqs, width), dtype=np.int64)

    def update(self, plan: StepPlan) -> None:
        if plan.new_blocks:
            slot, index, block = np.array(plan.new_blocks, dtype=np.int64).T
            self.table[slot, index] = block


@dataclass(frozen=True)
class Varlen:
    """Sequences packed one after another: sequence i is q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]], and
    likewise for k. The lists are the same lengths on the host."""

    cu_seqlens_q: Tensor  # [B + 1] int32
    cu_seqlens_k: Tensor  # [B + 1] int32
    lens_q: list[int]
    lens_k: list[int]
    causal: bool


@dataclass(frozen=True)
class ContextGather:
    """How the cached context of the prefill rows becomes one packed tensor on every rank.

    Every rank sends the cache rows `slots` (as many on each, so the last of a request may be unused);
    row j of the packed context is row `index[j]` of the gathered [S · N] rows.
    """

    slots: Tensor  # [S] int32
    index: Tensor  # [P] int32
    varlen: Varlen


@dataclass(frozen=True)
class ForwardBatch:
    """One step's tensors on one rank, all int32: T tokens, the first `num_decode` of them decode rows."""

    num_decode: int
    narrow: bool  # exchange raw q and projected outputs (see models/deepseek_v2.py)
    prefill_tokens: Tensor  # [T - num_decode]
    positions: Tensor  # [T]
    slot_mapping: Tensor  # [T] this rank's cache row, -1 where another rank stores the token
    decode_slots: Tensor  # [num_decode] whose last sampled tokens are the decode rows'
    block_table: Tensor  # [num_decode, W]
    local_lens: Tensor  # [num_decode] tokens on this rank, the current one included
    prefill: Varlen | None  # the new tokens among themselves
    context: ContextGather | None  # what they find in the cache
    sample_index: Tensor  # [S] tokens whose logits are needed
    sample_slots: Tensor  # [S]

    @classmethod
    def build(
        cls,
        plan: StepPlan,
        tables: BlockTables,
        interleave: Interleave,
        rank: int,
        narrow: bool,
        device: torch.device,
    ) -> ForwardBatch:
        slots, starts, lengths = (
            np.array(x, dtype=np.int64) for x in (plan.slots, plan.starts, plan.lengths)
        )
        d = plan.num_decode
        row_of_token = np.repeat(np.arange(len(slots)), lengths)
        positions = starts[row_of_token] + ranges(lengths)
        local = interleave.local_slot(positions)
        block_ids = tables.table[slots[row_of_token], local // interleave.block_size]
        mine = interleave.owner_of(positions) == rank
        width = int(interleave.local_slot(starts[:d]).max()) // interleave.block_size + 1 if d else 1
        sample_rows = np.array(plan.sample.rows, dtype=np.int64)
        arrays = {
            "prefill_tokens": np.array(plan.tokens, dtype=np.int64),
            "positions": positions,
            "slot_mapping": np.where(mine, interleave.cache_slot(block_ids, local), -1),
            "decode_slots": slots[:d],
            "block_table": tables.table[slots[:d], :width],
            "local_lens": interleave.local_len(starts[:d] + 1, rank),
            "sample_index": np.cumsum(lengths)[sample_rows] - 1,
            "sample_slots": slots[sample_rows],
        }
        chunks, cached = lengths[d:], starts[d:]
        if len(chunks):
            arrays["cu_chunks"] = offsets(chunks)
        if cached.any():
            arrays["cu_cached"] = offsets(cached)
            gather = plan_context_gather(cached, tables.table[slots[d:]], interleave)
            arrays["gather_slots"], arrays["gather_index"] = gather

        t = upload(arrays, device)
        prefill = context = None
        if "cu_chunks" in t:
            lens = chunks.tolist()
            prefill = Varlen(t["cu_chunks"], t["cu_chunks"], lens, lens, causal=True)
            if "cu_cached" in t:
                varlen = Varlen(t["cu_chunks"], t["cu_cached"], lens, cached.tolist(), causal=False)
                context = ContextGather(t["gather_slots"], t["gather_index"], varlen)
        fields = {name: t[name] for name in list(arrays)[:8]}
        return cls(num_decode=d, narrow=narrow, prefill=prefill, context=context, **fields)


def upload(arrays: dict[str, Array], device: torch.device) -> dict[str, Tensor]:
    """The arrays as int32 tensors on the device, in one copy that the host does not wait for."""
    packed = torch.from_numpy(np.concatenate([a.ravel() for a in arrays.values()]).astype(np.int32))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    parts = packed.split([a.size for a in arrays.values()])
    return {name: part.view(a.shape) for (name, a), part in zip(arrays.items(), parts, strict=True)}


def plan_context_gather(cached: Array, table: Array, interleave: Interleave) -> tuple[Array, Array]:
    """The `slots` and `index` of a ContextGather for rows with `cached` tokens and these block tables.

    A shard's length differs by one between ranks; every rank sends the longest, rank 0's. The one row
    too many lies in a block that the request owns, and no index points at it.
    """
    shard_lens = interleave.local_len(cached, 0)
    row = np.repeat(np.arange(len(cached)), shard_lens)
    local = ranges(shard_lens)
    slots = interleave.cache_slot(table[row, local // interleave.block_size], local)

    first = offsets(shard_lens)[:-1]  # where a request's shard begins within a rank's part
    row = np.repeat(np.arange(len(cached)), cached)
    positions = ranges(cached)
    index = (first[row] + interleave.local_slot(positions)) * interleave.size + interleave.owner_of(positions)
    return slots, index


def offsets(lengths: Array) -> Array:
    """[0, l0, l0 + l1, …]: where each of the packed sequences begins, and the end."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])


def ranges(lengths: Array) -> Array:
    """[0 … l0 - 1, 0 … l1 - 1, …]."""
    return np.arange(lengths.sum()) - np.repeat(offsets(lengths)[:-1], lengths)
