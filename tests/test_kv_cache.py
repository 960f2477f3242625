"""Interleave, block tables and the block manager against brute force."""

from __future__ import annotations

import numpy as np
import torch
from checkpoints import STYLES
from hypothesis import given, settings
from hypothesis import strategies as st

from minidcp.attention.context import ContextPolicy
from minidcp.batch import BlockTables, CacheQueries, ForwardBatch, StepPlan
from minidcp.kv_cache.block_manager import BlockManager
from minidcp.kv_cache.interleave import Interleave
from minidcp.model_config import ModelConfig

CONFIG = ModelConfig.from_dict(STYLES["v2"] | {"model_type": "deepseek_v2"})
layouts = st.builds(Interleave, st.integers(1, 9), st.sampled_from([1, 2, 4, 8, 16]))


@given(layouts, st.integers(0, 300))
def test_interleave_is_a_round_robin(layout: Interleave, seq_len: int) -> None:
    shards: list[list[int]] = [[] for _ in range(layout.size)]
    for pos in range(seq_len):
        shard = shards[pos % layout.size]
        assert layout.owner_of(pos) == pos % layout.size
        assert layout.local_slot(pos) == len(shard)
        # All ranks use the same block table.
        assert pos // layout.tokens_per_block == len(shard) // layout.block_size
        shard.append(pos)
    assert [layout.local_len(seq_len, r) for r in range(layout.size)] == [len(s) for s in shards]
    blocks = {pos // layout.tokens_per_block for pos in range(seq_len)}
    assert layout.num_blocks(seq_len) == len(blocks)


@given(layouts, st.integers(0, 300), st.integers(0, 8))
def test_interleave_of_arrays(layout: Interleave, seq_len: int, rank: int) -> None:
    positions = np.arange(seq_len)
    assert layout.owner_of(positions).tolist() == [layout.owner_of(p) for p in range(seq_len)]
    assert layout.local_slot(positions).tolist() == [layout.local_slot(p) for p in range(seq_len)]
    lens = layout.local_len(positions, rank % layout.size)
    assert lens.tolist() == [layout.local_len(p, rank % layout.size) for p in range(seq_len)]


@st.composite
def steps(draw: st.DrawFn) -> tuple[Interleave, StepPlan, np.ndarray]:
    """Decode rows and prefill chunks of requests with randomly scattered blocks."""
    layout = draw(layouts)
    rows = draw(
        st.lists(
            st.tuples(st.just(0) | st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=5
        )
    )
    num_decode = draw(st.integers(0, len(rows)))
    plan = StepPlan(num_decode=num_decode)
    width = layout.num_blocks(120)
    ids = draw(st.permutations(range(width * len(rows))))
    table = np.array(ids).reshape(len(rows), width)
    for slot, (start, length) in enumerate(rows):
        plan.slots.append(slot)
        plan.starts.append(start)
        plan.lengths.append(1 if slot < num_decode else length)
        plan.new_blocks += [(slot, i, int(block)) for i, block in enumerate(table[slot])]
        if slot >= num_decode:
            plan.tokens += range(100 * slot, 100 * slot + length)
    plan.sampling = list(range(len(rows)))
    return layout, plan, table


@settings(deadline=None)
@given(steps(), st.sampled_from(["gather_kv", "gather_q"]), st.integers(1, 40))
def test_forward_batch(
    case: tuple[Interleave, StepPlan, np.ndarray], strategy: str, workspace: int
) -> None:
    """Write the number of each token where the batch says, then read it as attention does."""
    layout, plan, table = case
    n, d = layout.size, plan.num_decode
    batches, caches = [], []
    for rank in range(n):
        tables = BlockTables(len(plan.slots), table.shape[1])
        tables.update(plan)
        policy = ContextPolicy(CONFIG, 4, layout, strategy, workspace, workspace)
        cpu = torch.device("cpu")
        context = policy.build_context(plan, tables, rank, lambda _: False, cpu)
        batch = ForwardBatch.build(plan, tables, layout, rank, lambda _: False, cpu, context)
        cache = torch.full((table.size * layout.block_size,), -1)
        for slot, start in zip(plan.slots, plan.starts, strict=True):  # written by earlier steps
            for pos in range(start):
                if pos % n == rank:
                    local = pos // n
                    block = table[slot, local // layout.block_size]
                    cache[block * layout.block_size + local % layout.block_size] = 1000 * slot + pos
        batches.append(batch)
        caches.append(cache)

    expected = [
        (slot, start + i)
        for slot, start, length in zip(plan.slots, plan.starts, plan.lengths, strict=True)
        for i in range(length)
    ]
    for i, (slot, pos) in enumerate(expected):
        owners = [r for r in range(n) if batches[r].slot_mapping[i] >= 0]
        assert owners == [pos % n]
        where = batches[owners[0]].slot_mapping[i]
        assert caches[owners[0]][where.item()] == -1, "a cached token would be overwritten"
        caches[owners[0]][where.item()] = 1000 * slot + pos
    assert batches[0].positions.tolist() == [pos for _, pos in expected]
    assert batches[0].prefill_tokens.tolist() == plan.tokens

    for row in range(d):
        seen = []
        for batch, cache in zip(batches, caches, strict=True):
            seen += read_rows(batch.decode, row, cache, layout)
        slot, start = plan.slots[row], plan.starts[row]
        assert sorted(seen) == [1000 * slot + pos for pos in range(start + 1)]

    # What each new token finds in the cache, with either strategy.
    found: list[list[int]] = [[] for _ in plan.tokens]
    for k, piece in enumerate(batches[0].context):
        if isinstance(piece, CacheQueries):
            for batch, cache in zip(batches, caches, strict=True):
                for i, tokens in enumerate(found[piece.tokens]):
                    tokens += read_rows(batch.context[k], i, cache, layout)
        else:
            shards = [
                cache[b.context[k].cache_rows] for b, cache in zip(batches, caches, strict=True)
            ]
            packed = torch.stack(shards, 1)[piece.sent_index, piece.owner]
            assert len(packed) == sum(piece.varlen.lens_k) <= max(workspace, n)
            sees = iter(found[piece.tokens])
            for count, keys in zip(
                piece.varlen.lens_q, packed.split(piece.varlen.lens_k), strict=True
            ):
                for _ in range(count):
                    next(sees).extend(keys.tolist())
            assert next(sees, None) is None
    wanted = [
        [1000 * slot + pos for pos in range(start)]
        for slot, start, length in list(zip(plan.slots, plan.starts, plan.lengths, strict=True))[d:]
        for _ in range(length)
    ]
    assert [sorted(tokens) for tokens in found] == wanted


def read_rows(rows: CacheQueries, row: int, cache: torch.Tensor, layout: Interleave) -> list[int]:
    blocks = cache.view(-1, layout.block_size)[rows.block_table[row].long()].flatten()
    return blocks[: rows.local_lens[row]].tolist()


@settings(deadline=None)
@given(st.data())
def test_block_manager_against_a_model(data: st.DataObject) -> None:
    """Random operations, compared with a plain dictionary of owners."""
    total, size = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    manager = BlockManager(total, size, prefix_cache=True)
    held: list[tuple[list[int], list[int]]] = []  # (tokens, blocks)
    content: dict[int, list[int]] = {}  # block -> all tokens up to its end
    for _ in range(data.draw(st.integers(1, 30))):
        if held and data.draw(st.booleans()):
            _, blocks = held.pop(data.draw(st.integers(0, len(held) - 1)))
            manager.release(blocks)
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=8))
            hashes: list[bytes] = []
            manager.hash_blocks(tokens, hashes, len(tokens))
            shared = manager.share(hashes)
            for i, block in enumerate(shared):
                assert content[block] == tokens[: (i + 1) * size], "a wrong prefix was found"
            needed = -(-len(tokens) // size) - len(shared)
            before = manager.num_available
            fresh = manager.allocate(needed)
            assert (fresh is None) == (needed > before)
            if fresh is None:
                manager.release(shared)
            else:
                blocks = shared + fresh
                for i, block in enumerate(blocks):
                    content[block] = tokens[: (i + 1) * size]
                held.append((tokens, blocks))
                manager.publish(blocks[: len(hashes)], hashes)
        live = {block for _, blocks in held for block in blocks}
        assert len(manager.live) == len(live)
        assert len(manager.free) + len(manager.cached) + len(manager.live) == total
        assert not live & (set(manager.free) | set(manager.cached))


def test_eviction_takes_the_least_recently_used_end_first() -> None:
    manager = BlockManager(4, 1)
    old, new = [1, 2], [3, 4]
    for tokens in (old, new):
        hashes: list[bytes] = []
        manager.hash_blocks(tokens, hashes, 2)
        blocks = manager.allocate(2)
        manager.publish(blocks, hashes)
        manager.release(blocks)
    assert len(manager.cached) == 4
    manager.allocate(1)
    for tokens, found in ((old, 1), (new, 2)):
        hashes = []
        manager.hash_blocks(tokens, hashes, 2)
        assert len(manager.share(hashes)) == found
