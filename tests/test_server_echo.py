"""Requests like lm-eval's (echo, one token, logprobs, batches of ids) against transformers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from servers import BOS, PROMPT, Api, Server
from tokenizers import Tokenizer
from transformers import DeepseekV2ForCausalLM

pytest_plugins = ["servers"]
EOS = 1
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def api(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    flags = [
        "--ranks",
        "threads",
        "--tp-size",
        "2",
        "--dcp-size",
        "2",
        "--max-num-batched-tokens",
        "300",
    ]
    server = Server(demo, tmp_path_factory.mktemp("echo"), *flags, "--served-model-name", "demo")
    try:
        server.wait_until_healthy()
        yield Api(server.url, "demo")
        assert server.stop() in (0, -signal.SIGTERM)
    finally:
        server.kill()


@pytest.fixture(scope="module")
def model(demo: Path) -> DeepseekV2ForCausalLM:
    return DeepseekV2ForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()


def make_batch() -> list[list[int]]:
    """Prompts around block edges, and one that does not fit into a step."""
    generator = torch.Generator().manual_seed(3)
    lengths = (2, 3, 31, 32, 33, 64, 100, 400)
    return [[BOS, *torch.randint(5, 300, (n - 1,), generator=generator).tolist()] for n in lengths]


@pytest.mark.parametrize("forced_eos", [False, True])
def test_loglikelihoods(api: Api, model: DeepseekV2ForCausalLM, forced_eos: bool) -> None:
    """One entry more than the prompt has tokens, the first null, even if EOS comes next."""
    batch = make_batch()
    fields = dict(echo=True, max_tokens=1, logprobs=1, temperature=0, ignore_eos=False, seed=1234)
    if forced_eos:
        fields |= dict(logit_bias={EOS: 100})
    answer = api.complete(batch, **fields)
    assert [choice.index for choice in answer.choices] == list(range(len(batch)))
    for prompt, choice in zip(batch, answer.choices, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        entries = choice.logprobs
        assert entries.token_logprobs[0] is None and entries.top_logprobs[0] is None
        columns = (
            entries.tokens,
            entries.token_logprobs,
            entries.top_logprobs,
            entries.text_offset,
        )
        assert [len(column) for column in columns] == [len(prompt) + 1] * 4
        for position, logprob in enumerate(entries.token_logprobs[1:-1], 1):
            here = expected[position - 1]
            assert abs(logprob - float(here[prompt[position]])) < TOLERANCE
            # lm-eval's is_greedy: the token is the most likely one if no token in `top` is
            # likelier.
            top = entries.top_logprobs[position]
            assert abs(max(top.values()) - float(here.max())) < TOLERANCE
        chosen = EOS if forced_eos else int(expected[-1].argmax())
        assert abs(entries.token_logprobs[-1] - float(expected[-1, chosen])) < TOLERANCE
        assert choice.finish_reason == ("stop" if chosen == EOS else "length")


def test_echo_begins_the_text_whole_and_streamed(api: Api, tokenizer: Tokenizer) -> None:
    plain = api.complete()
    whole = api.complete(echo=True, n=2)
    assert [choice.text for choice in whole.choices] == [PROMPT + plain.choices[0].text] * 2
    assert whole.choices[0].logprobs is None
    chunks = api.stream(echo=True, logprobs=0)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len(chunks[0].choices[0].logprobs.tokens) == len(tokenizer.encode(PROMPT).ids) + 1
    assert all(len(chunk.choices[0].logprobs.tokens) == 1 for chunk in chunks[1:])
    ids = tokenizer.encode(PROMPT).ids
    assert (
        api.complete(ids, echo=True).choices[0].text
        == tokenizer.decode(ids) + plain.choices[0].text
    )


def test_special_tokens_are_added_or_not(api: Api, tokenizer: Tokenizer) -> None:
    bare = len(tokenizer.encode(PROMPT, add_special_tokens=False).ids)
    counts = [
        api.post(api.body(**f)).json()["usage"]["prompt_tokens"]
        for f in ({}, dict(add_special_tokens=False))
    ]
    assert counts == [bare + 1, bare]


def test_continuous_usage(api: Api) -> None:
    chunks = api.stream(
        max_tokens=5, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 3, 4, 5, 5]
    assert all(chunk.usage.prompt_tokens == chunks[0].usage.prompt_tokens > 0 for chunk in chunks)
