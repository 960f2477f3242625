"""MTP on a GPU: drafts of the layer, in graphs and without, and steps that never wait."""

from __future__ import annotations

import functools

import pytest
import torch
from checkpoints import measure_errors
from predictions import NUM_TOKENS, PredictionOracle
from test_layers import make_plans, make_runner

from minidcp import LLM, RequestOutput, SamplingParams
from minidcp.batch import Admission, StepPlan
from minidcp.engine.listener import EngineStats

pytestmark = pytest.mark.gpu


@functools.cache
def run(oracle: PredictionOracle, **options: object) -> tuple[list[RequestOutput], EngineStats]:
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=2)
    defaults = dict(
        device="cuda",
        max_model_len=256,
        num_blocks=200,
        max_num_seqs=8,
        max_num_batched_tokens=64,
    )
    if options.get("tp_size", 1) == 1:
        defaults["ranks"] = "threads"
    with LLM(str(oracle.path), **(defaults | options)) as llm:
        return llm.generate(oracle.prompts, params), llm.engine.stats


def speculate(count: int) -> dict[str, object]:
    return dict(speculative_method="mtp", num_speculative_tokens=count)


OPTIONS = {
    "fa3": dict(),
    "eager": dict(cuda_graph=False),
    "triton": dict(attention_backend="triton"),
    "fp8": dict(quantization="fp8"),
    "2x2": dict(tp_size=2, dcp_size=2),
    "4x2": dict(tp_size=4, dcp_size=2, prefill_strategy="gather_q"),
    "4x4 ag_rs, narrow": dict(
        tp_size=4, dcp_size=4, dcp_comm_backend="ag_rs", exchange_policy="narrow"
    ),
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_answers_are_as_near_fp32_as_without(mtp: PredictionOracle, name: str, k: int) -> None:
    plain, _ = run(mtp, **OPTIONS[name])
    outputs, stats = run(mtp, **OPTIONS[name], **speculate(k))
    print(f"{name}, {k}: {stats.accepted_drafts} of {stats.drafts}, {stats.accepted_by_place}")
    assert 0 < stats.accepted_drafts < stats.drafts
    errors, plain_errors = (
        torch.cat([measure_errors(mtp.mtp.model, output) for output in both])
        for both in (outputs, plain)
    )
    assert errors.square().mean().sqrt() < 1.5 * plain_errors.square().mean().sqrt()


@pytest.mark.parametrize("k", [1, 3])
def test_as_many_are_right_with_graphs(mtp: PredictionOracle, k: int) -> None:
    """Rounding may make a draft wrong, or a text another one, here and there."""
    rates = []
    for cuda_graph in (True, False):
        _, stats = run(mtp, cuda_graph=cuda_graph, **speculate(k))
        rates.append(stats.accepted_by_place[0] / stats.rows_with_drafts)
    assert rates[0] == pytest.approx(rates[1], abs=0.15)


@pytest.mark.parametrize("attention", ["fa3", "triton"])
def test_steps_never_wait_for_the_device(mtp: PredictionOracle, attention: str) -> None:
    """Prompts, a mixed step, and steps in graphs with one draft, with two and with none."""
    runner = make_runner(
        mtp, "cuda", "bfloat16", cuda_graph=True, attention_backend=attention, **speculate(2)
    )
    plans = make_plans()
    for plan in plans:
        plan.sampling = list(range(len(plan.slots)))
        plan.followers = [-1] * (len(plan.slots) - plan.num_decode)
    plans[0].sampling, plans[0].followers = [], [0]
    plans.append(StepPlan(2, [0, 1], [300, 17], [2, 3], drafts=[-2, -2, -3]))
    plans[-1].sampling = [0, 0, 1, 1, 1]
    plans.append(StepPlan(2, [0, 1], [302, 20], [1, 1], sampling=[0, 1]))
    for temperature, plan in zip([0.0, 0.0, 0.7, 0.7, 0.0], plans, strict=True):
        plan.room = [[320, 32][plan.slots[row]] for row in sorted(set(plan.sampling))]
        for slot in plan.slots:
            params = SamplingParams(temperature=temperature, repetition_penalty=1.2)
            plan.admitted.append(Admission(slot, params, 1, 2, (4,), history=(5, 6, 6)))
    for plan in plans:  # compile kernels and initialise libraries
        runner.execute(plan).wait()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = [runner.execute(plan) for plan in plans]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    results = [p.wait() for p in pending]
    assert [len(result.tokens) for result in results] == [0, 1, 2, 5, 2]
    assert len(results[3].drafts) == 3
    assert results[4].drafts is None
