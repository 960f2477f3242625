"""Speculative decoding changes nothing but the number of steps."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from checkpoints import Oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from minidcp import LLM, EngineConfig, SamplingParams
from minidcp.batch import Admission, StepPlan, find_positions, list_decode_tokens
from minidcp.engine.drafter import Drafter, RequestDrafts, StepTimes, count_accepted
from minidcp.engine.proposers import NgramIndex, Predictions, PromptLookup, Proposer
from minidcp.machine import Machine
from minidcp.model_config import ModelConfig
from minidcp.request import CompletionOutput, Request
from minidcp.resolve import ResolvedConfig, resolve
from minidcp.worker.drafts import judge
from minidcp.worker.model_runner import ModelRunner
from minidcp.worker.sampler import Sampler

STEPS = 40
COMMON = dict(
    device="cpu",
    dtype="float32",
    ranks="threads",
    max_model_len=512,
    block_size=4,
    max_num_batched_tokens=64,
    max_num_seqs=8,
)
SPECULATE = dict(speculative_method="ngram", num_speculative_tokens=3)


class Prompter(Drafter):
    """Drafts what is known to come, with some tokens made wrong."""

    def __init__(self, real: Drafter, answers: dict[tuple[int, ...], list[int]], wrong: float):
        super().__init__(real.proposer, real.most, real.max_tokens)
        self.answers = answers
        self.wrong = wrong
        self.random = random.Random(0)

    def propose(self, decoding: list[Request]) -> dict[str, list[int]]:
        proposals = {}
        room = self.max_tokens - len(decoding)
        for request in decoding:
            done = request.num_outputs + request.num_in_flight
            count = min(self.most, request.max_tokens - done - 1, room)
            answer = self.answers[tuple(request.prompt_token_ids)]
            drafts = answer[done : done + max(0, count)]
            drafts = [t ^ 1 if self.random.random() < self.wrong else t for t in drafts]
            room -= len(drafts)
            if drafts:
                proposals[request.request_id] = drafts
        return proposals


def run(
    model: str,
    prompts: list[list[int]],
    params: SamplingParams,
    answers: list[list[int]] | None = None,
    wrong: float = 0.3,
    **options: object,
) -> tuple[list[CompletionOutput], LLM]:
    """With `answers` what is drafted is taken from them."""
    with LLM(model, **(COMMON | options)) as llm:
        if answers is not None:
            scheduler = llm.engine.scheduler
            known = {tuple(p): a for p, a in zip(prompts, answers, strict=True)}
            scheduler.drafter = Prompter(scheduler.drafter, known, wrong)
        return [o.outputs[0] for o in llm.generate(prompts, params)], llm


@pytest.mark.parametrize(
    ("tp", "dcp", "exchange", "policy", "k"),
    [
        (1, 1, "auto", "auto", 1),
        (1, 1, "auto", "auto", 7),
        (2, 2, "a2a", "wide", 3),
        (4, 2, "ag_rs", "narrow", 3),
        (4, 4, "a2a", "narrow", 7),
        (8, 8, "ag_rs", "wide", 1),
    ],
)
@pytest.mark.usefixtures("crowded")
def test_the_tokens_are_those_of_transformers(
    v2: Oracle, tp: int, dcp: int, exchange: str, policy: str, k: int
) -> None:
    """Drafts are mixed with chunks of prompts, and requests are preempted."""
    params = SamplingParams(max_tokens=STEPS, temperature=0.0, logprobs=3, ignore_eos=True)
    options = dict(tp_size=tp, dcp_size=dcp, dcp_comm_backend=exchange, exchange_policy=policy)
    room = dict(max_model_len=340, num_blocks=-(-340 // (4 * dcp)), max_num_seqs=16)
    answers = [tokens[:STEPS] for tokens in v2.tokens]
    plain, _ = run(str(v2.path), v2.prompts, params, **options)
    speculate = SPECULATE | dict(num_speculative_tokens=k)
    outputs, llm = run(str(v2.path), v2.prompts, params, answers, **options, **room, **speculate)

    assert [o.token_ids for o in outputs] == answers
    stats = llm.engine.stats
    assert 0 < stats.accepted_drafts < stats.drafts
    assert len(stats.accepted_by_place) == k
    assert llm.engine.scheduler.num_preemptions > 0
    for ours, theirs in zip(outputs, plain, strict=True):
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]


@pytest.mark.parametrize("wrong", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, seed=5),
        SamplingParams(temperature=1.2, top_k=20, top_p=0.9, seed=6),
        SamplingParams(temperature=0.7, seed=7, repetition_penalty=1.3, frequency_penalty=0.4),
        SamplingParams(temperature=0.0, presence_penalty=0.5, logit_bias={17: 4.0, 30: -6.0}),
        SamplingParams(temperature=0.0, min_tokens=9, stop_token_ids=list(range(40))),
    ],
    ids=["sampled", "filtered", "penalties", "bias", "min_tokens"],
)
def test_every_token_is_what_it_would_have_been(
    v2: Oracle, params: SamplingParams, wrong: float
) -> None:
    """Seeds keep their meaning; counts and limits are those of each token's place."""
    params = replace(params, max_tokens=STEPS, logprobs=0)
    prompts = [prompt for prompt in v2.prompts if len(prompt) < 70]
    plain, _ = run(str(v2.path), prompts, params)
    answers = [output.token_ids for output in plain]
    outputs, llm = run(
        str(v2.path), prompts, params, answers, wrong, tp_size=2, dcp_size=2, **SPECULATE
    )
    assert [o.token_ids for o in outputs] == answers
    assert [o.finish_reason for o in outputs] == [o.finish_reason for o in plain]
    stats = llm.engine.stats
    assert stats.drafts > 0
    if wrong == 0.0:
        assert stats.accepted_drafts == stats.drafts
    if wrong == 1.0:
        assert stats.accepted_drafts == 0


def test_each_token_is_an_event(v2: Oracle) -> None:
    prompt, answer = v2.prompts[0], v2.tokens[0][:STEPS]
    params = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
    with LLM(str(v2.path), **COMMON, **SPECULATE) as llm:
        engine = llm.engine
        engine.scheduler.drafter = Prompter(engine.scheduler.drafter, {tuple(prompt): answer}, 0.0)
        engine.add_request("a", prompt, params)
        deltas = []
        while engine.has_work:
            deltas += engine.step()
    assert [delta.token_ids for delta in deltas] == [(token,) for token in answer]
    assert [delta.finish_reason is None for delta in deltas] == [True] * (STEPS - 1) + [False]
    assert engine.stats.steps < STEPS / 2


@pytest.mark.parametrize(("tp", "dcp"), [(1, 1), (2, 2)])
def test_what_refused_drafts_wrote_is_never_read(
    v2: Oracle, tp: int, dcp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made NaN after each step."""
    execute = ModelRunner.execute
    poisoned = []

    def execute_and_poison(self: ModelRunner, plan: StepPlan) -> object:
        tokens: list[torch.Tensor] = []
        sample = self.sample

        def remember(*args: object) -> object:
            sampled = sample(*args)
            tokens.append(sampled[1])
            return sampled

        self.sample = remember
        result = execute(self, plan)
        self.sample = sample
        if plan.drafts:
            # The token at place i of a row is refused if the token sampled before it does not count
            # or is another.
            decode_tokens = torch.tensor(list_decode_tokens(plan))
            counts = judge(tokens[0], plan, decode_tokens).counts
            rows = torch.tensor(plan.sampling)
            is_refused = torch.zeros(len(rows), dtype=torch.bool)
            is_refused[1:] = (rows[1:] == rows[:-1]) & ~counts[1:]
            positions = find_positions(plan)[: plan.num_decode_tokens]
            slots = [plan.slots[row] for row in plan.sampling][: plan.num_decode_tokens]
            places = self.tables.find_cache_rows(
                slots, positions, self.interleave, self.state.dcp.rank
            )
            for place, refused in zip(places, is_refused.tolist(), strict=False):
                if refused and place >= 0:
                    self.cache.flatten(1, 2)[:, place] = torch.nan
                    poisoned.append(place)
        return result

    monkeypatch.setattr(ModelRunner, "execute", execute_and_poison)
    answers = [tokens[:STEPS] for tokens in v2.tokens]
    params = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
    outputs, _ = run(
        str(v2.path), v2.prompts, params, answers, 0.5, tp_size=tp, dcp_size=dcp, **SPECULATE
    )
    assert [o.token_ids for o in outputs] == answers
    assert len(poisoned) > 20


def test_draws_have_the_distribution_of_the_model() -> None:
    """100,000 draws behind drafts that are right, wrong and mixed, with and without penalties."""
    torch.manual_seed(0)
    vocab, rows, rounds = 6, 500, 100
    logits = torch.randn(2, vocab)  # after the first token, and after the draft
    for params in (
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.8, frequency_penalty=0.7, repetition_penalty=1.2),
    ):
        first_draws = torch.zeros(vocab)
        second_draws = torch.zeros(vocab, vocab)  # by the draft, if it was right
        sampler = Sampler()
        for number in range(rounds):
            plan = StepPlan(
                num_decode=rows,
                slots=list(range(rows)),
                starts=[1] * rows,
                lengths=[2] * rows,
                drafts=[row % vocab for row in range(rows)],
                sampling=[row for row in range(rows) for _ in range(2)],
                admitted=[
                    Admission(row, params, number * rows + row, 2, history=(0, 1))
                    for row in range(rows)
                ],
            )
            sampler.admit(plan)
            both = logits.repeat(rows, 1)
            decode_tokens = torch.tensor(list_decode_tokens(plan))
            tokens = sampler.sample(both, plan, both.argmax(-1), decode_tokens).tokens
            counts = judge(tokens, plan, decode_tokens).counts.view(rows, 2)
            first, second = tokens.view(rows, 2).T
            first_draws += torch.bincount(first, minlength=vocab)
            right = counts[:, 1]
            assert torch.equal(right, first == torch.tensor(plan.drafts))
            pairs = first[right] * vocab + second[right]
            second_draws += torch.bincount(pairs, minlength=vocab**2).view(vocab, vocab)

        assert first_draws.sum() == rows * rounds
        check_chi_square(first_draws, expect(logits[0], params, [0, 1], []))
        for draft in range(vocab):
            expected = expect(logits[1], params, [0, 1], [draft])
            check_chi_square(second_draws[draft], expected)


def expect(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]
) -> torch.Tensor:
    """The probabilities of the next token, as OpenAI and CTRL define penalties."""
    adjusted = logits.double().clone()
    for token in set(prompt + output):
        value = adjusted[token]
        penalty = params.repetition_penalty
        adjusted[token] = value / penalty if value > 0 else value * penalty
    for token in output:
        adjusted[token] -= params.frequency_penalty
    return (adjusted / params.temperature).softmax(-1)


def check_chi_square(draws: torch.Tensor, expected: torch.Tensor) -> None:
    """Five degrees of freedom: 25.7 is exceeded once in 10,000 times."""
    wanted = expected * draws.sum()
    assert ((draws - wanted) ** 2 / wanted).sum() < 25.7


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 6),
    st.integers(1, 7),
)
def test_the_index_finds_the_last_continuation(
    tokens: list[int], shortest: int, more: int, count: int, at_once: int
) -> None:
    longest = shortest + more
    index = NgramIndex(shortest, longest)
    for end in range(0, len(tokens) + at_once, at_once):
        index.extend(tokens[:end])
    index.extend(tokens)

    expected: list[int] = []
    for length in range(min(longest, len(tokens)), shortest - 1, -1):
        suffix = tokens[len(tokens) - length :]
        places = [p for p in range(length, len(tokens)) if tokens[p - length : p] == suffix]
        if places:
            circle = tokens[places[-1] :]
            expected = [circle[i % len(circle)] for i in range(count)]
            break
    assert index.propose(tokens, count) == expected


def test_a_long_prompt_is_indexed_in_parts() -> None:
    index = NgramIndex(2, 3)
    tokens = [1, 2, 3] * 2000
    index.extend(tokens)
    assert index.propose(tokens, 2) == []  # not all of it is indexed yet
    index.extend(tokens)
    assert index.propose(tokens, 2) == [1, 2]


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_accepted_drafts(tokens: list[int], drafts: list[int]) -> None:
    drafts = drafts[: len(tokens)]
    accepted = count_accepted(tokens, drafts)
    assert drafts[:accepted] == tokens[:accepted]
    assert accepted == len(drafts) or drafts[accepted] != tokens[accepted]


def make_drafter(
    rates: list[float], seconds: dict[int, float], proposer: Proposer | None = None
) -> Drafter:
    """By default the ranks make the drafts, and the driver does not know them."""
    drafter = Drafter(proposer or Predictions(4), most=4, max_tokens=64)
    for name, rate in enumerate(rates):
        drafter.requests[str(name)] = RequestDrafts(rate * 1e6, 1e6)
    for size, time in seconds.items():
        for _ in range(2):  # the first step of a size does not count
            drafter.times.note(size, time)
    return drafter


@settings(deadline=None)
@given(
    rates=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3),
    slope=st.floats(0.0, 1.0),
    idle=st.integers(0, 2),
)
def test_as_many_drafts_as_pay(rates: list[float], slope: float, idle: int) -> None:
    """Against all ways to choose, where a token more costs `slope` of a step."""
    num_rows = len(rates) + idle
    drafter = make_drafter(rates, {size: 1 + slope * size for size in range(1, 40)})
    counts = drafter.choose_counts(num_rows, {str(i): [0] * 4 for i in range(len(rates))})

    def speed(chosen: list[int]) -> float:
        gains = [sum(r**i for i in range(1, c + 1)) for r, c in zip(rates, chosen, strict=True)]
        return (num_rows + sum(gains)) / drafter.times.estimate(num_rows + sum(chosen))

    best = 0.0
    for number in range(5 ** len(rates)):
        best = max(best, speed([number // 5**i % 5 for i in range(len(rates))]))
    assert speed([counts[str(i)] for i in range(len(rates))]) == pytest.approx(best)


def end_step(drafter: Drafter, drafts: list[int]) -> None:
    """A step of one request ends, and has taken as long as ever."""
    plan = StepPlan(num_decode=1, slots=[0], drafts=drafts)
    drafter.note_step(plan, drafter.times.estimate(1 + len(drafts)))


def test_many_long_prompts_are_indexed_a_part_in_each_step() -> None:
    drafter = make_drafter([], {1: 1.0}, PromptLookup(2, 4))
    requests = [Request(str(i), [1, 2, 3] * 1000, SamplingParams(), 9, seed=0) for i in range(8)]
    for steps in range(1, 7):
        drafter.propose(requests)
        num_indexed = sum(i.num_indexed for i in drafter.proposer.indices.values())
        assert num_indexed == min(steps * 4096, 24_000)


def test_a_trial_that_fails_for_most_is_not_repeated_at_once() -> None:
    """One right draft of many must not make every step wait for the one before it."""
    drafter = make_drafter([0.01] * 4, {1: 1.0, 4: 1.0, 5: 2.0, 8: 5.0})
    requests = [Request(str(i), [1, 2, 3, 1, 2], SamplingParams(), 999, seed=0) for i in range(4)]
    with_drafts = 0
    for _ in range(100):
        proposals = drafter.propose(requests)
        with_drafts += bool(proposals)
        for request in requests:
            drafts = proposals.get(request.request_id, [])
            drafter.note(request, len(drafts), len(drafts) if request is requests[0] else 0)
        end_step(drafter, [0] * sum(map(len, proposals.values())))
    assert 1 <= with_drafts <= 4


def test_there_are_no_drafts_before_a_plain_step_was_measured() -> None:
    """Where only steps with drafts were measured, none would ever seem to cost anything."""
    drafter = make_drafter([], {})
    request = Request("a", [1, 2, 3, 1, 2], SamplingParams(), 100, seed=0)
    for _ in range(2):
        assert drafter.propose([request]) == {}
        end_step(drafter, [])
    assert drafter.propose([request]) != {}


def test_one_slow_plain_step_does_not_make_drafts_pay_for_ever() -> None:
    """Nor does the first step of a size count, which may load kernels."""
    drafter = make_drafter([], {})
    request = Request("a", [1, 2, 3, 1, 2], SamplingParams(), 9999, seed=0)
    num_plain = 0
    for step in range(300):
        drafts = drafter.propose([request]).get("a", [])
        drafter.note(request, len(drafts), 0)
        seconds = 1.0 + 0.5 * len(drafts) if step > 2 else 50.0
        drafter.note_step(StepPlan(num_decode=1, slots=[0], drafts=drafts), seconds)
        num_plain += not drafts
    assert num_plain > 200


def test_drafts_that_are_never_right_end() -> None:
    """What the chance of 1 in 2 says at first is soon unlearnt."""
    drafter = make_drafter([], {1: 1.0, 2: 1.3, 3: 1.6, 4: 1.9})
    request = Request("a", [1, 2, 3, 1, 2], SamplingParams(), 100, seed=0)
    drafted = []
    for _ in range(60):
        drafts = drafter.propose([request]).get("a", [])
        drafter.note(request, len(drafts), 0)
        end_step(drafter, drafts)
        drafted.append(len(drafts))
    assert drafted[0] > 0
    assert sum(drafted[10:]) <= 2
    assert sum(drafted[30:]) > 0, "a text may begin to repeat itself"


def test_drafts_that_begin_to_be_right_are_noticed() -> None:
    """Though one of them costs more than it seems to be worth."""
    drafter = make_drafter([0.01], {1: 1.0, 2: 1.6, 3: 1.7, 4: 1.8})
    drafter.requests["0"] = replace(drafter.requests["0"], right=0.2, tried=20.0)
    request = Request("0", [1, 2, 3, 1, 2], SamplingParams(), 1000, seed=0)
    drafted = []
    for _ in range(200):
        drafts = drafter.propose([request]).get("0", [])
        drafter.note(request, len(drafts), len(drafts))
        end_step(drafter, drafts)
        drafted.append(len(drafts))
    assert sum(drafted[:30]) == 0
    plain = [count for count in drafted[150:] if count == 0]
    assert len(plain) == 2, "what plain steps take is measured again now and then"
    assert drafted[150:].count(drafter.most) == 48


def test_guesses_are_checked_without_drafts() -> None:
    """What prompt lookup would have drafted is compared with what came."""
    slow = {1: 1.0, 2: 9.0, 3: 9.0, 4: 9.0, 5: 9.0}
    drafter = make_drafter([], slow, PromptLookup(2, 4))
    request = Request("a", [1, 2, 3] * 5, SamplingParams(), 9999, seed=0)
    for token in [1, 2, 3] * 10:
        assert drafter.propose([request]) == {}, "it would not pay"
        request.tokens.append(token)
        drafter.note(request, 0, 0)
        end_step(drafter, [])
    assert drafter.requests["a"].rate > 0.9
    for token in range(10, 110):
        request.tokens += [1, 2]
        drafter.propose([request])
        request.tokens.append(token)  # "1, 2" was never followed by this one
        drafter.note(request, 0, 0)
    assert drafter.requests["a"].rate < 0.3

    drafter = make_drafter([], slow, PromptLookup(2, 4))
    request = Request("b", list(range(50)), SamplingParams(), 9999, seed=0)
    for token in range(50, 90):
        drafter.propose([request])
        request.tokens.append(token)
        drafter.note(request, 0, 0)
    assert drafter.requests["b"].rate == pytest.approx(0.5), "nothing was guessed"


def test_times_are_learnt() -> None:
    times = StepTimes()
    assert times.estimate(5) == times.estimate(1)
    for size, seconds in ((1, 99.0), (1, 1.0), (8, 99.0), (8, 2.0)):
        times.note(size, seconds)
    assert times.estimate(1) == 1.0  # the first step of a size does not count
    assert times.estimate(100) == 2.0  # not known: to be tried
    assert 1.0 < times.estimate(4) < times.estimate(7) < 2.0
    for _ in range(40):
        times.note(8, 4.0)
    assert times.estimate(8) == 4.0


def test_times_are_forgotten() -> None:
    """One slow step of a size that was not chosen since must not count for ever."""
    times = StepTimes()
    for size, seconds in ((1, 1.0), (1, 1.0), (4, 9.0), (4, 9.0)):
        times.note(size, seconds)
    assert times.estimate(4) == 9.0
    for _ in range(600):
        times.note(1, 1.0)
    assert times.estimate(4) == 1.0
    times.note(4, 2.0)
    assert times.estimate(4) == 2.0


def test_waiting_for_drafts_is_counted() -> None:
    times = StepTimes()
    times.note_end(10.0, 0.01, has_drafts=True)
    times.note_end(10.015, 0.01, has_drafts=False)  # nothing ran for 5 ms
    assert times.wait == pytest.approx(0.005)
    waited = times.wait
    times.note_end(20.0, 0.01, has_drafts=True)  # there was nothing to do before it
    assert times.wait == waited
    for _ in range(50):
        times.note_end(times.last_end + 0.015, 0.01, has_drafts=True)
    assert times.wait == pytest.approx(0.005, rel=0.01)

    drafter = make_drafter([0.3], {1: 1.0, 2: 1.2})
    assert drafter.choose_counts(1, {"0": [0]}) == {"0": 1}
    drafter.times.wait = 0.2
    assert drafter.choose_counts(1, {"0": [0]}) == {"0": 0}


def test_nothing_changes_without_it(v2: Oracle) -> None:
    _, llm = run(str(v2.path), v2.prompts[:2], SamplingParams(max_tokens=4))
    assert llm.engine.scheduler.drafter is None
    assert llm.engine.stats.drafts == 0
    assert llm.engine.config.max_decode_tokens == COMMON["max_num_seqs"]


def test_lookup_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="--prompt-lookup-min 5: must be at most"):
        EngineConfig("model", prompt_lookup_min=5)


@pytest.mark.parametrize(
    ("max_num_seqs", "most"),
    [(256, 31), (16, 31), (4, 127), (1, 511), (2048, 127)],  # a step has 512 tokens, or 2048
)
def test_the_most_drafts(v2: Oracle, max_num_seqs: int, most: int) -> None:
    model = ModelConfig.from_hf(v2.path)
    options = dict(speculative_method="ngram", max_num_seqs=max_num_seqs, device="cpu")

    def resolve_with(count: int, **others: int) -> ResolvedConfig:
        config = EngineConfig("model", num_speculative_tokens=count, **options, **others)
        return resolve(config, model, Machine())

    resolved = resolve_with(most)
    assert resolved.num_speculative_tokens == most
    assert resolved.max_decode_tokens == max(512, max_num_seqs)
    expected = f"--num-speculative-tokens {most + 1}: must be at most {most} with --max-num-seqs"
    with pytest.raises(ValueError, match=expected):
        resolve_with(most + 1)


def test_drafts_that_no_step_has_room_for(v2: Oracle) -> None:
    options = dict(COMMON, max_num_batched_tokens=8, max_num_seqs=4)
    speculate = dict(speculative_method="ngram", num_speculative_tokens=8)
    expected = "--num-speculative-tokens 8: must be less than --max-num-batched-tokens 8"
    with pytest.raises(ValueError, match=expected):
        LLM(str(v2.path), **(options | speculate))
    # One request has room for them, or several for some.
    speculate["num_speculative_tokens"] = 7
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    answers = [tokens[:24] for tokens in v2.tokens[:4]]
    outputs, llm = run(str(v2.path), v2.prompts[:4], params, answers, **(options | speculate))
    assert [output.token_ids for output in outputs] == answers
    assert 0 < llm.engine.stats.accepted_drafts < llm.engine.stats.drafts
    assert len(llm.engine.stats.accepted_by_place) == 7


def test_prompt_lookup_saves_steps(v2: Oracle) -> None:
    """A model that repeats itself: the drafts are found by the real index."""
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True, logit_bias={9: 100.0})
    prompts = [[1, 2, 3]]
    plain, without = run(str(v2.path), prompts, params)
    outputs, llm = run(str(v2.path), prompts, params, **SPECULATE)
    assert outputs[0].token_ids == plain[0].token_ids
    assert llm.engine.stats.steps < 0.6 * without.engine.stats.steps
