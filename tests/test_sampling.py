"""Sampling compared with the distribution it should have, and text that grows by tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_demo_checkpoint import EOS, make_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from minidcp import SamplingParams
from minidcp.batch import Admission, StepPlan
from minidcp.engine.detokenizer import Detokenizer
from minidcp.worker.sampler import Sampler, gumbel_noise, mask_unlikely

N = 20_000


def choose(
    logits: torch.Tensor, *params: SamplingParams, sampler: Sampler | None = None
) -> torch.Tensor:
    """Sample a token per row of logits. Rows take turns with `params`, at positions 0, 1, …"""
    rows = list(range(len(logits)))
    plan = StepPlan(len(rows), rows, rows, [1] * len(rows), sampling=rows)
    sampler = sampler or Sampler()
    sampler.admit(
        StepPlan(admitted=[Admission(row, params[row % len(params)], seed=7) for row in rows])
    )
    return sampler.sample(logits, plan, logits.argmax(-1)).tokens


def frequencies(logits: torch.Tensor, **how: float) -> torch.Tensor:
    tokens = choose(logits.expand(N, -1), SamplingParams(**how))
    return torch.bincount(tokens, minlength=logits.shape[-1]) / N


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    assert (frequencies(LOGITS, temperature=temperature) - expected).abs().max() < 4 * 0.5 / N**0.5


def test_top_k_top_p_and_min_p() -> None:
    probs = LOGITS.softmax(-1)
    for how, kept in (
        (dict(top_k=3), 3),
        (dict(top_p=0.5), 1),  # the first token alone has 0.55
        (dict(top_p=0.6), 2),
        (dict(top_k=1, top_p=0.9), 1),
        (dict(min_p=0.2), 3),  # relative to the best: e^0, e^-1, e^-1.5, e^-2, …
        (dict(min_p=1.0), 1),
    ):
        expected = torch.where(torch.arange(6) < kept, probs, 0.0)
        expected /= expected.sum()
        assert (frequencies(LOGITS, **how) - expected).abs().max() < 4 * 0.5 / N**0.5, how


def test_zero_temperature_is_greedy_beside_sampling_rows() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 100)
    tokens = choose(logits, SamplingParams(temperature=0.0), SamplingParams())
    assert torch.equal(tokens[::2], logits[::2].argmax(-1))
    assert not torch.equal(tokens[1::2], logits[1::2].argmax(-1))


def test_penalties_biases_and_bans_against_their_definitions() -> None:
    """Several steps, beside a plain row. Counts grow with the sampled tokens."""
    torch.manual_seed(0)
    prompt, output, vocab = [3, 3, 5], [7], 12
    plain = SamplingParams(temperature=0.0)
    params = SamplingParams(
        temperature=0.0,
        presence_penalty=0.7,
        frequency_penalty=0.3,
        repetition_penalty=1.4,
        logit_bias={2: 5.0, 9: -100.0},
        min_tokens=3,
    )
    sampler = Sampler()
    admitted = Admission(4, params, 0, len(prompt), stop_ids=(1,), history=(*prompt, *output))
    sampler.admit(StepPlan(admitted=[Admission(0, plain), admitted]))
    for step in range(6):
        logits = torch.randn(2, vocab) * 3
        expected = logits[1].clone()
        for token in range(vocab):
            if token in prompt or token in output:
                expected[token] *= 1.4 if expected[token] < 0 else 1 / 1.4
            expected[token] -= 0.3 * output.count(token) + 0.7 * (token in output)
        expected[2] += 5
        expected[9] -= 100
        if step < 2:  # the second and third token of the output
            expected[1] = -torch.inf
        before = logits.clone()
        position = len(prompt) + len(output)
        torch.testing.assert_close(sampler.adjust(logits[1], admitted, position), expected)
        plan = StepPlan(2, [0, 4], [9, position - 1], [1, 1], sampling=[0, 1])
        sampled = sampler.sample(logits, plan, logits.argmax(-1)).tokens
        assert torch.equal(logits, before)
        assert sampled.tolist() == [int(logits[0].argmax()), int(expected.argmax())]
        output = [*output, int(sampled[1])]


def test_noise_depends_on_seed_and_position_only() -> None:
    seeds, positions = torch.tensor([1, 2, 1, 1]), torch.tensor([5, 5, 6, 5])
    noise = gumbel_noise(seeds, positions, 1000)
    assert torch.equal(noise[0], noise[3])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert torch.corrcoef(noise[[a, b]])[0, 1].abs() < 0.15
    whole = gumbel_noise(torch.arange(100), torch.zeros(100, dtype=torch.int64), 1000)
    assert whole.mean() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert whole.var() == pytest.approx(torch.pi**2 / 6, abs=0.03)


@settings(deadline=None)
@given(st.integers(0, 12), st.floats(0.01, 1.0), st.integers(0, 1000))
def test_mask_against_brute_force(top_k: int, top_p: float, seed: int) -> None:
    logits = torch.randn(10, generator=torch.Generator().manual_seed(seed))
    order = logits.argsort(descending=True).tolist()
    kept = order[: top_k or 10]
    probs = logits[kept].double().softmax(-1)
    total, nucleus = 0.0, []
    for token, p in zip(kept, probs.tolist(), strict=True):
        if top_p < 1 and abs(total - top_p) < 1e-5:
            return  # at the edge, rounding decides
        if total >= top_p and top_p < 1:
            break
        nucleus.append(token)
        total += p
    masked = mask_unlikely(logits[None], [SamplingParams(top_k=top_k, top_p=top_p)])[0]
    assert sorted((masked > -torch.inf).nonzero()[:, 0].tolist()) == sorted(nucleus)
    assert torch.equal(masked[nucleus], logits[nucleus])


TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), eos_token=EOS)


# Hypothesis also tries strings from our sources, such as those of special tokens.
texts = st.text(max_size=30).filter(lambda text: "<｜" not in text)


def encode(text: str) -> list[int]:
    tokenizer: Tokenizer = TOKENIZER.backend_tokenizer
    return tokenizer.encode(text, add_special_tokens=False).ids


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    parts = []
    for token in ids:
        parts.append(detokenizer.append(token))
        if detokenizer.stopped:
            return parts
    return [*parts, detokenizer.flush()]


@given(texts)
def test_text_grows_to_the_whole(text: str) -> None:
    parts = stream(Detokenizer(TOKENIZER, SamplingParams()), encode(text))
    assert "".join(parts) == text
    assert (
        all("\N{REPLACEMENT CHARACTER}" not in part for part in parts)
        or "\N{REPLACEMENT CHARACTER}" in text
    )


@given(st.lists(st.integers(2, 511), max_size=30))
def test_any_tokens_give_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    parts = stream(Detokenizer(TOKENIZER, SamplingParams()), ids)
    assert "".join(parts) == TOKENIZER.decode(ids)


@given(
    st.text("abc", min_size=1, max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_are_cut_and_never_leak(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(stop=stops))
    out = ""
    for token in encode(text):
        out += detokenizer.append(token)
        assert not any(stop in out for stop in stops)
        if detokenizer.stopped:
            break
    else:
        out += detokenizer.flush()
    ends = [i for i in range(len(text) + 1) if any(text[:i].endswith(stop) for stop in stops)]
    assert detokenizer.stopped == bool(ends)
    if ends:
        assert text.startswith(out) and any(text[len(out) :].startswith(stop) for stop in stops)
        # It ends at the first stop string or before it: a token may hold several of them.
        assert len(out) < ends[0] + 4
    else:
        assert out == text


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [*encode("one"), TOKENIZER.eos_token_id]
    assert "".join(stream(Detokenizer(TOKENIZER, SamplingParams()), ids)) == "one"
    assert (
        "".join(stream(Detokenizer(TOKENIZER, SamplingParams(skip_special_tokens=False)), ids))
        == "one" + EOS
    )
