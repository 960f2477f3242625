"""Equal prompts that arrive together are computed once; cache salts keep requests apart."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from unittest import mock

import pytest
from checkpoints import Oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import check_blocks, next_token, solo

from minidcp import LLM, EngineConfig, SamplingParams
from minidcp.engine.engine import LLMEngine
from minidcp.engine.scheduler import ScheduledStep, Scheduler
from minidcp.kv_cache.block_manager import BlockManager
from minidcp.request import MAX_SALT_LENGTH, FinishReason, Request

MAX_LEN = 30
GREEDY = dict(temperature=0.0, ignore_eos=True)


class Workers:
    """Execute steps as ranks do: all chunks of a step are stored before any of them is read.

    A row may read only what was computed for its own tokens under its own salt.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self.tokens_per_block = tokens_per_block
        self.tables: dict[tuple[int, int], int] = {}
        self.cache: dict[tuple[int, int], tuple[int, str | None]] = {}
        self.last: dict[int, int] = {}

    def execute(self, step: ScheduledStep) -> list[int]:
        plan = step.plan
        for slot, index, block in plan.new_blocks:
            self.tables[slot, index] = block

        tokens = deque(plan.tokens)
        rows = range(len(plan.slots))
        contexts = {}
        for row in rows[: plan.num_decode]:
            self.store(step, row, [self.last[plan.slots[row]]])
            contexts[row] = self.read(step, row)
        for row in rows[plan.num_decode :]:
            self.store(step, row, [tokens.popleft() for _ in range(plan.lengths[row])])
        for row in rows[plan.num_decode :]:
            contexts[row] = self.read(step, row)

        outputs = [next_token(contexts[row]) for row in plan.sampling]
        for row, token in zip(plan.sampling, outputs, strict=True):
            self.last[plan.slots[row]] = token
        return outputs

    def locate(self, slot: int, position: int) -> tuple[int, int]:
        block = self.tables[slot, position // self.tokens_per_block]
        return block, position % self.tokens_per_block

    def store(self, step: ScheduledStep, row: int, tokens: list[int]) -> None:
        salt = step.requests[row].params.cache_salt
        for position, token in enumerate(tokens, start=step.plan.starts[row]):
            self.cache[self.locate(step.plan.slots[row], position)] = (token, salt)

    def read(self, step: ScheduledStep, row: int) -> list[int]:
        end = step.plan.starts[row] + step.plan.lengths[row]
        found = [self.cache[self.locate(step.plan.slots[row], p)] for p in range(end)]
        request = step.requests[row]
        assert {salt for _, salt in found} == {request.params.cache_salt}
        context = [token for token, _ in found]
        known = request.tokens[:end]
        assert context[: len(known)] == known
        return context


@dataclass
class Arrival:
    time: int
    length: int
    variant: int  # of the prompt's end
    max_tokens: int
    abort: int | None
    salt: str | None
    is_scored: bool
    group: str

    def make_request(self, number: int) -> Request:
        # No sampled token is one of these.
        prompt = [2000 + p // 7 + 100 * self.variant * (p > 10) for p in range(self.length)]
        params = SamplingParams(prompt_logprobs=0 if self.is_scored else None, cache_salt=self.salt)
        return Request(
            str(number), prompt, params, max_tokens=self.max_tokens, seed=0, group=self.group
        )


arrivals = st.builds(
    Arrival,
    time=st.integers(0, 20),
    length=st.integers(1, 20),
    variant=st.integers(0, 1),
    max_tokens=st.integers(1, 10),
    abort=st.none() | st.none() | st.integers(0, 40),
    salt=st.sampled_from([None, None, "a", "b"]),
    is_scored=st.sampled_from([False, False, False, True]),
    group=st.sampled_from("xyz"),
)


def run(scheduler: Scheduler, load: list[Arrival], requests: list[Request]) -> list[ScheduledStep]:
    """Plan each step before the tokens of the step before it are known; returns all steps."""
    blocks = scheduler.blocks
    workers = Workers(blocks.tokens_per_block)
    in_flight: deque[tuple[ScheduledStep, list[int]]] = deque()
    steps = []
    now = 0
    while now <= 40 or scheduler.waiting or scheduler.running or in_flight:
        for request, arrival in zip(requests, load, strict=True):
            if arrival.time == now:
                scheduler.add(request)
            is_known = arrival.time <= now and request.finish_reason is None
            if arrival.abort == now and is_known:
                scheduler.finish(request, FinishReason.ABORT)

        planned = scheduler.schedule()
        check_blocks(blocks, requests)
        if planned is not None:
            steps.append(planned)
            in_flight.append((planned, workers.execute(planned)))
        if in_flight and (planned is None or len(in_flight) > 1):
            step, tokens = in_flight.popleft()
            for request, *_ in scheduler.update(step, tokens):
                if request.finish_reason is None and request.num_outputs == request.max_tokens:
                    scheduler.finish(request, FinishReason.LENGTH)
        check_blocks(blocks, requests)
        now += 1
        assert now < 1000, "a request starves"
    return steps


@settings(deadline=None, max_examples=200)
@given(
    load=st.lists(arrivals, min_size=2, max_size=9),
    tokens_per_block=st.integers(1, 5),
    spare_blocks=st.integers(0, 8),
    prefix_cache=st.sampled_from([True, True, True, False]),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(5, 40),
    mixed_steps=st.booleans(),
    growth=st.integers(0, 12),
)
def test_nothing_is_lost_and_nobody_reads_what_is_not_there(
    load: list[Arrival],
    tokens_per_block: int,
    spare_blocks: int,
    prefix_cache: bool,
    max_num_seqs: int,
    budget: int,
    mixed_steps: bool,
    growth: int,
) -> None:
    """Equal beginnings, salts and groups, aborts while a prompt is computed, too few blocks."""
    with mock.patch("minidcp.engine.scheduler.GROWTH", growth):
        num_blocks = -(-MAX_LEN // tokens_per_block) + spare_blocks
        blocks = BlockManager(num_blocks, tokens_per_block, prefix_cache)
        requests = [arrival.make_request(i) for i, arrival in enumerate(load)]
        run(Scheduler(blocks, max_num_seqs, budget, mixed_steps), load, requests)
    assert not blocks.live
    for request in requests:
        outputs = request.tokens[len(request.prompt_token_ids) :]
        assert outputs == solo(request.prompt_token_ids, len(outputs))
        if request.finish_reason is not FinishReason.ABORT:
            assert len(outputs) == request.max_tokens


@settings(deadline=None, max_examples=200)
@given(
    load=st.lists(arrivals, min_size=2, max_size=9),
    tokens_per_block=st.integers(1, 5),
    prefix_cache=st.sampled_from([True, True, True, False]),
    max_num_seqs=st.integers(1, 9),
    budget=st.integers(9, 40),
    mixed_steps=st.booleans(),
)
def test_a_block_is_computed_once(
    load: list[Arrival],
    tokens_per_block: int,
    prefix_cache: bool,
    max_num_seqs: int,
    budget: int,
    mixed_steps: bool,
) -> None:
    """With enough room, a request computes nothing that an earlier one has computed or begun to.

    Except that at least its last token is computed, and all tokens if all are scored.
    """
    for arrival in load:
        arrival.abort = None
    requests = [arrival.make_request(i) for i, arrival in enumerate(load)]
    num_blocks = len(load) * -(-MAX_LEN // tokens_per_block) + 200
    scheduler = Scheduler(
        BlockManager(num_blocks, tokens_per_block, prefix_cache), max_num_seqs, budget, mixed_steps
    )
    steps = run(scheduler, load, requests)
    assert scheduler.num_preemptions == 0

    num_computed = dict.fromkeys(requests, 0)
    for step in steps:
        for row in range(step.plan.num_decode, len(step.requests)):
            num_computed[step.requests[row]] += step.plan.lengths[row]

    known: set[tuple[str | None, tuple[int, ...]]] = set()  # prefixes of whole blocks
    for request in [request for step in steps for request in step.admitted]:
        prompt = request.prompt_token_ids
        salt = request.params.cache_salt
        ends = range(tokens_per_block, len(prompt) + 1, tokens_per_block)
        is_scored = request.params.prompt_logprobs is not None
        num_shared = 0
        if prefix_cache and not is_scored:
            found = [end for end in ends if end < len(prompt) and (salt, (*prompt[:end],)) in known]
            num_shared = max(found, default=0)
        assert request.cached_tokens == num_shared
        assert num_computed[request] == len(prompt) - num_shared
        known.update((salt, (*prompt[:end],)) for end in ends)


def list_hashes(tokens: list[int], salt: str | None) -> list[bytes]:
    hashes: list[bytes] = []
    BlockManager(1, 2).hash_blocks(tokens, hashes, len(tokens), salt)
    return hashes


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=4, max_size=8), st.text(min_size=1, max_size=40))
def test_equal_hashes_need_equal_salts(tokens: list[int], salt: str) -> None:
    salted = list_hashes(tokens, salt)
    assert salted == list_hashes(tokens, salt)
    others = [list_hashes(tokens, None), list_hashes(tokens, salt + "x")]
    assert not set(salted) & {digest for hashes in others for digest in hashes}


def test_a_salt_cannot_pass_for_a_block() -> None:
    """A salt that spells a block's bytes is not that block: else it would share what follows it."""
    first = [65, 66]
    spelled = b"".join(token.to_bytes(8, "little") for token in first).decode()
    after_block = list_hashes([*first, 7, 8], None)[1]
    after_salt = list_hashes([7, 8], spelled)[0]
    assert after_block != after_salt


@pytest.mark.parametrize("salt", ["", "x" * (MAX_SALT_LENGTH + 1), 5, b"x"])
def test_salts_that_are_refused(salt: object) -> None:
    with pytest.raises(ValueError, match=r"^cache_salt of .*: must ") as refused:
        SamplingParams(cache_salt=salt)
    assert "xxx" not in str(refused.value)
    assert "secret" not in repr(SamplingParams(cache_salt="secret"))


# With real ranks, against transformers.


def make_engine(oracle: Oracle, dcp: int, **options: object) -> LLMEngine:
    defaults = dict(tp_size=dcp, dcp_size=dcp, ranks="threads", device="cpu", block_size=4)
    return LLMEngine(EngineConfig(str(oracle.path), **defaults | dict(max_model_len=400) | options))


def finish_all(engine: LLMEngine) -> dict[str, list[int]]:
    """Run to the end, checking the blocks after every step; returns the tokens by request."""
    requests = [request for request, _ in engine.requests.values()]
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
        check_blocks(engine.blocks, requests)
    assert not engine.blocks.live
    return tokens


@pytest.mark.parametrize("strategy", ["gather_kv", "gather_q"])
@pytest.mark.parametrize("budget", [64, 4096])
@pytest.mark.parametrize(("dcp", "prefix_cache"), [(1, True), (4, True), (4, False)])
def test_samples_of_one_prompt(
    v2: Oracle, dcp: int, prefix_cache: bool, budget: int, strategy: str
) -> None:
    """Eight equal prompts, whole and in chunks, beside another one that they share nothing with."""
    equal, other = len(v2.prompts) - 1, len(v2.prompts) - 2
    params = SamplingParams(max_tokens=6, **GREEDY)
    with LLM(
        str(v2.path),
        tp_size=dcp,
        dcp_size=dcp,
        ranks="threads",
        device="cpu",
        block_size=4,
        max_model_len=400,
        max_num_seqs=16,
        max_num_batched_tokens=budget,
        prefill_strategy=strategy,
        prefix_cache=prefix_cache,
    ) as llm:
        chosen = [equal] * 5 + [other] + [equal] * 3
        outputs = llm.generate([v2.prompts[i] for i in chosen], params)
        num_computed = llm.engine.stats.prompt_tokens
    for i, output in zip(chosen, outputs, strict=True):
        assert output.outputs[0].token_ids == v2.tokens[i][:6]

    length = len(v2.prompts[equal])
    num_shared = (length - 1) // (4 * dcp) * (4 * dcp) if prefix_cache else 0
    assert num_computed == 8 * length - 7 * num_shared + len(v2.prompts[other])
    shared = [output.cached_tokens for i, output in zip(chosen, outputs, strict=True) if i == equal]
    assert shared == [0] + [num_shared] * 7


@pytest.mark.parametrize("dcp", [1, 4])
def test_scored_prompts_compute_everything(v2: Oracle, dcp: int) -> None:
    """Whoever wants log-probabilities of the prompt needs all its logits; others still share."""
    prompt = v2.prompts[-1]
    plain = SamplingParams(max_tokens=2, **GREEDY)
    scored = SamplingParams(max_tokens=2, prompt_logprobs=0, **GREEDY)
    engine = make_engine(v2, dcp)
    requests = [
        engine.add_request(str(i), prompt, params)
        for i, params in enumerate([plain, scored, scored, plain])
    ]
    tokens = finish_all(engine)
    engine.close()

    assert all(found == v2.tokens[-1][:2] for found in tokens.values())
    num_shared = (len(prompt) - 1) // (4 * dcp) * (4 * dcp)
    assert [request.cached_tokens for request in requests] == [0, 0, 0, num_shared]
    assert engine.stats.prompt_tokens == 4 * len(prompt) - num_shared
    first, second = (request.prompt_logprobs for request in requests[1:3])
    assert [e.logprob for e in first[1:]] == pytest.approx(
        [e.logprob for e in second[1:]], abs=1e-4
    )


@pytest.mark.parametrize("dcp", [1, 4])
@pytest.mark.parametrize("end", ["runs on", "is aborted"])
def test_a_prompt_that_is_being_computed(v2: Oracle, dcp: int, end: str) -> None:
    """Others arrive while its third chunk runs. They share what is planned so far, and go on."""
    prompt = v2.prompts[-1]
    params = SamplingParams(max_tokens=6, **GREEDY)
    engine = make_engine(v2, dcp, max_num_batched_tokens=50, max_num_seqs=8)
    engine.add_request("begins", prompt, params)
    for _ in range(3):
        engine.step()
    for i in range(4):
        engine.add_request(f"follows {i}", prompt, params)
    if end == "is aborted":
        engine.abort("begins")
    tokens = finish_all(engine)
    engine.close()
    assert all(found == v2.tokens[-1][:6] for found in tokens.values())

    tokens_per_block = 4 * dcp
    num_shared = (len(prompt) - 1) // tokens_per_block * tokens_per_block
    num_computed = len(prompt) + 4 * (len(prompt) - num_shared)
    if end == "is aborted":
        # It had three chunks of 50 tokens. The first to follow goes on after their last full block.
        lost = 150 % tokens_per_block
        num_computed = len(prompt) + lost + 3 * (len(prompt) - num_shared)
    assert engine.stats.prompt_tokens == num_computed


@pytest.mark.parametrize("dcp", [1, 4])
@pytest.mark.usefixtures("crowded")
def test_equal_prompts_with_too_few_blocks(v2: Oracle, dcp: int) -> None:
    """They share their prompt but not what follows it, and are preempted for that."""
    which = len(v2.prompts) - 2
    prompt = v2.prompts[which]
    engine = make_engine(
        v2,
        dcp,
        max_model_len=200,
        num_blocks=240 // (4 * dcp),
        max_num_batched_tokens=50,
        max_num_seqs=8,
    )
    params = SamplingParams(max_tokens=40, **GREEDY)
    for i in range(8):
        engine.add_request(str(i), prompt, params)
    tokens = finish_all(engine)
    engine.close()
    assert all(found == v2.tokens[which][:40] for found in tokens.values())
    assert engine.scheduler.num_preemptions > 0
