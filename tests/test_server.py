"""The HTTP server as clients see it: a real `minidcp serve` process with 4 ranks.

The openai client talks to it, or httpx where that client would not send or show something. Clients
that leave are tested with the application in this process, where the engine's blocks can be
counted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from openai.types import Completion
from servers import BOS, CONTEXT, LENGTH, LONG, PROMPT, Api, Local, Server, check_error, wait_until
from tokenizers import Tokenizer

pytest_plugins = ["servers"]
TOKENS_PER_BLOCK = 16 * 2  # --block-size × --dcp-size


@pytest.fixture(scope="module")
def api(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    logs = tmp_path_factory.mktemp("server")
    server = Server(demo, logs, "--ranks", "threads", "--tp-size", "4", "--dcp-size", "2")
    try:
        server.wait_until_healthy()
        yield Api(server.url, str(demo))
        assert server.stop() in (0, -signal.SIGTERM)
        # In spite of everything that the tests below have sent.
        assert "Traceback" not in server.stderr.read_text()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def greedy(api: Api) -> list[str]:
    """The texts of the events of a greedy completion of 48 tokens."""
    texts = [chunk.choices[0].text for chunk in api.stream(max_tokens=48)]
    assert len(texts) == 48
    return texts


def text_of(chunks: list[Completion], index: int = 0) -> str:
    return "".join(c.text for chunk in chunks for c in chunk.choices if c.index == index)


def test_streaming_gives_an_event_per_token_and_the_same_text(
    api: Api, tokenizer: Tokenizer
) -> None:
    whole = api.complete(max_tokens=48)
    assert whole.object == "text_completion"
    assert whole.model == api.model
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.prompt_tokens == len(tokenizer.encode(PROMPT).ids)
    assert whole.usage.completion_tokens == 48
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 48

    with api.http.stream(
        "POST", "/v1/completions", json=api.body(max_tokens=48, stream=True)
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    events, blanks = lines[::2], lines[1::2]
    assert set(blanks) == {""}  # so there are no comments
    assert all(line.startswith("data: ") for line in events)
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in events]
    assert len(chunks) == 48
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]} != {whole.id}
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert not any(chunk.get("usage") for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 47 + ["length"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole.choices[0].text


def test_a_usage_chunk_comes_where_it_is_asked_for(api: Api) -> None:
    chunks = api.stream(stream_options={"include_usage": True})
    usage = chunks.pop()
    assert usage.choices == []
    assert usage.id == chunks[0].id
    assert len(chunks) == usage.usage.completion_tokens == LENGTH
    assert usage.usage.total_tokens == usage.usage.prompt_tokens + LENGTH
    assert all(chunk.usage is None for chunk in chunks)
    for options in ({"include_usage": False}, {"include_usage": None}, {}):
        assert all(
            c.usage is None and c.choices for c in api.stream(max_tokens=2, stream_options=options)
        )


def test_usage_counts_cached_tokens(api: Api) -> None:
    prompt = [BOS, *range(5, 5 + 3 * TOKENS_PER_BLOCK)]
    usages = [api.complete(prompt, max_tokens=2).usage for _ in range(2)]
    assert [usage.prompt_tokens for usage in usages] == [len(prompt)] * 2
    assert [usage.prompt_tokens_details.cached_tokens for usage in usages] == [
        0,
        3 * TOKENS_PER_BLOCK,
    ]


def find_stops(texts: list[str]) -> dict[str, str]:
    """Stop strings that occur in a completion, by their position in its tokens' texts."""
    stops = {}
    whole = "".join(texts)
    for at in range(8, len(texts) - 2):
        one, two, three = texts[at : at + 3]
        candidates = {
            "a token's middle": one[1:-1],
            "two tokens": one[-1:] + two[:1] if one and two else "",
            "three tokens": one[-1:] + two + three[:1] if one and two and three else "",
        }
        for kind, stop in candidates.items():
            if stop and "\ufffd" not in stop and whole.find(stop) >= len("".join(texts[:at])):
                stops.setdefault(kind, stop)
    assert len(stops) == 3
    return stops


@pytest.mark.parametrize("kind", ["a token's middle", "two tokens", "three tokens"])
def test_stop_strings_end_the_text_and_never_leak(api: Api, greedy: list[str], kind: str) -> None:
    whole, stop = "".join(greedy), find_stops(greedy)[kind]
    count = next(n for n in range(len(greedy)) if stop in "".join(greedy[:n]))
    expected = whole[: whole.index(stop)]

    answer = api.complete(max_tokens=48, stop=stop)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == count
    chunks = api.stream(max_tokens=48, stop=["\x00\x00", stop])
    assert text_of(chunks) == expected
    assert len(chunks) == count
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (count - 1) + ["stop"]


def test_the_earliest_of_several_stop_strings_counts(api: Api, greedy: list[str]) -> None:
    whole, stops = "".join(greedy), list(find_stops(greedy).values())
    expected = whole[: min(whole.index(stop) for stop in stops)]
    for order in (stops, stops[::-1]):
        assert api.complete(max_tokens=48, stop=order).choices[0].text == expected


def test_what_only_began_like_a_stop_string_is_not_lost(api: Api, greedy: list[str]) -> None:
    whole = "".join(greedy)
    stop = [whole[-2:] + "\x00", whole[20:23] + "\x00"]
    assert api.complete(max_tokens=48, stop=stop).choices[0].text == whole
    chunks = api.stream(max_tokens=48, stop=stop)
    assert text_of(chunks) == whole
    assert len(chunks) == 48
    assert chunks[-1].choices[0].finish_reason == "length"


def test_stop_token_ids(api: Api, greedy: list[str], tokenizer: Tokenizer) -> None:
    for at, text in enumerate(greedy[8:], 8):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) == 1 and text in tokenizer.get_vocab() and text not in greedy[:at]:
            break
    answer = api.complete(max_tokens=48, stop_token_ids=[511, *ids])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == "".join(greedy[:at])
    assert answer.usage.completion_tokens == at + 1  # the stop token counts, but has no text
    chunks = api.stream(max_tokens=48, stop_token_ids=ids)
    assert text_of(chunks) == "".join(greedy[:at])
    assert len(chunks) == at + 1


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(api: Api) -> None:
    sampling = dict(temperature=1, seed=7)
    alone = api.complete(**sampling).choices[0].text
    assert alone != api.complete(temperature=1, seed=8).choices[0].text
    assert alone != api.complete().choices[0].text
    assert text_of(api.stream(**sampling)) == alone

    async def crowd() -> list[Completion]:
        others = [
            api.complete_async(f"How many {n}", temperature=1, max_tokens=8 * n)
            for n in range(1, 6)
        ]
        same = [api.complete_async(**sampling), api.complete_async(temperature=1, seed=8)]
        return await asyncio.gather(*others[:3], *same, *others[3:])

    texts = [answer.choices[0].text for answer in asyncio.run(crowd())]
    assert texts[3] == alone != texts[4]
    # Without a seed, each request gets a new one.
    assert len({api.complete(temperature=1).choices[0].text for _ in range(2)}) == 2


def test_top_k_and_top_p_that_leave_one_token_are_greedy(api: Api) -> None:
    expected = api.complete().choices[0].text
    for fields in (dict(top_k=1), dict(top_p=1e-6), dict(top_p=1e-50), dict(top_k=1, top_p=0.5)):
        assert api.complete(temperature=1, **fields).choices[0].text == expected, fields


def test_concurrent_requests_do_not_mix(api: Api) -> None:
    prompts = [
        f"{word} and so on"
        for word in ("Once", "Every", "How", "Now", "The", "user", "asks", "0 1 2")
    ]

    async def all_at_once() -> list[Completion]:
        return await asyncio.gather(*(api.complete_async(p, max_tokens=12) for p in prompts))

    together = [answer.choices[0].text for answer in asyncio.run(all_at_once())]
    assert together == [api.complete(p, max_tokens=12).choices[0].text for p in prompts]
    assert len(set(together)) == len(prompts)


def test_logprobs(api: Api) -> None:
    answer = api.complete(logprobs=3)
    logprobs = answer.choices[0].logprobs
    columns = (
        logprobs.tokens,
        logprobs.token_logprobs,
        logprobs.top_logprobs,
        logprobs.text_offset,
    )
    assert [len(column) for column in columns] == [LENGTH] * 4
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    for token, logprob, top in zip(*columns[:3], strict=True):
        assert 1 <= len(top) <= 3  # two ids may have the same text
        assert top[token] == logprob == max(top.values()) <= 0  # greedy

    chunks = [chunk.choices[0].logprobs for chunk in api.stream(logprobs=3)]
    assert [chunk.tokens for chunk in chunks] == [[token] for token in logprobs.tokens]
    assert [c.token_logprobs[0] for c in chunks] == pytest.approx(logprobs.token_logprobs, abs=1e-3)
    assert [chunk.text_offset[0] for chunk in chunks] == logprobs.text_offset
    assert all(len(chunk.top_logprobs) == 1 for chunk in chunks)

    sampled = api.complete(logprobs=1, temperature=1, seed=5).choices[0].logprobs
    for token, logprob, top in zip(
        sampled.tokens, sampled.token_logprobs, sampled.top_logprobs, strict=True
    ):
        assert token in top  # even if it was not the likeliest
        assert logprob <= max(top.values())
    assert max(len(top) for top in sampled.top_logprobs) == 2
    assert api.complete(logprobs=0, max_tokens=2).choices[0].logprobs.token_logprobs
    assert api.complete(max_tokens=2).choices[0].logprobs is None


def test_four_shapes_of_prompts(api: Api, tokenizer: Tokenizer) -> None:
    texts = [PROMPT, "How many tokens fit?"]
    ids = [tokenizer.encode(text).ids for text in texts]
    expected = [api.complete(text).choices[0].text for text in texts]
    assert expected[0] != expected[1]
    assert api.complete(ids[1]).choices[0].text == expected[1]
    for prompt in (texts, ids):
        answer = api.complete(prompt)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 2 * LENGTH
        chunks = api.stream(prompt)
        assert [text_of(chunks, index) for index in range(2)] == expected
        assert len(chunks) == 2 * LENGTH
        assert len({chunk.id for chunk in chunks}) == 1
    for prompt in (texts[:1], ids[:1]):
        assert [choice.text for choice in api.complete(prompt).choices] == expected[:1]


def test_text_gets_a_bos_and_token_ids_do_not(api: Api, tokenizer: Tokenizer) -> None:
    bare = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    text, with_bos, without = (api.complete(prompt) for prompt in (PROMPT, [BOS, *bare], bare))
    assert text.usage.prompt_tokens == with_bos.usage.prompt_tokens == len(bare) + 1
    assert text.choices[0].text == with_bos.choices[0].text
    assert without.usage.prompt_tokens == len(bare)
    assert without.choices[0].text != text.choices[0].text


def test_max_tokens_and_its_other_name(api: Api) -> None:
    assert api.complete(max_tokens=3).usage.completion_tokens == 3
    assert api.complete(max_tokens=None, max_completion_tokens=5).usage.completion_tokens == 5
    assert api.complete(max_tokens=3, max_completion_tokens=5).usage.completion_tokens == 5
    default = api.post({"model": api.model, "prompt": [5, 6], "ignore_eos": True})
    assert default.json()["usage"]["completion_tokens"] == 16


def test_every_optional_field_takes_null(api: Api) -> None:
    names = """max_tokens max_completion_tokens temperature top_p top_k seed stop stop_token_ids
        ignore_eos skip_special_tokens logprobs stream stream_options n best_of echo suffix
        presence_penalty frequency_penalty repetition_penalty min_tokens min_p logit_bias
        response_format tools user model"""
    response = api.post({"prompt": PROMPT} | dict.fromkeys(names.split()))
    assert response.status_code == 200, response.text
    assert 1 <= response.json()["usage"]["completion_tokens"] <= 16


def test_unknown_fields_and_values_that_ask_for_nothing_are_ignored(api: Api) -> None:
    neutral = dict(n=1, best_of=1, echo=False, suffix="", presence_penalty=0.0, frequency_penalty=0)
    neutral |= dict(logit_bias={}, min_p=0.0, repetition_penalty=1.0, tools=[])
    response = api.post(api.body(**neutral, user="me", colour="blue", nested={"a": [1]}))
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == api.complete().choices[0].text


def test_biases_and_penalties_by_their_effect(api: Api) -> None:
    def tokens(**fields: object) -> list[str]:
        completion = api.complete(max_tokens=24, logprobs=0, **fields)
        return completion.choices[0].logprobs.tokens

    plain = tokens()
    forced = tokens(logit_bias={"300": 100})
    assert len(set(forced)) == 1 and forced != plain
    # A bias of 100 wins against penalties.
    assert len(set(tokens(logit_bias={"300": 100}, presence_penalty=2, frequency_penalty=2))) == 1
    # A bias of 20 loses after some repetitions.
    assert len(set(tokens(logit_bias={"300": 20}, frequency_penalty=2))) > 1
    assert tokens(min_p=1, temperature=1) == plain
    stops = dict(max_tokens=24, logit_bias={"300": 100}, stop_token_ids=[300])
    assert api.complete(**stops).usage.completion_tokens == 1
    assert api.complete(**stops, min_tokens=5).usage.completion_tokens == 6


@pytest.fixture(scope="module")
def first_words(api: Api) -> str:
    return api.complete(max_tokens=3).choices[0].text


@pytest.fixture
def unharmed(api: Api, first_words: str) -> Iterator[None]:
    """Check that after the test the server answers as before."""
    yield
    assert api.http.get("/health").status_code == 200
    assert api.complete(max_tokens=3).choices[0].text == first_words


WRONG_VALUES = [
    ("temperature", -0.1),
    ("temperature", 101),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", -2),
    ("top_k", 2**80),
    ("seed", 2**63),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("logprobs", -1),
    ("logprobs", 21),
    ("n", 0),
    ("n", 129),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", [[5], []]),
    ("prompt", [512]),
    ("prompt", [-1]),
    ("prompt", [[5], [10**30]]),
    ("prompt", "\ud800"),
]
WRONG_TYPES = [
    ("model", 5),
    ("prompt", 5),
    ("prompt", None),
    ("prompt", {"text": "a"}),
    ("prompt", ["a", 5]),
    ("prompt", [[5], "a"]),
    ("prompt", [1.5]),
    ("max_tokens", "many"),
    ("max_tokens", 1.5),
    ("temperature", "hot"),
    ("top_p", []),
    ("top_k", 1.5),
    ("seed", "x"),
    ("stop", 5),
    ("stop", [5]),
    ("stop_token_ids", 5),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", [512]),
    ("stop_token_ids", [10**30]),
    ("ignore_eos", "perhaps"),
    ("logprobs", "x"),
    ("stream", "perhaps"),
    ("stream_options", 5),
    ("n", "many"),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0),
    ("min_tokens", -1),
    ("min_tokens", 1000),
    ("min_p", 2),
    ("logit_bias", {"5": 200}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"99999999": 1}),
]
UNSUPPORTED = [
    ("best_of", 2),
    ("suffix", "x"),
    ("prompt_logprobs", 1),
    ("guided_json", {"type": "objet"}),
    ("response_format", {"type": "structural_tag"}),
    ("tools", [{"type": "function"}]),
    ("stream_options", {"include_usage": True}),  # without stream
]


@pytest.mark.parametrize(("field", "value"), WRONG_VALUES + WRONG_TYPES + UNSUPPORTED, ids=repr)
def test_wrong_fields_are_refused_by_name(
    api: Api, unharmed: None, field: str, value: object
) -> None:
    check_error(api.post(api.body(**{field: value})), 400, field, field)


def test_a_missing_prompt_is_refused(api: Api, unharmed: None) -> None:
    check_error(api.post({"model": api.model}), 400, "prompt", "prompt")


def test_errors_reach_the_openai_client(api: Api, unharmed: None) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        api.complete(temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match=r"n 200: .*128"):
        api.stream(n=200)  # the stream has not begun, so the status can be an error
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        api.complete(model="no-such-model")


@pytest.mark.parametrize(
    ("length", "max_tokens"), [(CONTEXT, 1), (10 * CONTEXT, 1), (3, CONTEXT - 2), (3, 10**30)]
)
def test_what_exceeds_the_context_is_refused(
    api: Api, unharmed: None, length: int, max_tokens: int
) -> None:
    response = api.post(api.body([5] * length, max_tokens=max_tokens))
    check_error(response, 400, f"This model's maximum context length is {CONTEXT} tokens")
    assert str(length + max_tokens) in response.text


@pytest.mark.parametrize(
    "content", [b"", b"{bad", b'{"prompt": "a"', b"\xff\xfe", b"[]", b'"text"', b"null"]
)
def test_bodies_that_are_no_json_object_are_refused(
    api: Api, unharmed: None, content: bytes
) -> None:
    check_error(api.post_bytes(content), 400, "")


def test_wrong_models_paths_and_methods(api: Api, unharmed: None) -> None:
    check_error(api.post(api.body(model="gpt-2")), 404, "'gpt-2' does not exist")
    check_error(api.http.get("/v1/nothing"), 404, "Not Found")
    check_error(api.http.post("/v1/completion", json=api.body()), 404, "Not Found")
    response = api.http.get("/v1/completions")
    check_error(response, 405, "Method Not Allowed")
    assert response.headers["allow"] == "POST"
    check_error(api.http.post("/health"), 405, "Method Not Allowed")


def test_models(api: Api) -> None:
    (card,) = api.client.models.list().data
    assert api.client.models.retrieve(api.model).id == card.id
    with pytest.raises(openai.NotFoundError):
        api.client.models.retrieve("gpt-2")
    assert (card.id, card.root, card.max_model_len) == (api.model, api.model, CONTEXT)


# From here on, the application runs in this process.


@pytest.fixture
def no_errors_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR] == []


def test_eos_ends_a_completion_and_ignore_eos_is_obeyed(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[BOS, n] for n in range(5, 9)]
    ends = replace(local.engine.model_config, eos_token_ids=tuple(range(0, 512, 8)))
    monkeypatch.setattr(local.engine, "model_config", ends)
    short = local.api.complete(prompts, max_tokens=48, logprobs=0, ignore_eos=False).choices
    long = local.api.complete(prompts, max_tokens=48, logprobs=0, ignore_eos=True).choices
    for ended, ran_on in zip(short, long, strict=True):
        count = len(ended.logprobs.tokens)
        assert count < 48 == len(ran_on.logprobs.tokens)
        assert (ended.finish_reason, ran_on.finish_reason) == ("stop", "length")
        assert ended.logprobs.tokens == ran_on.logprobs.tokens[:count]
        assert ran_on.text.startswith(ended.text.rstrip("\ufffd"))  # it may end inside a character
        assert len(ended.text) <= sum(map(len, ended.logprobs.tokens[:-1]))  # without the EOS token


def leave_stream(api: Api) -> None:
    with api.http.stream("POST", "/v1/completions", json=api.body(**LONG, stream=True)) as response:
        events = (line for line in response.iter_lines() if line)
        assert next(events).startswith("data: {")
        assert next(events).startswith("data: {")


def leave_openai_stream(api: Api) -> None:
    with api.client.completions.create(**api.arguments(PROMPT, LONG), stream=True) as stream:
        assert next(stream).id == next(stream).id


def time_out(api: Api) -> None:
    with pytest.raises(httpx.ReadTimeout):
        api.http.post("/v1/completions", json=api.body(**LONG), timeout=0.5)


def cancel(api: Api) -> None:
    async def start_and_cancel() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(api.complete_async(**LONG), 0.5)

    asyncio.run(start_and_cancel())


@pytest.mark.parametrize("leave", [leave_stream, leave_openai_stream, time_out, cancel])
def test_a_client_that_leaves_frees_its_blocks(
    local: Local, no_errors_logged: None, leave: Callable[[Api], None]
) -> None:
    expected = local.api.complete().choices[0].text
    with local.expect_leaving():
        leave(local.api)
    assert local.api.complete().choices[0].text == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_all_its_prompts(
    local: Local, no_errors_logged: None, stream: bool
) -> None:
    """Two of the four requests run, and two wait."""
    prompts = [[BOS, n] for n in range(5, 9)]
    with local.expect_leaving():
        body = local.api.body(prompts, **LONG, stream=stream)
        if stream:
            with local.api.http.stream("POST", "/v1/completions", json=body) as response:
                assert next(response.iter_lines()).startswith("data: ")
                wait_until(lambda: local.is_busy(4), 5, "not all prompts are there")
        else:
            with pytest.raises(httpx.ReadTimeout):
                local.api.http.post("/v1/completions", json=body, timeout=0.5)


def test_one_client_leaves_and_another_stays(local: Local) -> None:
    expected = local.api.complete(max_tokens=64).choices[0].text

    async def leave_and_stay() -> str:
        leaving = asyncio.create_task(local.api.complete_async("Every machine", **LONG))
        staying = asyncio.create_task(local.api.complete_async(max_tokens=64))
        while not local.is_busy(2):
            await asyncio.sleep(0.005)
            assert not staying.done()
        leaving.cancel()
        return (await staying).choices[0].text

    with local.expect_leaving():
        assert asyncio.run(leave_and_stay()) == expected
