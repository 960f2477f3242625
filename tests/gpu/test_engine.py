"""The engine on a GPU: graphs, back-ends, exchanges and many ranks must give the same tokens."""

from __future__ import annotations

import functools

import pytest
import torch
from backends import HAS_FLASHINFER
from checkpoints import Oracle, make_prompt, measure_errors

from minidcp import LLM, RequestOutput, SamplingParams

pytestmark = pytest.mark.gpu
STEPS = 48


@functools.cache
def run(path: str, prompts: tuple[tuple[int, ...], ...], **options: object) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True, logprobs=2)
    defaults = dict(
        device="cuda",
        max_model_len=1024,
        num_blocks=400,
        max_num_seqs=16,
        max_num_batched_tokens=512,
    )
    if options.get("tp_size", 1) == 1:
        defaults["ranks"] = "threads"  # starting a process would take most of the test's time
    with LLM(path, **(defaults | options)) as llm:
        return llm.generate([list(p) for p in prompts], params)


@functools.cache
def run_base(oracle: Oracle) -> tuple[list[RequestOutput], list[torch.Tensor]]:
    """The outputs of one rank with FA3 and graphs, and their errors against fp32."""
    outputs = run(str(oracle.path), tuple(map(tuple, oracle.prompts)))
    return outputs, [measure_errors(oracle.model, output) for output in outputs]


def compare(oracle: Oracle, **options: object) -> None:
    """Compare an engine with one rank.

    Its errors against fp32 are at most 1.5 times as large. Its tokens differ only where rounding
    can decide: each of two log-probabilities is off by up to the noise, so their difference is off
    by up to twice the noise.
    """
    base, base_errors = run_base(oracle)
    noise = max(float(errors.max()) for errors in base_errors)
    ours, theirs, equal = [], [], 0
    for a, b, errors in zip(
        base,
        run(str(oracle.path), tuple(map(tuple, oracle.prompts)), **options),
        base_errors,
        strict=True,
    ):
        pairs = zip(a.outputs[0].logprobs, b.outputs[0].logprobs, strict=True)
        split = next((i for i, (x, y) in enumerate(pairs) if x.token_id != y.token_id), STEPS)
        if split < STEPS:
            (_, best), (_, second) = a.outputs[0].logprobs[split].top
            assert best - second < 2 * noise, f"step {split} after {len(a.prompt_token_ids)}"
        equal += split
        theirs.append(errors[: split + 1])
        ours.append(measure_errors(oracle.model, b, split + 1))
    own, base_rms = (float(torch.cat(x).square().mean().sqrt()) for x in (ours, theirs))
    print(
        f"{options}: {equal} of {len(base) * STEPS} tokens equal; "
        f"off fp32 by {own:.4f} (one rank {base_rms:.4f}) rms, "
        f"{float(torch.cat(ours).max()):.4f} ({noise:.4f}) at most"
    )
    assert own < 1.5 * base_rms
    assert equal > len(base) * STEPS // 3


OPTIONS = {
    "eager": dict(cuda_graph=False),
    "triton": dict(attention_backend="triton", prefill_strategy="gather_q"),
    "reference": dict(attention_backend="reference", cuda_graph=False),
    "nccl, one rank": dict(comm="nccl", ranks="processes"),
    "2x2": dict(tp_size=2, dcp_size=2, prefill_strategy="gather_kv"),
    "4x2": dict(tp_size=4, dcp_size=2, prefill_strategy="gather_q"),
    "4x4 ag_rs, narrow, eager": dict(
        tp_size=4, dcp_size=4, dcp_comm_backend="ag_rs", exchange_policy="narrow", cuda_graph=False
    ),
    "8x8": dict(tp_size=8, dcp_size=8, prefill_strategy="gather_q"),
    "8x8 a2a, wide, triton": dict(
        tp_size=8,
        dcp_size=8,
        dcp_comm_backend="a2a",
        exchange_policy="wide",
        attention_backend="triton",
    ),
    "8x8 replicated q": dict(
        tp_size=8, dcp_size=8, q_proj="replicated", prefill_strategy="gather_kv"
    ),
    "8x1": dict(tp_size=8, dcp_size=1),
}
if HAS_FLASHINFER:
    OPTIONS |= {
        "flashinfer": dict(attention_backend="flashinfer", prefill_strategy="gather_q"),
        "flashinfer, eager": dict(attention_backend="flashinfer", cuda_graph=False),
    }
# Each needs a GPU of its own: FlashInfer's kernel begins when it has every multiprocessor.
for size in (2, 4, 8):
    if HAS_FLASHINFER and torch.cuda.device_count() >= size:
        name = f"flashinfer {size}x{size}"
        options = dict(attention_backend="flashinfer", tp_size=size, dcp_size=size)
        OPTIONS[name] = options | dict(prefill_strategy="gather_q")
        OPTIONS[f"{name} ag_rs"] = options | dict(dcp_comm_backend="ag_rs")
        OPTIONS[f"{name} a2a, narrow"] = options | dict(
            dcp_comm_backend="a2a", exchange_policy="narrow"
        )
if torch.cuda.device_count() >= 2:  # NCCL needs a GPU for each rank
    OPTIONS |= {
        "nccl 2x2": dict(tp_size=2, dcp_size=2, comm="nccl"),
        "nccl 2x2 ag_rs, narrow": dict(
            tp_size=2, dcp_size=2, comm="nccl", dcp_comm_backend="ag_rs", exchange_policy="narrow"
        ),
        "nccl 2x1": dict(tp_size=2, dcp_size=1, comm="nccl"),
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_equal_one_rank_with_graphs_and_fa3(checkpoint: Oracle, name: str) -> None:
    compare(checkpoint, **OPTIONS[name])


@pytest.mark.parametrize("name", ["triton", "8x8"])
def test_without_q_lora(lite_checkpoint: Oracle, name: str) -> None:
    compare(lite_checkpoint, **OPTIONS[name])


@pytest.mark.parametrize("name", ["triton", "4x2", "4x4 ag_rs, narrow, eager"])
def test_the_router_of_deepseek_v3(v3_checkpoint: Oracle, name: str) -> None:
    compare(v3_checkpoint, **OPTIONS[name])


@pytest.mark.parametrize("name", ["triton", "2x2", "4x2"])
def test_the_heads_of_glm(glm_checkpoint: Oracle, name: str) -> None:
    compare(glm_checkpoint, **OPTIONS[name])


def test_seeded_sampling_repeats_itself(checkpoint: Oracle) -> None:
    """On four ranks, without the prefix cache: a hit would round differently."""
    params = [
        SamplingParams(max_tokens=24, seed=i, top_p=0.9, top_k=40, ignore_eos=True)
        for i in range(10)
    ]
    options = dict(tp_size=4, dcp_size=4, num_blocks=200, max_model_len=1024, max_num_seqs=8)
    with LLM(str(checkpoint.path), device="cuda", prefix_cache=False, **options) as llm:
        together = [o.outputs[0].token_ids for o in llm.generate(checkpoint.prompts, params)]
        again = [o.outputs[0].token_ids for o in llm.generate(checkpoint.prompts, params)]
    assert together == again
    assert len({tuple(tokens) for tokens in together}) == len(params)


@pytest.mark.parametrize("strategy", ["gather_kv", "gather_q"])
@pytest.mark.parametrize("dcp", [1, 4])
def test_samples_share_blocks_of_the_step_that_computes_them(
    checkpoint: Oracle, dcp: int, strategy: str
) -> None:
    """Whoever read the cache before it is written would be far off fp32."""
    prompt = checkpoint.prompts[-1]
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=2)
    options = dict(tp_size=dcp, dcp_size=dcp, num_blocks=400, max_model_len=1024, max_num_seqs=16)
    with LLM(str(checkpoint.path), device="cuda", prefill_strategy=strategy, **options) as llm:
        # What a block held before is no help.
        llm.generate([make_prompt(700, 512, salt) for salt in range(1, 5)], params)
        before = llm.engine.stats.prompt_tokens
        first, *others = llm.generate([prompt] * 8, params)
        num_computed = llm.engine.stats.prompt_tokens - before
    num_shared = (len(prompt) - 1) // (16 * dcp) * (16 * dcp)
    assert num_computed == 8 * len(prompt) - 7 * num_shared
    noise = float(measure_errors(checkpoint.model, first).max())
    for output in others:
        assert float(measure_errors(checkpoint.model, output).max()) < 3 * noise + 0.02
