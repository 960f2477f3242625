"""MTP: drafts by the model's own layer are what transformers' code makes of it, on every layout of
ranks, and change nothing but the number of steps."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Oracle
from fp8_checkpoints import KEPT, edit_config, split_blocks
from predictions import NUM_LAYERS, NUM_TOKENS, PredictionOracle, make_prediction_checkpoint
from safetensors.torch import load_file, save_file
from servers import run_local

from minidcp import LLM, SamplingParams
from minidcp.batch import ForwardBatch, StepPlan
from minidcp.config import EngineConfig, ServeConfig
from minidcp.engine import drafter
from minidcp.engine.drafter import Drafter, count_accepted
from minidcp.machine import Machine
from minidcp.model_config import ModelConfig
from minidcp.models.mtp import PredictionLayer
from minidcp.parallel.state import build_thread_states
from minidcp.request import CompletionOutput
from minidcp.resolve import resolve
from minidcp.worker.cuda_graph import PredictionGraphs
from minidcp.worker.drafts import Verdict
from minidcp.worker.model_runner import ModelRunner
from minidcp.worker.predictor import MadeDrafts, Predictor
from minidcp.worker.prompt_graphs import PromptGraphs, ReplayedPieces

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


@pytest.fixture(autouse=True)
def every_draft_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: which drafts pay depends on the machine."""

    def choose_all(self: Drafter, num_rows: int, proposals: dict[str, list[int]]) -> dict[str, int]:
        return {name: len(drafts) for name, drafts in proposals.items()}

    monkeypatch.setattr(Drafter, "choose_counts", choose_all)
    monkeypatch.setattr(drafter, "PLAIN_STEPS", 10**9)


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
    poisons: bool = False  # makes NaN of what the caches have behind each row's last token
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
            if spy.poisons:
                behind = np.arange(position + 1, plan.room[index])
                rows = self.tables.find_cache_rows(
                    np.full_like(behind, plan.slots[row]), behind, self.layout, 0
                )
                self.kv.flatten(0, 1)[rows[rows >= 0]] = torch.nan
        return made

    monkeypatch.setattr(PredictionLayer, "choose_best", note_state)
    monkeypatch.setattr(Predictor, "make_drafts", note_drafts)
    yield spy


def check_drafts(
    oracle: PredictionOracle, spy: Spy, count: int, compare_states: bool = True
) -> None:
    """Each request has the slot of its number: all run at once."""
    num_checked = 0
    for (slot, position), made in spy.made.items():
        prompt, answer = oracle.prompts[slot], oracle.answers[slot]
        text = prompt + answer
        useful = min(count, len(text) - position - 2)
        if useful <= 0:
            continue  # behind the end there may be no room to compute more
        drafts, states = oracle.mtp.predict(text[: position + 2], useful)
        if compare_states:
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


def test_what_refused_drafts_wrote_is_never_read(mtp: PredictionOracle, spy: Spy) -> None:
    spy.poisons = True
    outputs, _ = run(mtp, **speculate(3))
    assert [o.token_ids for o in outputs] == mtp.answers
    check_drafts(mtp, spy, 3)


def test_a_cached_prefix_has_the_layer_s_latents(mtp: PredictionOracle, spy: Spy) -> None:
    with LLM(str(mtp.path), **COMMON, tp_size=2, dcp_size=2, **speculate(2)) as llm:
        llm.generate(mtp.prompts, GREEDY)
        spy.made.clear()
        outputs = llm.generate(mtp.prompts, GREEDY)
    assert [o.outputs[0].token_ids for o in outputs] == mtp.answers
    assert sum(o.cached_tokens for o in outputs) > 200
    check_drafts(mtp, spy, 2)


@pytest.mark.parametrize(("tp", "dcp", "k"), [(1, 1, 1), (2, 2, 3)])
def test_drafts_behind_prompts_that_run_in_pieces(
    mtp: PredictionOracle,
    spy: Spy,
    tp: int,
    dcp: int,
    k: int,
    eager_graphs: list[StepPlan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between attentions graphs run. The MTP layer is not in them, but its further drafts are
    replayed in the same step."""
    numbers = []
    start = PromptGraphs.start

    def start_behind_others(self: PromptGraphs, x: torch.Tensor) -> ReplayedPieces:
        numbers.append(len(x))
        self.hidden.normal_()  # padding, whose hidden states must not matter
        return start(self, x)

    monkeypatch.setattr(PromptGraphs, "start", start_behind_others)
    layout = dict(tp_size=tp, dcp_size=dcp, prefill_strategy="gather_kv")
    outputs, _ = run(mtp, **layout, **speculate(k))
    assert [o.token_ids for o in outputs] == mtp.answers
    assert min(numbers) < max(numbers) <= COMMON["max_num_batched_tokens"]
    assert eager_graphs and not any(plan.tokens for plan in eager_graphs)
    check_drafts(mtp, spy, k, compare_states=False)  # which state is whose is not known


@pytest.mark.parametrize(("tp", "dcp", "k"), [(1, 1, 3), (4, 2, 1), (2, 2, 2)])
def test_graphs_are_given_the_right_inputs(
    mtp: PredictionOracle,
    spy: Spy,
    tp: int,
    dcp: int,
    k: int,
    eager_graphs: list[StepPlan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also those of short prompts."""
    num_replays = []

    def replay(
        self: PredictionGraphs, next_tokens: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_replays.append(len(next_tokens))
        return replay_prediction(self, next_tokens, hidden)

    replay_prediction = PredictionGraphs.replay
    monkeypatch.setattr(PredictionGraphs, "replay", replay)
    layout = dict(tp_size=tp, dcp_size=dcp, prefill_strategy="gather_q", max_num_seqs=24)
    outputs, llm = run(mtp, **layout, **speculate(k))
    assert [o.token_ids for o in outputs] == mtp.answers
    assert llm.engine.stats.accepted_drafts > 0
    assert len(num_replays) > tp * k * 10
    assert any(plan.tokens and plan.num_decode for plan in eager_graphs)
    check_drafts(mtp, spy, k, compare_states=False)  # which state is whose is not known


def simulate(oracle: PredictionOracle, most: int) -> list[int]:
    """How many first, second, … drafts are right if as many as there may be are checked."""
    accepted = [0] * most
    for prompt, answer in zip(oracle.prompts, oracle.answers, strict=True):
        done = 1
        while done < NUM_TOKENS:
            count = min(most, NUM_TOKENS - done - 1)
            drafts, _ = oracle.mtp.predict(prompt + answer[:done], count) if count else ([], None)
            right = count_accepted(answer[done:], drafts)
            for place in range(right):
                accepted[place] += 1
            done += 1 + right
    return accepted


@pytest.mark.parametrize("k", [1, 3])
def test_as_many_drafts_are_accepted_as_should_be(mtp: PredictionOracle, k: int) -> None:
    _, llm = run(mtp, tp_size=2, dcp_size=2, **speculate(k))
    expected = simulate(mtp, k)
    assert llm.engine.stats.accepted_by_place == expected
    assert llm.engine.stats.accepted_drafts == sum(expected) > 20


@pytest.mark.usefixtures("crowded")
@pytest.mark.parametrize("k", [1, 3])
def test_preempted_requests_go_on(mtp: PredictionOracle, k: int) -> None:
    outputs, llm = run(mtp, tp_size=2, dcp_size=2, max_model_len=160, num_blocks=20, **speculate(k))
    assert [o.token_ids for o in outputs] == mtp.answers
    assert llm.engine.scheduler.num_preemptions > 0
    assert 0 < llm.engine.stats.accepted_drafts < llm.engine.stats.drafts


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, seed=5),
        SamplingParams(temperature=0.3, seed=7, repetition_penalty=1.05, frequency_penalty=0.1),
        SamplingParams(temperature=0.0, presence_penalty=0.5, logit_bias={17: 4.0, 30: -6.0}),
        SamplingParams(temperature=0.0, min_tokens=9, stop_token_ids=list(range(40))),
    ],
    ids=["sampled", "penalties", "bias", "min_tokens"],
)
def test_every_token_is_what_it_would_have_been(
    mtp: PredictionOracle, params: SamplingParams
) -> None:
    params = replace(params, max_tokens=NUM_TOKENS, logprobs=2)
    plain, _ = run(mtp, params)
    outputs, llm = run(mtp, params, tp_size=2, dcp_size=2, **speculate(3))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert [o.finish_reason for o in outputs] == [o.finish_reason for o in plain]
    assert llm.engine.stats.accepted_drafts > 0
    for ours, theirs in zip(outputs, plain, strict=True):
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_prompts_that_are_scored(mtp: PredictionOracle) -> None:
    params = replace(GREEDY, prompt_logprobs=1)
    plain, _ = run(mtp, params)
    outputs, llm = run(mtp, params, **speculate(2))
    assert outputs == plain
    assert llm.engine.stats.accepted_drafts > 0


@pytest.mark.parametrize("changes", [dict(quantization="fp8"), dict(dtype="bfloat16")])
def test_in_other_formats(mtp: PredictionOracle, changes: dict[str, object]) -> None:
    """Rounding may choose another token here and there, so only most of them are compared."""
    plain, _ = run(mtp, tp_size=2, dcp_size=2, **changes)
    outputs, llm = run(mtp, tp_size=2, dcp_size=2, **changes, **speculate(2))
    same = [a.token_ids == b.token_ids for a, b in zip(outputs, plain, strict=True)]
    assert sum(same) > len(same) / 2
    assert llm.engine.stats.accepted_drafts > 0


def test_a_checkpoint_in_fp8(mtp: PredictionOracle, tmp_path: Path) -> None:
    """As DeepSeek publishes them. Dequantised, drafts change nothing either."""
    block = (16, 24)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(mtp.path / "model.safetensors").items():
        tensors[name] = tensor
        if tensor.dim() == 2 and not any(part in name for part in (*KEPT, "eh_proj", "head")):
            tensors[name], tensors[f"{name}_scale_inv"] = split_blocks(tensor, block)
    oracle = replace(mtp, path=Path(edit(mtp.path, tmp_path, tensors)))
    quantization = dict(quant_method="fp8", fmt="e4m3", weight_block_size=list(block))
    edit_config(tmp_path, quantization_config=quantization)
    plain, _ = run(oracle)
    outputs, llm = run(oracle, tp_size=2, dcp_size=2, **speculate(2))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert llm.engine.stats.accepted_drafts > 0


def test_random_weights(mtp: PredictionOracle) -> None:
    plain, _ = run(mtp, load_format="dummy")
    outputs, llm = run(mtp, load_format="dummy", **speculate(1))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert llm.engine.stats.drafts > 0


def edit(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> str:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return str(target)


def test_what_a_checkpoint_may_have(
    mtp: PredictionOracle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The layer's copies of embedding and head are not needed, and not used if they differ."""
    tensors = load_file(mtp.path / "model.safetensors")
    head = f"model.layers.{NUM_LAYERS}.shared_head.head.weight"
    embeddings = f"model.layers.{NUM_LAYERS}.embed_tokens.weight"

    caplog.set_level(logging.INFO, "minidcp")
    other = edit(mtp.path, tmp_path, tensors | {head: tensors[head] + 1})
    outputs, _ = run(replace(mtp, path=Path(other)), **speculate(1))
    assert [o.token_ids for o in outputs] == mtp.answers
    assert "model.layers.3.shared_head.head.weight differs from the model's own" in caplog.text
    assert "embed_tokens.weight differs" not in caplog.text
    assert "left out" not in caplog.text

    without = {name: x for name, x in tensors.items() if name not in (head, embeddings)}
    caplog.clear()
    outputs, _ = run(replace(mtp, path=Path(edit(mtp.path, tmp_path, without))), **speculate(1))
    assert [o.token_ids for o in outputs] == mtp.answers
    assert "differs" not in caplog.text

    none = {name: x for name, x in tensors.items() if not name.startswith("model.layers.3.")}
    with pytest.raises(
        ValueError, match=r"--speculative-method mtp: .* has no model\.layers\.3\.\*"
    ):
        LLM(edit(mtp.path, tmp_path, none), **COMMON, **speculate(1))
    lacking = {name: x for name, x in tensors.items() if "enorm" not in name}
    with pytest.raises(ValueError, match=r"1 missing: model\.layers\.3\.enorm\.weight"):
        LLM(edit(mtp.path, tmp_path, lacking), **COMMON, **speculate(1))


def test_models_without_the_layer_are_refused(v2: Oracle) -> None:
    words = "--speculative-method mtp: needs a layer .* num_nextn_predict_layers 0; use ngram"
    with pytest.raises(ValueError, match=words):
        LLM(str(v2.path), **COMMON, **speculate(1))


def test_one_draft_is_the_default(mtp: PredictionOracle) -> None:
    with LLM(str(mtp.path), **COMMON, speculative_method="mtp") as llm:
        assert llm.engine.config.num_speculative_tokens == 1


def test_metrics_count_them(mtp: PredictionOracle) -> None:
    """A prompt's step gives the first token, every other step one and the accepted drafts."""
    with run_local(mtp.path, ServeConfig(), **speculate(3)) as local:
        local.api.complete(mtp.prompts[5], max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        drafts = local.api.http.get("/load").json()["drafts"]
        text = local.api.http.get("/metrics").text
    (steps,) = re.findall(r'^minidcp:step_seconds_count{.*kind="decode".*} (.*)$', text, re.M)
    assert drafts["accepted"] == NUM_TOKENS - 1 - float(steps) > 0
    accepted = re.search(r"^vllm:spec_decode_num_accepted_tokens_total{.*} (.*)$", text, re.M)
    assert float(accepted[1]) == drafts["accepted"]


@pytest.mark.parametrize("method", ["ngram", "mtp"])
def test_a_rank_warms_up_for_drafts(mtp: PredictionOracle, method: str) -> None:
    """Alone on a CPU. What it writes there, it writes before any request has a block."""
    config = EngineConfig(str(mtp.path), device="cpu", max_model_len=64, speculative_method=method)
    model_config = ModelConfig.from_hf(mtp.path)
    resolved = resolve(config, model_config, Machine())
    states, _ = build_thread_states(1, 1)
    runner = ModelRunner(resolved, model_config, states[0], torch.device("cpu"))
    runner.allocate_cache(2)
    runner.warm_up_drafts()
    assert runner.cache is not None
    assert runner.cache[:, 0].any() and not runner.cache[:, 1].any()
