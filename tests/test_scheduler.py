"""The scheduler and the engine under random load: no block and no request is lost."""

from __future__ import annotations

import random
from collections import deque
from unittest import mock

import pytest
from checkpoints import Oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from minidcp import EngineConfig, SamplingParams
from minidcp.batch import MAX_SCORED_TOKENS
from minidcp.engine.drafter import Drafter
from minidcp.engine.engine import LLMEngine
from minidcp.engine.proposers import Predictions, PromptLookup
from minidcp.engine.scheduler import GROWTH, ScheduledStep, Scheduler
from minidcp.kv_cache.block_manager import BlockManager
from minidcp.request import FinishReason, Request


def check_blocks(blocks: BlockManager, requests: list[Request]) -> None:
    assert len(blocks.free) + len(blocks.cached) + len(blocks.live) == blocks.num_blocks
    held = [b for r in requests for b in r.blocks]
    assert len(blocks.live) == len(set(held))
    for block in set(held):
        assert blocks.live[block] == held.count(block)


REFUSED = 10**6  # what a refused draft leaves in the cache


class Guesser(Drafter):
    """Drafts random numbers of tokens, right ones mostly."""

    def __init__(self, seed: int, most: int, max_tokens: int, num_predicted: int) -> None:
        proposer = Predictions(num_predicted) if num_predicted > 0 else PromptLookup(1, 1)
        super().__init__(proposer, most, max_tokens)
        self.random = random.Random(seed)

    def propose(self, decoding: list[Request]) -> dict[str, list[int]]:
        proposals = {}
        room = self.max_tokens - len(decoding)
        for request in decoding:
            num_unknown = request.num_in_flight
            left = request.max_tokens - request.num_outputs - num_unknown - 1
            count = self.random.randint(0, max(0, min(self.most, left, room)))
            room -= count
            # What the model will say is known here, even behind what is in flight.
            drafts = solo(request.tokens, num_unknown + count)[num_unknown:]
            for place in range(count):
                if self.random.random() < 0.3:
                    drafts[place] += 1
            if drafts:
                proposals[request.request_id] = drafts
        return proposals


class FakeWorkers:
    """Executes plans with dictionaries: a rank must be able to do this from the plans alone."""

    def __init__(self, num_predicted: int) -> None:
        self.num_predicted = num_predicted
        self.tables: dict[tuple[int, int], int] = {}
        self.cache: dict[tuple[int, int], int] = {}  # (block, offset) -> token
        self.last: dict[int, int] = {}

    def execute(self, plan, tokens_per_block: int) -> list[int]:
        for slot, index, block in plan.new_blocks:
            self.tables[slot, index] = block
        tokens = deque(plan.tokens)
        drafts = deque(plan.drafts)
        room = deque(plan.room)
        followers = deque(plan.followers)
        outputs = []

        def place(slot: int, position: int) -> tuple[int, int]:
            block = self.tables[slot, position // tokens_per_block]
            return block, position % tokens_per_block

        for row, (slot, start, length) in enumerate(
            zip(plan.slots, plan.starts, plan.lengths, strict=True)
        ):
            is_decoding = row < plan.num_decode
            for pos in range(start, start + length):
                if not is_decoding:
                    self.cache[place(slot, pos)] = tokens.popleft()
                else:
                    token = self.last[slot] if pos == start else drafts.popleft()
                    self.cache[place(slot, pos)] = token

            # "The model": a token that depends on all tokens that the block table points to.
            num_sampled = plan.sampling.count(row)
            assert num_sampled == (length if is_decoding else num_sampled) and num_sampled < 99
            counts = True
            for end in range(start + length - num_sampled + 1, start + length + 1):
                token = next_token([self.cache[place(slot, p)] for p in range(end)])
                outputs.append(token)
                if counts:
                    self.last[slot] = token
                else:
                    self.cache[place(slot, end - 1)] = REFUSED  # nobody may read it
                counts = counts and end < start + length
                counts = counts and self.cache[place(slot, end)] == token

            if self.num_predicted == 0:
                continue
            if not is_decoding:
                # Of a prompt all is known. Outputs that are computed again are the model's own.
                follower = followers.popleft()
                known = [self.cache[place(slot, p)] for p in range(start + length)]
                assert (follower < 0) == (num_sampled > 0)
                assert follower in (-1, len(known) // 7, next_token(known))
            if num_sampled > 0:
                # Their own drafts are stored as well, as far as there is room.
                end = min(room.popleft(), start + length + self.num_predicted - 1)
                for pos in range(start + length, end):
                    self.cache[place(slot, pos)] = REFUSED
        assert not tokens and not drafts and not room and not followers
        return outputs


def next_token(context: list[int]) -> int:
    value = 17
    for token in context:
        value = (value * 31 + token) % 1009
    return value


def solo(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@st.composite
def loads(draw: st.DrawFn) -> list[tuple[int, int, int, int | None]]:
    """Requests of at most 30 tokens: (arrival, prompt length, max_tokens, abort or None)."""
    arrival = st.tuples(
        st.integers(0, 30), st.integers(1, 20), st.integers(1, 10), st.none() | st.integers(0, 60)
    )
    return draw(st.lists(arrival, min_size=1, max_size=8))


@settings(deadline=None, max_examples=200)
@given(
    loads(),
    st.integers(1, 5),
    st.integers(0, 6),
    st.booleans(),
    st.integers(1, 4),
    st.integers(4, 12),
    st.booleans(),
    st.integers(0, 12),
    st.integers(0, 4),
    st.booleans(),
)
def test_every_output_equals_its_solo_run(
    load: list[tuple[int, int, int, int | None]],
    tokens_per_block: int,
    spare_blocks: int,
    prefix_cache: bool,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    mixed_steps: bool,
    growth: int,
    most_drafts: int,
    predicts: bool,
) -> None:
    """Random arrivals, lengths, prefixes, aborts and drafts; too few blocks and late results."""
    with mock.patch("minidcp.engine.scheduler.GROWTH", growth):
        blocks = BlockManager(
            -(-30 // tokens_per_block) + spare_blocks, tokens_per_block, prefix_cache
        )
        drafter = None
        num_predicted = most_drafts if predicts else 0
        if most_drafts > 0:
            drafter = Guesser(growth, most_drafts, max_num_batched_tokens, num_predicted)
        scheduler = Scheduler(blocks, max_num_seqs, max_num_batched_tokens, mixed_steps, drafter)
        workers = FakeWorkers(num_predicted)
        # Many prompts have a common prefix.
        requests = [
            Request(str(i), [t // 7 for t in range(length)], SamplingParams(), max_tokens, seed=0)
            for i, (_, length, max_tokens, _) in enumerate(load)
        ]
        in_flight: deque[tuple[ScheduledStep, list[int]]] = deque()
        now = 0
        while now <= 60 or scheduler.waiting or scheduler.running or in_flight:
            for request, (arrival, _, _, abort) in zip(requests, load, strict=True):
                if arrival == now:
                    scheduler.add(request)
                if abort == now and arrival <= now and request.finish_reason is None:
                    scheduler.finish(request, FinishReason.ABORT)
            planned = scheduler.schedule()
            if planned is not None:
                assert sum(planned.plan.lengths) <= scheduler.budget
                in_flight.append((planned, workers.execute(planned.plan, tokens_per_block)))
            if in_flight and (planned is None or len(in_flight) > 1):
                step, tokens = in_flight.popleft()
                for request, *_ in scheduler.update(step, tokens):
                    if request.finish_reason is None and request.num_outputs == request.max_tokens:
                        scheduler.finish(request, FinishReason.LENGTH)
            check_blocks(blocks, requests)
            now += 1
            assert now < 1000, "a request starves"
        for request in requests:
            outputs = request.tokens[len(request.prompt_token_ids) :]
            assert outputs == solo(request.prompt_token_ids, len(outputs))
            assert request.finish_reason is FinishReason.ABORT or len(outputs) == request.max_tokens
        assert len(blocks.live) == 0


@pytest.mark.parametrize("dcp", [1, 4])
@pytest.mark.usefixtures("crowded")
def test_engine_with_hundreds_of_requests_and_aborts(v2: Oracle, dcp: int) -> None:
    """With real ranks: blocks are checked after every step, outputs against the oracle's."""
    rng = random.Random(0)
    engine = LLMEngine(
        EngineConfig(
            str(v2.path),
            tp_size=dcp,
            dcp_size=dcp,
            ranks="threads",
            device="cpu",
            max_model_len=512,
            num_blocks=520 // (4 * dcp),
            block_size=4,
            max_num_seqs=8,
            max_num_batched_tokens=64,
        )
    )
    outputs: dict[str, list[int]] = {}
    finished: set[str] = set()
    aborted: set[str] = set()
    left, live = 300, {}
    while left or engine.has_work:
        while left and len(live) < 20 and rng.random() < 0.7:
            left -= 1
            request_id = str(left)
            which = rng.randrange(len(v2.prompts))
            params = SamplingParams(max_tokens=rng.randint(1, 16), temperature=0.0, ignore_eos=True)
            live[request_id] = (
                which,
                params.max_tokens,
                engine.add_request(request_id, v2.prompts[which], params),
            )
            outputs[request_id] = []
        if live and rng.random() < 0.1:
            request_id = rng.choice(sorted(live))
            engine.abort(request_id)
            aborted.add(request_id)
            del live[request_id]
        for delta in engine.step():
            assert delta.request_id in live, "an aborted request still gets tokens"
            which, max_tokens, _ = live[delta.request_id]
            tokens = outputs[delta.request_id]
            tokens += delta.token_ids
            assert tokens == v2.tokens[which][: len(tokens)]
            if delta.finish_reason is not None:
                assert len(tokens) == max_tokens
                finished.add(delta.request_id)
                del live[delta.request_id]
        check_blocks(engine.blocks, [entry[2] for entry in live.values()])
    engine.close()
    assert len(finished) + len(aborted) == 300 and len(aborted) > 10
    assert len(engine.blocks.live) == 0
    assert engine.scheduler.num_preemptions > 0


def test_whoever_is_admitted_leaves_room_to_grow() -> None:
    """The second request waits while there is no room for the first to grow by GROWTH tokens.

    If the first one will not grow, the second runs.
    """
    size, prompt = 16, [5] * 190

    def count_running(max_tokens: int, num_blocks: int) -> int:
        blocks = BlockManager(num_blocks, size, prefix_cache=False)  # equal prompts would share
        scheduler = Scheduler(blocks, max_num_seqs=4, budget=8192)
        for i in range(2):
            scheduler.add(Request(str(i), prompt, SamplingParams(), max_tokens, seed=0))
        assert scheduler.schedule() is not None
        return len(scheduler.running)

    held = len(prompt) // size + 1
    assert count_running(160, 2 * held + GROWTH // size) == 2
    assert count_running(160, 2 * held + GROWTH // size - 1) == 1
    assert count_running(1, 2 * held) == 2
    assert count_running(160, held) == 1  # a single request needs only its own room


@pytest.mark.parametrize("num_predicted", [0, 3])
def test_nobody_is_preempted_for_drafts(num_predicted: int) -> None:
    """The last free block is for a token of the younger request, not for the older one's drafts."""
    blocks = BlockManager(5, 4, prefix_cache=False)
    scheduler = Scheduler(blocks, max_num_seqs=2, budget=64)
    for request_id, length in ("older", 5), ("younger", 7):
        scheduler.add(Request(request_id, [5] * length, SamplingParams(), 10, seed=0))
    with mock.patch("minidcp.engine.scheduler.GROWTH", 0):
        for _ in range(2):
            step = scheduler.schedule()
            assert step is not None
            scheduler.update(step, [7] * len(step.plan.sampling))

    drafter = mock.Mock()
    drafter.propose.return_value = {"older": [7, 7, 7]}
    scheduler.drafter = drafter
    scheduler.num_predicted = num_predicted
    step = scheduler.schedule()
    assert step is not None
    assert scheduler.num_preemptions == 0
    assert step.plan.starts == [6, 8] and step.plan.lengths == [2, 1]
    assert blocks.num_available == 0


def test_nobody_is_preempted_for_room_that_drafts_were_given() -> None:
    """One request got three blocks, where it needs one, for drafts that its ranks make."""
    scheduler = Scheduler(BlockManager(5, 4, prefix_cache=False), max_num_seqs=2, budget=64)
    scheduler.drafter = mock.Mock()
    scheduler.drafter.propose.return_value = {}
    scheduler.num_predicted = 9
    for request_id, length in ("older", 1), ("younger", 7):
        scheduler.add(Request(request_id, [5] * length, SamplingParams(), 20, seed=0))
    with mock.patch("minidcp.engine.scheduler.GROWTH", 0):
        for _ in range(3):
            step = scheduler.schedule()
            assert step is not None
            scheduler.update(step, [7] * len(step.plan.sampling))
    assert step.plan.starts == [2, 8]
    assert scheduler.num_preemptions == 0


def test_scored_prompts_share_a_steps_logits() -> None:
    """Logits are large, so a step has few of them, however many requests want prompt_logprobs."""
    scheduler = Scheduler(BlockManager(400, 16), max_num_seqs=32, budget=8192)
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    requests = [Request(str(i), [5] * 200, params, 1, seed=0) for i in range(20)]
    for request in requests:
        scheduler.add(request)
    scored: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while (step := scheduler.schedule()) is not None:
        assert len(step.plan.scored) <= MAX_SCORED_TOKENS
        assert len(step.requests) <= 3  # no context is gathered for only a token or two
        for row, back, known in step.plan.scored:
            assert known == 5
            scored[step.requests[row].request_id].append(
                step.plan.starts[row] + step.plan.lengths[row] - back
            )
        for request, *_ in scheduler.update(step, [7] * len(step.plan.sampling)):
            scheduler.finish(request, FinishReason.LENGTH)
    assert all(positions == list(range(1, 200)) for positions in scored.values())
