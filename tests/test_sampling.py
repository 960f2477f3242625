"""Sampling against the distribution that it should have, and text that grows token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_demo_checkpoint import EOS, make_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from minidcp.batch import SampleColumns
from minidcp.engine.detokenizer import Detokenizer
from minidcp.engine.sampler import gumbel_noise, mask_unlikely, sample

N = 20_000


def columns(
    count: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 7
) -> SampleColumns:
    """The same request at `count` positions."""
    return SampleColumns(
        rows=list(range(count)),
        temperature=[temperature] * count,
        top_k=[top_k] * count,
        top_p=[top_p] * count,
        seed=[seed] * count,
        position=list(range(count)),
        logprobs=[-1] * count,
    )


def frequencies(logits: torch.Tensor, **how: float) -> torch.Tensor:
    tokens = sample(logits.expand(N, -1), columns(N, **how), logits.argmax(-1).expand(N)).tokens
    return torch.bincount(tokens, minlength=logits.shape[-1]) / N


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    assert (frequencies(LOGITS, temperature=temperature) - expected).abs().max() < 4 * 0.5 / N**0.5


def test_top_k_and_top_p() -> None:
    probs = LOGITS.softmax(-1)
    for how, kept in (
        (dict(top_k=3), 3),
        (dict(top_p=0.5), 1),  # the first alone has 0.55
        (dict(top_p=0.6), 2),
        (dict(top_k=1, top_p=0.9), 1),
    ):
        expected = torch.where(torch.arange(6) < kept, probs, 0.0)
        expected /= expected.sum()
        assert (frequencies(LOGITS, **how) - expected).abs().max() < 4 * 0.5 / N**0.5, how


def test_zero_temperature_is_greedy_beside_sampling_rows() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 100)
    how = columns(50)
    how.temperature = [0.0, 1.0] * 25
    tokens = sample(logits, how, logits.argmax(-1)).tokens
    assert torch.equal(tokens[::2], logits[::2].argmax(-1))
    assert not torch.equal(tokens[1::2], logits[1::2].argmax(-1))


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
            return  # on the edge rounding decides
        if total >= top_p and top_p < 1:
            break
        nucleus.append(token)
        total += p
    masked = mask_unlikely(logits[None], columns(1, top_k=top_k, top_p=top_p))[0]
    assert sorted((masked > -torch.inf).nonzero()[:, 0].tolist()) == sorted(nucleus)
    assert torch.equal(masked[nucleus], logits[nucleus])


TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), eos_token=EOS)


# Hypothesis also tries strings that it finds in our sources, such as the special tokens'.
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
    parts = stream(Detokenizer(TOKENIZER, (), True), encode(text))
    assert "".join(parts) == text
    assert (
        all("\N{REPLACEMENT CHARACTER}" not in part for part in parts) or "\N{REPLACEMENT CHARACTER}" in text
    )


@given(st.lists(st.integers(2, 511), max_size=30))
def test_any_tokens_give_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    parts = stream(Detokenizer(TOKENIZER, (), True), ids)
    assert "".join(parts) == TOKENIZER.decode(ids)


@given(
    st.text("abc", min_size=1, max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_are_cut_and_never_leak(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(TOKENIZER, tuple(stops), True)
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
        assert len(out) < ends[0] + 4  # at or before the first stop string's end (tokens may hold several)
    else:
        assert out == text


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [*encode("one"), TOKENIZER.eos_token_id]
    assert "".join(stream(Detokenizer(TOKENIZER, (), True), ids)) == "one"
    assert "".join(stream(Detokenizer(TOKENIZER, (), False), ids)) == "one" + EOS
