"""A checkpoint in FP8 on a GPU, in graphs: multiplied in FP8, and dequantised to bf16."""

from __future__ import annotations

import functools

import pytest
import torch
from checkpoints import Oracle, measure_errors

from minidcp import LLM, RequestOutput, SamplingParams

pytestmark = pytest.mark.gpu
STEPS = 24
LAYOUTS: dict[str, dict[str, object]] = {
    "1x1": dict(ranks="threads"),
    "2x2": dict(tp_size=2, dcp_size=2),
}


@functools.cache
def run(oracle: Oracle, device: str, quantization: str, layout: str) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True, logprobs=2)
    options = dict(
        device=device,
        dtype="bfloat16",
        quantization=quantization,
        max_model_len=1024,
        num_blocks=400,
        max_num_seqs=16,
        max_num_batched_tokens=512,
    )
    with LLM(str(oracle.path), **(options | LAYOUTS[layout])) as llm:
        expected = "fp8" if quantization == "auto" else quantization
        assert llm.engine.config.quantization == expected
        return llm.generate(oracle.prompts, params)


def measure(oracle: Oracle, outputs: list[RequestOutput]) -> torch.Tensor:
    """Errors of log-probabilities against transformers' dequantised model in fp32."""
    return torch.cat([measure_errors(oracle.model, output) for output in outputs])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quantization", ["auto", "none"])
def test_answers_are_as_near_fp32_as_a_cpu(
    fp8_checkpoint: Oracle, quantization: str, layout: str
) -> None:
    """A GPU chooses FP8 by itself.

    The CPU's engine rounds to the same formats at the same places, and multiplies with torch. So
    its errors against fp32 are the measure: ours are of the same size. Ranks, and sums in another
    order, round some values to their other neighbour, which changes each error, but hardly their
    mean square. Tokens differ only where these errors can decide.
    """
    base = run(fp8_checkpoint, "cpu", "fp8" if quantization == "auto" else "none", "1x1")
    outputs = run(fp8_checkpoint, "cuda", quantization, layout)
    base_errors, errors = (measure(fp8_checkpoint, each) for each in (base, outputs))
    rms, base_rms = (float(each.square().mean().sqrt()) for each in (errors, base_errors))
    noise = max(float(errors.max()), float(base_errors.max()))
    equal = 0
    for ours, theirs in zip(outputs, base, strict=True):
        pairs = list(zip(ours.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True))
        split = next((i for i, (x, y) in enumerate(pairs) if x.token_id != y.token_id), STEPS)
        if split < STEPS:
            (_, best), (_, second) = pairs[split][1].top
            assert best - second < 2 * noise, f"step {split} after {len(ours.prompt_token_ids)}"
        equal += split
    total = STEPS * len(outputs)
    print(f"{quantization} {layout}: off fp32 by {rms:.4f} (CPU {base_rms:.4f}) rms")
    print(f"{quantization} {layout}: {equal} of {total} tokens equal, noise {noise:.4f}")
    assert base_rms / 1.5 < rms < 1.5 * base_rms
    assert equal > total // 3
