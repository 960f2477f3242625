"""MTP: drafts by the model's own layer are what transformers' code makes of it, on every layout of
ranks, and change nothing but the number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from predictions import NUM_TOKENS, PredictionOracle, make_prediction_checkpoint

from minidcp import LLM, SamplingParams
from minidcp.batch import ForwardBatch, StepPlan
from minidcp.models.mtp import PredictionLayer
from minidcp.request import CompletionOutput
from minidcp.worker.drafts import Verdict
from minidcp.worker.predictor import MadeDrafts, Predictor

COMMON = dict(
    device="cpu",
    dtype="float32",
    ranks="threads",
    max_model_len=256,
    block_size=4,
    max_num_batched_tokens=48,  # so that the longest prompts come in chunks
    max_num_seqs=8,
)
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def mtp(tmp_path_factory: pytest.TempPathFactory) -> PredictionOracle:
    return make_prediction_checkpoint(tmp_path_factory.mktemp("mtp"))


def run(
    oracle: PredictionOracle, params: SamplingParams = GREEDY, **options: object
) -> tuple[list[CompletionOutput], LLM]:
    with LLM(str(oracle.path), **(COMMON | options)) as llm:
        return [o.outputs[0] for o in llm.generate(oracle.prompts, params)], llm


def speculate(count: int) -> dict[str, object]:
    return dict(speculative_method="mtp", num_speculative_tokens=count)


@dataclass
class Made:
    """Drafts as rank 0 made them."""

    drafts: list[int]
    states: torch.Tensor  # [K, hidden]


@dataclass
class Spy:
    # By request slot and position: the last token whose position is computed has that one.
    made: dict[tuple[int, int], Made] = field(default_factory=dict)
    states: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    spy = Spy()
    choose_best = PredictionLayer.choose_best
    make_drafts = Predictor.make_drafts

    def note_state(self: PredictionLayer, hidden: torch.Tensor) -> torch.Tensor:
        if self.lm_head.tp.rank == 0:
            spy.states.append(hidden)
        return choose_best(self, hidden)

    def note_drafts(
        self: Predictor,
        plan: StepPlan,
        batch: ForwardBatch,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        verdict: Verdict | None,
    ) -> MadeDrafts | None:
        if self.state.tp.rank > 0:
            return make_drafts(self, plan, batch, hidden, tokens, verdict)
        spy.states.clear()
        made = make_drafts(self, plan, batch, hidden, tokens, verdict)
        counts = [True] * len(tokens) if verdict is None else verdict.counts.tolist()
        for index, row in enumerate(dict.fromkeys(plan.sampling)):
            entries = [c for c, r in zip(counts, plan.sampling, strict=True) if r == row]
            refused = len(entries) - sum(entries)
            position = plan.starts[row] + plan.lengths[row] - 1 - refused
            states = torch.stack([state[index] for state in spy.states])
            assert made is not None
            spy.made[plan.slots[row], position] = Made(made.tokens[index].tolist(), states)
        return made

    monkeypatch.setattr(PredictionLayer, "choose_best", note_state)
    monkeypatch.setattr(Predictor, "make_drafts", note_drafts)
    yield spy


def check_drafts(oracle: PredictionOracle, spy: Spy, count: int) -> None:
    """Each request has the slot of its number: all run at once."""
    num_checked = 0
    for (slot, position), made in spy.made.items():
        prompt, answer = oracle.prompts[slot], oracle.answers[slot]
        text = prompt + answer
        useful = min(count, len(text) - position - 2)
        if useful <= 0:
            continue  # behind the end there may be no room to compute more
        drafts, states = oracle.mtp.predict(text[: position + 2], useful)
        torch.testing.assert_close(made.states[:useful], states, atol=1e-4, rtol=1e-4)
        assert made.drafts[:useful] == drafts
        num_checked += useful
    assert num_checked > len(oracle.prompts) * NUM_TOKENS / 2


@pytest.mark.parametrize(
    ("tp", "dcp", "exchange", "policy", "prefill", "k"),
    [
        (1, 1, "auto", "auto", "auto", 3),
        (2, 2, "a2a", "wide", "gather_kv", 1),
        (2, 1, "auto", "auto", "auto", 2),
        (4, 2, "ag_rs", "narrow", "gather_q", 3),
        (8, 8, "a2a", "narrow", "gather_kv", 2),
    ],
)
def test_drafts_are_those_of_transformers(
    mtp: PredictionOracle,
    spy: Spy,
    tp: int,
    dcp: int,
    exchange: str,
    policy: str,
    prefill: str,
    k: int,
) -> None:
    """Prompts come in chunks, beside rows with drafts, and all cross the edges of blocks."""
    options = dict(
        tp_size=tp,
        dcp_size=dcp,
        dcp_comm_backend=exchange,
        exchange_policy=policy,
        prefill_strategy=prefill,
    )
    outputs, llm = run(mtp, **options, **speculate(k))
    assert [o.token_ids for o in outputs] == mtp.answers
    check_drafts(mtp, spy, k)
    stats = llm.engine.stats
    assert 0 < stats.accepted_drafts < stats.drafts
    assert len(stats.accepted_by_place) == k
