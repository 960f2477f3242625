"""What one step is: a StepPlan of integers, and the ForwardBatch of tensors each rank makes of it. The plan is
the same for every rank; only `ForwardBatch.build` knows that they hold different tokens. Next: `attention/base.py`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minidcp.kv_cache.interleave import Interleave
from minidcp.model_config import ModelConfig
from minidcp.request import SamplingParams

Array = NDArray[np.int64]
Partial = tuple[Tensor, Tensor]  # attention over a part of the context: outputs, and their log-sum-exps
Narrow = Callable[[int], bool]  # whether so many rows are exchanged narrow


@dataclass(frozen=True)
class Admission:
    """What the workers must know of a request, from the first step that it has a slot in."""

    slot: int
    params: SamplingParams
    seed: int = 0
    num_prompt: int = 0
    stop_ids: tuple[int, ...] = ()  # not to be chosen before params.min_tokens
    history: tuple[int, ...] = ()  # prompt and output so far, if penalties count them


@dataclass
class StepPlan:
    """One step in integers. Rows [0, num_decode) decode one token each, the others prefill a chunk. Row i computes
    positions [starts[i], starts[i] + lengths[i]) of the request in slot slots[i]. A decode row's token is the one its
    slot sampled last, which only the workers may know yet; the prefill rows' are in `tokens`, in order."""

    num_decode: int = 0
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, index, block id)
    admitted: list[Admission] = field(default_factory=list)
    sampling: list[int] = field(default_factory=list)  # rows whose last token gets a successor
    # (row, how many tokens before its last, their known successor) whose log-probabilities are wanted
    scored: list[tuple[int, int, int]] = field(default_factory=list)


class BlockTables:
    """Block ids by slot on the host: [max_num_seqs, width], kept up to date by each plan's new blocks."""

    def __init__(self, max_num_seqs: int, width: int) -> None:
        self.table: Array = np.zeros((max_num_seqs, width), dtype=np.int64)

    def update(self, plan: StepPlan) -> None:
        if plan.new_blocks:
            slot, index, block = np.array(plan.new_blocks, dtype=np.int64).T
            self.table[slot, index] = block

    def map_slots(self, slots: Array, positions: Array, layout: Interleave, rank: int) -> Array:
        """Rank `rank`'s cache rows for these positions of requests in `slots`; -1 where another stores the token."""
        local = layout.local_slot(positions)
        rows = layout.cache_slot(self.table[slots, local // layout.block_size], local)
        return np.where(layout.owner_of(positions) == rank, rows, -1)


@dataclass(frozen=True)
class Varlen:
    """Packed sequences: sequence i is q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]], and likewise for k."""

    cu_seqlens_q: Tensor  # [B + 1] int32
    cu_seqlens_k: Tensor  # [B + 1] int32
    lens_q: list[int]  # [B], on the host
    lens_k: list[int]
    causal: bool


@dataclass
class CacheRows:
    """Absorbed queries over this rank's shard: row i sees the first local_lens[i] tokens of blocks block_table[i]."""

    block_table: Tensor  # [B, W] int32
    local_lens: Tensor  # [B] int32
    narrow: bool  # exchange raw q and projected outputs (see models/deepseek_v2.py)
    tokens: slice | None = None  # which of the prefill rows' tokens these rows are
    prepared: object = None  # what the attention back-end's `plan` made for these rows


@dataclass(frozen=True)
class ContextPiece:
    """A run of the prefill rows' cached context, gathered from all ranks at once. Every rank sends its cache rows
    `slots` (equally many, so a request's last may be unused); token j of the packed piece is what `owner[j]` sent as
    row `row[j]`. The new tokens `tokens` (of the prefill rows') see it; `varlen` pairs their sequences with its."""

    slots: Tensor  # [S] int32
    row: Tensor  # [P] int32
    owner: Tensor  # [P] int32
    tokens: slice
    varlen: Varlen


@dataclass(frozen=True)
class ContextPolicy:
    """Which of two exact ways prefill takes to its cached context. Gathering the KV sends every rank the latents, which
    it decompresses for its own heads; gathering the q lets the ranks attend where the latents are, absorbed, as decode
    does. `auto` takes what rates of an H100 make faster: few new tokens on a long context are better sent to it."""

    config: ModelConfig
    num_heads: int  # of this rank
    layout: Interleave
    strategy: str = "auto"  # or gather_kv, gather_q
    workspace: int = 8192  # tokens of context that are gathered at once
    gathered_q: int = 1024  # new tokens whose q, of all heads of the group, is: half a megabyte each until merged

    def gathers_q(self, new: Array, cached: Array) -> bool:
        """For rows with so many new tokens and so much context; the same on every rank."""
        if self.strategy != "auto":
            return self.strategy == "gather_q"
        c, peers = self.config, self.layout.size - 1
        link, rate = 350e9 / 2, 400e12 / 2  # bf16 values a second, multiply-adds a second
        widths = c.qk_head_dim + c.v_head_dim  # of a head: in MHA form, and what crosses if narrow
        seen = float(new @ cached) * self.num_heads  # pairs of new and cached tokens
        some = np.flatnonzero(cached)
        total, sent = float(cached.sum()), float(new[some[0] : some[-1] + 1].sum())
        project = self.num_heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank / rate  # a token
        send_q, send_kv = peers * self.num_heads * (widths + 2) / link, peers * c.latent_dim / self.layout.size / link
        absorbed = seen * (c.latent_dim + c.kv_lora_rank) / rate
        return absorbed + sent * (project + send_q) < total * (project + send_kv) + seen * widths / rate


@dataclass(frozen=True)
class ForwardBatch:
    """One step's tensors on one rank, all int32: T tokens, the first `num_decode` of them decode rows."""

    num_decode: int
    prefill_tokens: Tensor  # [T - num_decode]
    positions: Tensor  # [T]
    slot_mapping: Tensor  # [T] this rank's cache row, -1 where another rank stores the token
    decode_slots: Tensor  # [num_decode] whose last sampled tokens are the decode rows'
    sample_index: Tensor | slice  # [S + K] tokens whose logits are needed: S get a successor, K have one
    sample_slots: Tensor  # [S]
    decode: CacheRows | None = None
    prefill: Varlen | None = None  # the new tokens among themselves
    context: Sequence[CacheRows | ContextPiece] = ()  # what they find in the cache

    @classmethod
    def build(
        cls, plan: StepPlan, tables: BlockTables, policy: ContextPolicy, rank: int, narrow: Narrow, device: torch.device
    ) -> "ForwardBatch":
        layout, d = policy.layout, plan.num_decode
        slots, starts, lengths = (np.array(x, dtype=np.int64) for x in (plan.slots, plan.starts, plan.lengths))
        positions = np.repeat(starts, lengths) + ranges(lengths)
        ends = np.cumsum(lengths)
        sampling = np.array(plan.sampling, dtype=np.int64)
        scored = np.array(plan.scored, dtype=np.int64).reshape(-1, 3)
        arrays = {
            "prefill_tokens": np.array(plan.tokens, dtype=np.int64),
            "positions": positions,
            "slot_mapping": tables.map_slots(np.repeat(slots, lengths), positions, layout, rank),
            "decode_slots": slots[:d],
            "sample_index": np.concatenate([ends[sampling], ends[scored[:, 0]] - scored[:, 1]]) - 1,
            "sample_slots": slots[sampling],
        }
        chunks, cached = lengths[d:], starts[d:]
        if d:
            arrays["table"] = tables.table[slots[:d], : layout.num_blocks(int(starts[:d].max()) + 1)]
            arrays["lens"] = layout.local_len(starts[:d] + 1, rank)
        if len(chunks):
            arrays["cu_chunks"] = offsets(chunks)
        t = upload(arrays, device)
        decode = CacheRows(t.pop("table"), t.pop("lens"), narrow(d)) if d else None
        new = chunks.tolist()
        prefill = Varlen(t["cu_chunks"], t.pop("cu_chunks"), new, new, causal=True) if new else None
        context: list[CacheRows | ContextPiece] = []
        if cached.any():
            args = chunks, cached, tables.table[slots[d:]], policy, device
            context += spread_q(*args, rank, narrow) if policy.gathers_q(chunks, cached) else cut_context(*args)
        return cls(num_decode=d, decode=decode, prefill=prefill, context=context, **t)


def upload(arrays: dict[str, Array], device: torch.device) -> dict[str, Tensor]:
    """The arrays as int32 tensors on the device, in one copy that the host does not wait for."""
    packed = torch.from_numpy(np.concatenate([a.ravel() for a in arrays.values()]).astype(np.int32))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    parts = packed.split([a.size for a in arrays.values()])
    return {name: part.view(a.shape) for (name, a), part in zip(arrays.items(), parts, strict=True)}


def spread_q(
    chunks: Array, cached: Array, table: Array, policy: ContextPolicy, device: torch.device, rank: int, narrow: Narrow
) -> Iterator[CacheRows]:
    """The new tokens from the first row with context to the last, at most `policy.gathered_q` at once."""
    row = np.repeat(np.arange(len(chunks)), chunks)
    some = np.flatnonzero(cached[row])
    begin, row = int(some[0]), row[some[0] : some[-1] + 1]  # rows without context may lie between
    lens = policy.layout.local_len(cached, rank)[row]
    c = upload({"table": table[:, : policy.layout.num_blocks(int(cached.max()))], "row": row, "lens": lens}, device)
    parts = c["table"][c["row"]].split(policy.gathered_q), c["lens"].split(policy.gathered_q)
    for own_table, own_lens in zip(*parts, strict=True):
        yield CacheRows(own_table, own_lens, narrow(len(row)), slice(begin, begin + len(own_lens)))
        begin += len(own_lens)


def cut_context(
    chunks: Array, cached: Array, table: Array, policy: ContextPolicy, device: torch.device
) -> Iterator[ContextPiece]:
    """Cut the context of rows with `chunks` new and `cached` old tokens into pieces of at most `policy.workspace`
    tokens, each beginning at a multiple of N in its row. Shards' lengths differ by one; every rank sends as many as the
    longest, rank 0's. The one row too many lies in a block that the request owns, and no index points at it."""
    layout, n = policy.layout, policy.layout.size
    begins = offsets(-(-cached // n) * n)  # of the rows, each padded to a multiple of N
    step = max(policy.workspace // n, 1) * n
    for first in range(0, int(begins[-1]), step):
        start = np.clip(first - begins[:-1], 0, cached)  # [start, end) of each row is in this piece
        end = np.clip(first + step - begins[:-1], 0, cached)
        some = np.flatnonzero(end > start)
        rows = np.arange(some[0], some[-1] + 1)  # one run; rows without context may lie between
        start, lens_k, lens_q = start[rows], (end - start)[rows], chunks[rows]
        shard_lens = layout.local_len(lens_k, 0)
        local = np.repeat(layout.local_slot(start), shard_lens) + ranges(shard_lens)
        offset = ranges(lens_k)
        arrays = {
            "slots": layout.cache_slot(table[np.repeat(rows, shard_lens), local // layout.block_size], local),
            "row": np.repeat(offsets(shard_lens)[:-1], lens_k) + layout.local_slot(offset),
            "owner": layout.owner_of(offset),
            "cu_q": offsets(lens_q),
            "cu_k": offsets(lens_k),
        }
        t = upload(arrays, device)
        varlen = Varlen(t.pop("cu_q"), t.pop("cu_k"), lens_q.tolist(), lens_k.tolist(), causal=False)
        token = int(chunks[: rows[0]].sum())
        yield ContextPiece(tokens=slice(token, token + int(lens_q.sum())), varlen=varlen, **t)


def offsets(lengths: Array) -> Array:
    """[0, l0, l0 + l1, …]: where each of the packed sequences begins, and the end."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])


def ranges(lengths: Array) -> Array:
    """[0 … l0 - 1, 0 … l1 - 1, …]."""
    return np.arange(lengths.sum()) - np.repeat(offsets(lengths)[:-1], lengths)
