"""Penalties, biases and min_tokens in the whole engine, compared with transformers."""

from __future__ import annotations

import pytest
import torch
from checkpoints import Oracle

from minidcp import LLM, SamplingParams

STEPS = 24


def complete(oracle: Oracle, prompt: list[int], **how: object) -> list[int]:
    ids = torch.tensor([prompt])
    out = oracle.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=0,
        **how,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (dict(repetition_penalty=1.5), dict(repetition_penalty=1.5)),
        (dict(logit_bias={17: 4.0, 30: -6.0}), dict(sequence_bias={(17,): 4.0, (30,): -6.0})),
        (
            dict(repetition_penalty=0.7, min_tokens=9, stop_token_ids=[20, 21, 22]),
            dict(repetition_penalty=0.7, min_new_tokens=9, eos_token_id=[1, 20, 21, 22]),
        ),
    ],
    ids=["repetition", "bias", "min_tokens"],
)
@pytest.mark.usefixtures("crowded")
def test_against_transformers(v2: Oracle, ours: dict, theirs: dict) -> None:
    """Four ranks with too few blocks: requests are preempted, and their counts start again."""
    prompts = [p for p in v2.prompts if len(p) < 70]
    params = SamplingParams(max_tokens=STEPS, temperature=0.0, **ours)
    with LLM(
        str(v2.path),
        tp_size=4,
        dcp_size=4,
        ranks="threads",
        device="cpu",
        max_model_len=128,
        block_size=4,
        num_blocks=12,
        max_num_batched_tokens=48,
        max_num_seqs=8,
    ) as llm:
        outputs = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
        assert llm.engine.scheduler.num_preemptions > 0
    plain = [tokens[:STEPS] for tokens in v2.tokens]
    assert outputs != plain[: len(prompts)], "it has no effect"
    assert outputs == [complete(v2, prompt, **theirs) for prompt in prompts]


def test_presence_and_frequency_penalties_make_tokens_rarer(v2: Oracle) -> None:
    prompt = v2.prompts[-1]
    counts = {}
    with LLM(str(v2.path), device="cpu", max_model_len=512) as llm:
        for name, value in (("none", 0.0), ("presence", 2.0), ("frequency", 2.0)):
            penalties = {} if name == "none" else {f"{name}_penalty": value}
            params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True, **penalties)
            counts[name] = len(set(llm.generate([prompt], params)[0].outputs[0].token_ids))
    assert counts["none"] < counts["presence"] < 100
    assert counts["none"] < counts["frequency"]


@pytest.mark.parametrize(
    ("how", "field"),
    [
        (dict(repetition_penalty=0), "repetition_penalty 0"),
        (dict(presence_penalty=2.5), "presence_penalty 2.5"),
        (dict(frequency_penalty="1"), "frequency_penalty '1'"),
        (dict(min_p=1.5), "min_p 1.5"),
        (dict(min_tokens=17, max_tokens=16), "min_tokens 17"),
        (dict(logit_bias={5: 200}), "logit_bias"),
        (dict(logit_bias={-1: 2}), "logit_bias"),
    ],
)
def test_values_out_of_range_are_named(how: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**how)


def test_a_bias_on_an_unknown_token_is_refused(v2: Oracle) -> None:
    with LLM(str(v2.path), device="cpu") as llm, pytest.raises(ValueError, match="logit_bias 128"):
        llm.generate([[5]], SamplingParams(logit_bias={128: 1.0}))


@pytest.mark.usefixtures("crowded")
def test_prompt_logprobs(v2: Oracle) -> None:
    """Log-probabilities of all prompt tokens but the first, with chunks, preemption and a cache."""
    prompts = [p for p in v2.prompts if len(p) > 1]
    params = SamplingParams(
        max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=1, prompt_logprobs=3
    )
    options = dict(
        tp_size=2, dcp_size=2, ranks="threads", device="cpu", max_model_len=320, block_size=4
    )
    with LLM(
        str(v2.path), num_blocks=42, max_num_batched_tokens=90, max_num_seqs=8, **options
    ) as llm:
        outputs = llm.generate(prompts + prompts, params)
        assert llm.engine.scheduler.num_preemptions > 0
        plain = llm.generate([prompts[0]], SamplingParams(max_tokens=1))[0]
    assert plain.prompt_logprobs is None
    tokens = [t[:8] for t, p in zip(v2.tokens, v2.prompts, strict=True) if len(p) > 1]
    for prompt, expected_tokens, output in zip(prompts * 2, tokens * 2, outputs, strict=True):
        with torch.no_grad():
            expected = v2.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert output.outputs[0].token_ids == expected_tokens
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
        for position, entry in enumerate(output.prompt_logprobs[1:], 1):
            here = expected[position - 1]
            assert entry.token_id == prompt[position]
            assert abs(entry.logprob - float(here[entry.token_id])) < 1e-3
            assert [value for _, value in entry.top] == pytest.approx(
                here.topk(3).values.tolist(), abs=1e-3
            )
