"""Steps in CUDA graphs. Some are graphs as a whole. Every token is then a decode row, also those of
prompts. Of other steps, graphs have all but the attentions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checkpoints import NUM_STEPS, Oracle

from minidcp import LLM, EngineConfig, SamplingParams
from minidcp.attention.context import MAX_DECODED_PAIRS, ContextPolicy
from minidcp.batch import StepPlan
from minidcp.kv_cache.interleave import Interleave
from minidcp.machine import Machine
from minidcp.model_config import ModelConfig
from minidcp.parallel.state import build_thread_states
from minidcp.request import RequestOutput
from minidcp.resolve import resolve
from minidcp.worker import cuda_graph, prompt_graphs
from minidcp.worker.cuda_graph import CapturedStep, GraphLadder, ladder
from minidcp.worker.model_runner import ModelRunner
from minidcp.worker.prompt_graphs import PromptGraphs, ReplayedPieces

COMMON = dict(
    device="cpu",
    dtype="float32",
    ranks="threads",
    max_model_len=512,
    block_size=4,
    max_num_batched_tokens=40,  # so that long prompts come in chunks
    max_num_seqs=10,
    prefill_strategy="gather_q",
)
GREEDY = SamplingParams(max_tokens=NUM_STEPS, temperature=0.0, logprobs=2, ignore_eos=True)
NGRAM = dict(speculative_method="ngram", num_speculative_tokens=2)


def generate(
    oracle: Oracle, prompts: list[list[int]], params: SamplingParams, **options: object
) -> list[RequestOutput]:
    with LLM(str(oracle.path), **(COMMON | options)) as llm:
        return llm.generate(prompts, params)


def check_answers(oracle: Oracle, **options: object) -> None:
    """Tokens and log-probabilities are those of transformers."""
    outputs = generate(oracle, oracle.prompts, GREEDY, **options)
    for output, tokens, logprobs in zip(outputs, oracle.tokens, oracle.logprobs, strict=True):
        completion = output.outputs[0]
        assert completion.token_ids == tokens
        for step, expected in zip(completion.logprobs, logprobs, strict=True):
            for token, logprob in step.top:
                assert logprob == pytest.approx(float(expected[token]), abs=1e-4)


@pytest.mark.parametrize(
    ("tp", "dcp", "options"),
    [
        (1, 1, dict()),
        (1, 1, NGRAM),
        (2, 2, dict(exchange_policy="wide")),
        (4, 2, dict(exchange_policy="narrow", **NGRAM)),
        (4, 4, dict(q_proj="replicated")),
    ],
)
def test_tokens_and_logprobs_are_those_of_transformers(
    oracle: Oracle,
    eager_graphs: list[StepPlan],
    tp: int,
    dcp: int,
    options: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps in graphs have decode rows, short prompts, the ends of long ones, or all of them. More
    tokens fit into them than requests can decode. The largest steps have no graph."""
    monkeypatch.setattr(cuda_graph, "SHORT_PROMPTS", 36)
    check_answers(oracle, tp_size=tp, dcp_size=dcp, **options)

    with_prompts = [plan for plan in eager_graphs if plan.tokens]
    assert any(plan.num_decode > 0 for plan in with_prompts)
    assert any(max(plan.starts[plan.num_decode :]) > 0 for plan in with_prompts)
    assert COMMON["max_num_seqs"] < max(plan.num_tokens for plan in eager_graphs) <= 36


@pytest.mark.parametrize(
    ("tp", "dcp", "options"),
    [
        (1, 1, dict(prefill_strategy="gather_kv")),
        (2, 2, dict(prefill_strategy="gather_kv")),
        (4, 2, dict(prefill_strategy="gather_kv", **NGRAM)),
        (4, 4, dict(q_proj="replicated")),
    ],
)
def test_graphs_between_the_attentions_of_prompts(
    oracle: Oracle,
    eager_graphs: list[StepPlan],
    tp: int,
    dcp: int,
    options: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps have prompts, chunks of prompts, and decode rows. The largest steps have no graphs."""
    sizes = [4, 16, 32]
    monkeypatch.setattr(cuda_graph, "SHORT_PROMPTS", 1)
    monkeypatch.setattr(prompt_graphs, "list_sizes", lambda max_tokens: sizes)
    start = PromptGraphs.start
    numbers = []

    def start_with_garbage(self: PromptGraphs, x: torch.Tensor) -> ReplayedPieces:
        numbers.append(len(x))
        for tensor in (self.x, self.attended, self.q_input, self.new_latents, self.hidden):
            tensor.normal_(std=100.0)  # in the rows of padding it must not matter
        return start(self, x)

    monkeypatch.setattr(PromptGraphs, "start", start_with_garbage)
    check_answers(oracle, tp_size=tp, dcp_size=dcp, **options)
    assert max(numbers) <= 32
    assert any(number not in sizes for number in numbers)


@pytest.mark.parametrize("most", [1, 40, 64, 100, 1024, 5000, 8192, 20_000])
def test_any_step_that_is_not_too_large_has_graphs(most: int) -> None:
    sizes = prompt_graphs.list_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == min(most, prompt_graphs.MAX_TOKENS)
    paddings = [size - tokens for tokens, size in zip([0, *sizes], sizes, strict=False)]
    assert paddings[0] <= 64
    for size, padding in zip(sizes[2:], paddings[2:], strict=True):
        assert padding <= max(128, size // 4)


def test_a_cached_prefix_and_equal_prompts_of_one_step(
    v2: Oracle, eager_graphs: list[StepPlan]
) -> None:
    """The second prompt begins after tokens that the first one computes in the same step."""
    prompt = max(v2.prompts, key=len)[:12]
    tokens, _ = v2.complete(prompt, 8)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    with LLM(str(v2.path), **COMMON, tp_size=2, dcp_size=2) as llm:
        for num_cached in ([0, 8], [8, 8]):
            eager_graphs.clear()
            outputs = llm.generate([prompt, prompt], params)
            assert [o.outputs[0].token_ids for o in outputs] == [tokens, tokens]
            first = eager_graphs[0]
            assert first.starts == num_cached and len(first.tokens) == 24 - sum(num_cached)


def test_scored_prompts(v2: Oracle, eager_graphs: list[StepPlan]) -> None:
    prompts = [prompt for prompt in v2.prompts if 2 < len(prompt) < 30]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    scored = generate(v2, prompts, params)
    assert eager_graphs and all(plan.tokens for plan in eager_graphs)
    eager_graphs.clear()
    expected = generate(v2, prompts, params, prefill_strategy="gather_kv")
    assert not eager_graphs
    for ours, theirs in zip(scored, expected, strict=True):
        assert ours.prompt_logprobs[0] is None
        for a, b in zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)


def test_graphs_share_the_memory_of_their_logits(
    v2: Oracle, eager_graphs: list[StepPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a vocabulary of 100,000, logits of every size would take most of a gigabyte."""
    written = []
    capture_eagerly = GraphLadder.capture

    def capture(self: GraphLadder, run: Callable[[], tuple[torch.Tensor, ...]]) -> CapturedStep:
        written.append(run()[0])
        return capture_eagerly(self, run)

    monkeypatch.setattr(GraphLadder, "capture", capture)
    config = EngineConfig(str(v2.path), device="cpu", max_model_len=64)
    model_config = ModelConfig.from_hf(v2.path)
    states, _ = build_thread_states(1, 1)
    resolved = resolve(config, model_config, Machine())
    runner = ModelRunner(resolved, model_config, states[0], torch.device("cpu"))
    runner.allocate_cache(16)
    assert [len(logits) for logits in written] == ladder(512)[::-1]
    assert runner.graphs is not None
    kept = runner.graphs.steps[512].outputs[0]
    assert {logits.data_ptr() for logits in written[1:]} == {kept.data_ptr()}


def test_prompts_that_see_much_are_no_decode_rows(v2: Oracle) -> None:
    """Absorbed attention over a long context takes longer than launching kernels."""
    config = ModelConfig.from_hf(v2.path)
    policy = ContextPolicy(config, num_heads=16, layout=Interleave(8, 16))

    def plan(start: int, length: int) -> StepPlan:
        return StepPlan(1, [0, 1], [10**6, start], [1, length], tokens=[0] * length, sampling=[0])

    assert policy.suits_decode(plan(0, 256))
    assert policy.suits_decode(plan(100_000, 16))
    assert not policy.suits_decode(plan(100_000, 64))
    most = MAX_DECODED_PAIRS // 16
    assert policy.suits_decode(plan(most - 1, 1)) and not policy.suits_decode(plan(most, 1))
