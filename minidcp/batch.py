"""One step, in two forms. The scheduler makes a `StepPlan` of integers, the same for every rank.
Each rank turns it into a `ForwardBatch` of tensors; only there does it matter that ranks hold
different tokens. Next: `parallel/group.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minidcp.kv_cache.interleave import Interleave
from minidcp.request import Request, SamplingParams, TokenLogprobs

Array = NDArray[np.int64]

# Three words that are easy to mix up. A row is what one request computes in a step. A slot, or
# request slot, is the number of a running request. A cache row is where a token lies in a rank's
# cache.

# Attention over some tokens: outputs [T, H, D], and the log-sum-exps of their scores [T, H].
OutAndLse = tuple[Tensor, Tensor]

# Tells whether that many queries are exchanged narrow; see `parallel/exchange.py`.
ExchangesNarrow = Callable[[int], bool]

# How many prompt tokens of one step can have their log-probabilities taken: logits are large.
MAX_SCORED_TOKENS = 256


@dataclass(frozen=True)
class Admission:
    """What the workers must know about a request from its first step on.

    A request slot is a number below max_num_seqs that a running request owns. The workers keep
    what they know about a request by its slot: block table, last token, sampling parameters.
    """

    slot: int
    params: SamplingParams
    seed: int = 0
    num_prompt: int = 0
    stop_ids: tuple[int, ...] = ()  # tokens that may not be chosen before params.min_tokens
    history: tuple[int, ...] = ()  # prompt and output so far, if penalties count them

    @classmethod
    def describe(cls, request: Request) -> "Admission":
        has_grammar = request.params.structured_outputs is not None
        return cls(
            slot=request.slot,
            params=request.params.without_grammar(),
            seed=request.seed,
            num_prompt=len(request.prompt_token_ids),
            stop_ids=() if has_grammar else request.stop_ids,  # else masks rule them out
            history=tuple(request.tokens) if request.params.has_penalties else (),
        )


class ScoredToken(NamedTuple):
    """A prompt token whose log-probability is wanted, given the tokens before it.

    It takes the logits of the token `tokens_before_last` places before the last one of row `row`.
    """

    row: int
    tokens_before_last: int
    next_token: int  # the token that is scored


@dataclass
class StepPlan:
    """One step in integers. For a step, nothing else crosses from the driver to the ranks.

    Row i computes positions [starts[i], starts[i] + lengths[i]) of the request in slot slots[i].
    Rows [0, num_decode) decode, the rows after them prefill a chunk. The first token of a decode
    row is the one that was sampled last for its slot. Perhaps only the workers know it so far. It
    may be followed by drafts, which are proposals for the next tokens; see `worker/drafts.py`. The
    tokens of the prefill rows are in `tokens`, one row after the other. A prefill row may begin
    after tokens that a row before it computes in the same step, in blocks that both have.
    """

    num_decode: int = 0
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, index, block id)
    admitted: list[Admission] = field(default_factory=list)
    # Of the decode rows, one after the other. A draft that the ranks have made themselves is -2 for
    # a request's first one, -3 for its second: see ForwardBatch.decode_tokens.
    drafts: list[int] = field(default_factory=list)
    # Rows after whose last token one is sampled. A row with drafts is there once for each of its
    # tokens: a token is sampled after each.
    sampling: list[int] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    # By index in `sampling`: which tokens may be sampled, bit i % 8 of byte i // 8 for token i.
    # That is 12,800 bytes with a vocabulary of 102,400. Only rank 0 gets them; the other ranks get
    # empty ones.
    masks: dict[int, bytes] = field(default_factory=dict)
    # What ranks must know to make drafts (`worker/predictor.py`); else empty. The token after each
    # prefill row, -1 where this step samples it. For each row in `sampling`, once: how many tokens
    # its blocks have room for.
    followers: list[int] = field(default_factory=list)
    room: list[int] = field(default_factory=list)

    @property
    def num_decode_tokens(self) -> int:
        return self.num_decode + len(self.drafts)

    @property
    def num_tokens(self) -> int:
        return self.num_decode_tokens + len(self.tokens)

    @property
    def sampled_positions(self) -> Array:
        """The positions that the sampled tokens get, in the order of `sampling`."""
        rows = np.array(self.sampling, dtype=np.int64)
        ends = np.array(self.starts, dtype=np.int64) + np.array(self.lengths, dtype=np.int64)
        return ends[rows] - count_later_entries(rows)

    def without_bits(self) -> "StepPlan":
        """The plan for ranks other than 0, which need not know what a mask allows."""
        return replace(self, masks=dict.fromkeys(self.masks, b""))


@dataclass(frozen=True)
class StepResult:
    """What rank 0 reports about a step: one token per entry of `StepPlan.sampling`."""

    tokens: list[int]
    # One entry per sampled token and then one per scored token; None if the step wanted none.
    logprobs: list[TokenLogprobs | None] | None = None
    seconds: float = 0.0  # time of the step on rank 0, without waiting for it to begin
    received_bytes: int = 0  # received by rank 0 from other ranks since the start
    drafts: list[int] | None = None  # those of the plan, where the ranks had made them


class BlockTables:
    """Block ids by request slot, on the host: [max_num_seqs, width]. Every plan updates them."""

    def __init__(self, max_num_seqs: int, width: int) -> None:
        self.table: Array = np.zeros((max_num_seqs, width), dtype=np.int64)

    def update(self, plan: StepPlan) -> None:
        if not plan.new_blocks:
            return
        slot, index, block = np.array(plan.new_blocks, dtype=np.int64).T
        self.table[slot, index] = block

    def find_cache_rows(
        self, slots: Array, positions: Array, layout: Interleave, rank: int
    ) -> Array:
        """Cache rows of rank `rank` for these positions of the requests in `slots`.

        The result is -1 where another rank stores the token.
        """
        local_slots = layout.local_slot(positions)
        blocks = self.table[slots, local_slots // layout.block_size]
        cache_rows = layout.cache_row(blocks, local_slots)
        is_own = layout.owner_of(positions) == rank
        return np.where(is_own, cache_rows, -1)


@dataclass(frozen=True)
class Varlen:
    """Packed sequences: sequence i is q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]], and likewise k."""

    cu_seqlens_q: Tensor  # [B + 1] int32
    cu_seqlens_k: Tensor  # [B + 1] int32
    lens_q: list[int]  # [B], on the host
    lens_k: list[int]
    causal: bool

    @classmethod
    def among_themselves(cls, cu_seqlens: Tensor, lens: list[int]) -> "Varlen":
        """Sequences of `lens` tokens, each of which sees the tokens before it and itself."""
        return cls(cu_seqlens, cu_seqlens, lens, lens, causal=True)


@dataclass
class CacheQueries:
    """B absorbed queries over this rank's shard of the cache.

    Query i sees the first local_lens[i] tokens in the blocks block_table[i].
    """

    block_table: Tensor  # [B, W] int32
    local_lens: Tensor  # [B] int32
    host_lens: Array  # [B] local_lens, on the host
    narrow: bool  # how the queries and their results cross to other ranks
    tokens: slice | None = None  # which tokens of the prefill rows these are; None: decode rows
    is_replayed: bool = False  # inputs of a CUDA graph, which change before each replay
    planned: object = None  # what the attention back-end's `plan` made for these
    prepared: object = None  # what its `prepare` made for these


@dataclass(frozen=True)
class ContextPiece:
    """A piece of the prefill rows' cached context, gathered from all ranks at once.

    Every rank sends its cache rows `cache_rows`. Each sends equally many, so the last one of a
    request may be unused. Token j of the packed piece is the one that rank owner[j] sent at place
    sent_index[j]. The prefill rows' tokens in `tokens` see the piece. `varlen` says which of these
    tokens see which part of it.
    """

    cache_rows: Tensor  # [S] int32
    sent_index: Tensor  # [P] int32
    owner: Tensor  # [P] int32
    tokens: slice
    varlen: Varlen


@dataclass(frozen=True)
class ForwardBatch:
    """The tensors of one step on one rank; all but `logits` are int32. T tokens, the decode rows
    first."""

    num_decode_tokens: int  # D, with drafts
    prefill_tokens: Tensor  # [T - D]
    positions: Tensor  # [T]
    slot_mapping: Tensor  # [T] this rank's cache row (vLLM's name), -1 where another rank stores it
    decode_slots: Tensor  # [D] the request slots of the decode rows' tokens
    # [S + K] tokens whose logits are needed: after S of them a token is sampled, K are for scoring.
    sample_index: Tensor | slice
    sample_slots: Tensor  # [S] the request slots that get a token
    # [D] the tokens of the decode rows: token ids, or what the ranks remember of the slot: -1 is
    # the token that was sampled last, -2 the first draft behind it, and so on. None: all are -1.
    decode_tokens: Tensor | None = None
    decode: CacheQueries | None = None
    prefill: Varlen | None = None  # the new tokens among themselves
    context: Sequence[CacheQueries | ContextPiece] = ()  # what the new tokens find in the cache
    logits: Tensor | None = None  # [S + K, V / tp] where this rank's go; None: into new memory

    @property
    def cache_queries(self) -> list[CacheQueries]:
        """All queries that meet the cache where it lies."""
        pieces = (self.decode, *self.context)
        return [piece for piece in pieces if isinstance(piece, CacheQueries)]

    @classmethod
    def build(
        cls,
        plan: StepPlan,
        tables: BlockTables,
        layout: Interleave,
        rank: int,
        exchanges_narrow: ExchangesNarrow,
        device: torch.device,
        context: Sequence[CacheQueries | ContextPiece] = (),
    ) -> "ForwardBatch":
        """The batch of DCP rank `rank`. `context` comes from `attention/context.py`."""
        num_decode_tokens = plan.num_decode_tokens
        lengths = np.array(plan.lengths, dtype=np.int64)
        slots = np.repeat(np.array(plan.slots, dtype=np.int64), lengths)  # by token
        positions = find_positions(plan)

        arrays = {
            "prefill_tokens": np.array(plan.tokens, dtype=np.int64),
            "positions": positions,
            "slot_mapping": tables.find_cache_rows(slots, positions, layout, rank),
            "decode_slots": slots[:num_decode_tokens],
            "sample_index": find_wanted_tokens(plan, np.cumsum(lengths)),
            "sample_slots": np.array([plan.slots[row] for row in plan.sampling], dtype=np.int64),
        }
        if num_decode_tokens > 0:
            decode_positions = positions[:num_decode_tokens]
            width = layout.num_blocks(int(decode_positions.max()) + 1)
            arrays["block_table"] = tables.table[slots[:num_decode_tokens], :width]
            arrays["local_lens"] = layout.local_len(decode_positions + 1, rank)
        if plan.drafts:
            arrays["decode_tokens"] = list_decode_tokens(plan)
        chunk_lens = lengths[plan.num_decode :]
        if len(chunk_lens) > 0:
            arrays["cu_seqlens"] = offsets(chunk_lens)

        tensors = upload(arrays, device)
        decode = None
        if num_decode_tokens > 0:
            narrow = exchanges_narrow(num_decode_tokens)
            decode = CacheQueries(
                block_table=tensors["block_table"],
                local_lens=tensors["local_lens"],
                host_lens=arrays["local_lens"],
                narrow=narrow,
            )
        prefill = None
        if len(chunk_lens) > 0:
            prefill = Varlen.among_themselves(tensors["cu_seqlens"], chunk_lens.tolist())
        return cls(
            num_decode_tokens=num_decode_tokens,
            prefill_tokens=tensors["prefill_tokens"],
            positions=tensors["positions"],
            slot_mapping=tensors["slot_mapping"],
            decode_slots=tensors["decode_slots"],
            sample_index=tensors["sample_index"],
            sample_slots=tensors["sample_slots"],
            decode_tokens=tensors.get("decode_tokens"),
            decode=decode,
            prefill=prefill,
            context=context,
        )


def find_wanted_tokens(plan: StepPlan, row_ends: Array) -> Array:
    """Which tokens of the step have their logits taken: [S + K], those for sampling first.

    row_ends[i] is the number of the token after row i's last one.
    """
    sampling = np.array(plan.sampling, dtype=np.int64)
    sampled_tokens = row_ends[sampling] - 1 - count_later_entries(sampling)
    scored = np.array(plan.scored, dtype=np.int64).reshape(-1, 3)
    row, tokens_before_last, _ = scored.T
    scored_tokens = row_ends[row] - 1 - tokens_before_last
    return np.concatenate([sampled_tokens, scored_tokens])


def count_later_entries(rows: Array) -> Array:
    """How many entries of the same row come after each entry of `rows`, which never falls."""
    return np.searchsorted(rows, rows, side="right") - 1 - np.arange(len(rows))


def find_positions(plan: StepPlan) -> Array:
    """The position of each token of the step."""
    starts = np.array(plan.starts, dtype=np.int64)
    lengths = np.array(plan.lengths, dtype=np.int64)
    return np.repeat(starts, lengths) + ranges(lengths)


def list_decode_tokens(plan: StepPlan) -> Array:
    """The tokens of the decode rows, as ForwardBatch.decode_tokens has them."""
    lengths = np.array(plan.lengths[: plan.num_decode], dtype=np.int64)
    is_draft = ranges(lengths) > 0
    tokens = np.full(len(is_draft), -1, dtype=np.int64)
    tokens[is_draft] = plan.drafts
    return tokens


def upload(arrays: dict[str, Array], device: torch.device) -> dict[str, Tensor]:
    """The arrays as int32 tensors on the device, in one copy that the host does not wait for."""
    flat = np.concatenate([array.ravel() for array in arrays.values()])
    packed = torch.from_numpy(flat.astype(np.int32))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)

    parts = packed.split([array.size for array in arrays.values()])
    return {
        name: part.view(array.shape)
        for (name, array), part in zip(arrays.items(), parts, strict=True)
    }


def offsets(lengths: Array) -> Array:
    """[0, l0, l0 + l1, …]: where each of the packed sequences begins, and where the last ends."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])


def ranges(lengths: Array) -> Array:
    """[0 … l0 - 1, 0 … l1 - 1, …]."""
    return np.arange(lengths.sum()) - np.repeat(offsets(lengths)[:-1], lengths)
