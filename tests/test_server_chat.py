"""Chats, several choices per prompt, and the tokenizer's endpoints, as clients see them."""

from __future__ import annotations

import codecs
import json

import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from servers import BOS, CONTEXT, LENGTH, PROMPT, Api, Local, check_error
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

import minidcp

pytest_plugins = ["servers"]
CHAT = "/v1/chat/completions"
MESSAGES = [
    {"role": "system", "content": "Be brief, naïve and 日本."},
    {"role": "user", "content": "How many tokens fit?"},
    {"role": "assistant", "content": "Eight times as many."},
    {"role": "user", "content": "What does it cost?"},
]
SAMPLED = dict(temperature=1, seed=7)
PART = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def api(local: Local) -> Api:
    return local.api


@pytest.fixture
def inner(local: Local, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    """The server's tokenizer, with a template that the test may change."""
    monkeypatch.setattr(
        local.engine.tokenizer, "chat_template", local.engine.tokenizer.chat_template
    )
    return local.engine.tokenizer


def render(tokenizer: Tokenizer) -> list[int]:
    """Render MESSAGES by hand, like the demo's template."""
    system, one, answer, two = (message["content"] for message in MESSAGES)
    bos, eos = tokenizer.id_to_token(BOS), tokenizer.id_to_token(1)
    text = f"{bos}{system}\n\nUser: {one}\n\nAssistant: {answer}{eos}User: {two}\n\nAssistant:"
    return tokenizer.encode(text, add_special_tokens=False).ids


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    return "".join(c.delta.content for chunk in chunks for c in chunk.choices if c.index == index)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_chat_is_the_completion_of_the_rendered_tokens(
    api: Api, tokenizer: Tokenizer, sampling: dict
) -> None:
    ids = render(tokenizer)
    assert ids.count(BOS) == 1
    expected, answer = api.complete(ids, **sampling), api.chat(MESSAGES, **sampling)
    (choice,) = answer.choices
    assert (answer.object, answer.model) == ("chat.completion", api.model)
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.message.content == expected.choices[0].text
    assert choice.logprobs is None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == LENGTH
    assert answer.usage.total_tokens == len(ids) + LENGTH
    again = api.chat(MESSAGES, **sampling)
    assert again.usage.prompt_tokens_details.cached_tokens == (len(ids) - 1) // 16 * 16 > 0
    assert again.choices[0].message.content == choice.message.content


def test_streaming_a_chat(api: Api) -> None:
    whole = api.chat(MESSAGES).choices[0].message.content
    chunks = api.chat_stream(MESSAGES)
    assert len(chunks) == LENGTH  # no event without a token
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (
        LENGTH - 1
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (LENGTH - 1) + [
        "length"
    ]
    assert text_of(chunks) == whole
    assert not any(chunk.usage for chunk in chunks)

    *chunks, last = api.chat_stream(MESSAGES, stream_options={"include_usage": True})
    assert (last.choices, last.id) == ([], chunks[0].id)
    assert last.usage.completion_tokens == len(chunks) == LENGTH
    assert last.usage.prompt_tokens_details.cached_tokens > 0

    body = api.body(max_tokens=2, stream=True, messages=MESSAGES)
    with api.http.stream("POST", CHAT, json=body) as response:
        first, second, done = [
            line.removeprefix("data: ") for line in response.iter_lines() if line
        ]
    assert done == "[DONE]"
    assert set(json.loads(first)["choices"][0]["delta"]) == {"role", "content"}
    assert set(json.loads(second)["choices"][0]["delta"]) == {"content"}


def test_limits_of_a_chat(
    api: Api, tokenizer: Tokenizer, local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert api.chat(MESSAGES, max_tokens=3).usage.completion_tokens == 3
    answer = api.chat(MESSAGES, max_tokens=3, max_completion_tokens=5)
    assert answer.usage.completion_tokens == 5
    monkeypatch.setattr(local.engine, "max_model_len", len(render(tokenizer)) + 40)
    answer = api.chat(MESSAGES, max_tokens=None)  # without a limit: until the context is full
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (40, "length")


def test_stops_of_a_chat(api: Api) -> None:
    whole = api.chat(MESSAGES, max_tokens=32).choices[0].message.content
    stop = next(whole[i : i + 2] for i in range(6, 32) if PART not in whole[i : i + 2])
    expected = whole[: whole.index(stop)]
    choice = api.chat(MESSAGES, max_tokens=32, stop=stop).choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected, "stop")
    chunks = api.chat_stream(MESSAGES, max_tokens=32, stop=[stop])
    assert (text_of(chunks), chunks[-1].choices[0].finish_reason) == (expected, "stop")


def test_content_in_parts_and_other_fields_reach_the_template(
    api: Api, inner: PreTrainedTokenizerBase
) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answers = [
        api.chat([{"role": "user", "content": content}]).choices[0].message.content
        for content in (parts, "one\ntwo", "one two")
    ]
    assert answers[0] == answers[1] != answers[2]

    inner.chat_template = (
        "{{ messages[0].role }} {{ messages[0].tool_call_id }} {{ messages[0].content }}"
    )
    message = {"role": "tool", "content": "é", "tool_call_id": "call-1"}
    tokens = api.post({"messages": [message]}, "/tokenize").json()["tokens"]
    assert tokens == inner("tool call-1 é", add_special_tokens=False)["input_ids"]


def test_logprobs_of_a_chat(api: Api, tokenizer: Tokenizer) -> None:
    columns = api.complete(render(tokenizer), logprobs=3, max_tokens=48).choices[0].logprobs
    choice = api.chat(MESSAGES, logprobs=True, top_logprobs=3, max_tokens=48).choices[0]
    entries = choice.logprobs.content
    assert [entry.token for entry in entries] == columns.tokens
    assert [entry.logprob for entry in entries] == pytest.approx(columns.token_logprobs, abs=1e-3)
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert PART in entry.token or bytes(entry.bytes).decode() == entry.token
    assert any(PART in entry.token for entry in entries)  # even so, the bytes give the text
    data = b"".join(bytes(entry.bytes) for entry in entries)
    assert codecs.decode(data, errors="replace") == choice.message.content

    chunks = [
        c.choices[0].logprobs.content
        for c in api.chat_stream(MESSAGES, logprobs=True, top_logprobs=1)
    ]
    assert [len(content) for content in chunks] == [1] * LENGTH
    assert [content[0].token for content in chunks] == columns.tokens[:LENGTH]
    assert all(len(content[0].top_logprobs) == 1 for content in chunks)
    for top in (0, None):
        bare = api.chat(MESSAGES, logprobs=True, top_logprobs=top, max_tokens=1).choices[0]
        assert bare.logprobs.content[0].top_logprobs == []
    assert api.chat(MESSAGES, logprobs=False, max_tokens=1).choices[0].logprobs is None


def test_n_choices_of_a_chat(api: Api) -> None:
    answer = api.chat(MESSAGES, n=4, **SAMPLED)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert texts[0] == api.chat(MESSAGES, **SAMPLED).choices[0].message.content
    assert answer.usage.prompt_tokens == api.chat(MESSAGES).usage.prompt_tokens  # counted once
    assert answer.usage.prompt_tokens_details.cached_tokens <= answer.usage.prompt_tokens
    assert answer.usage.completion_tokens == 4 * LENGTH

    chunks = api.chat_stream(MESSAGES, n=4, **SAMPLED)
    assert len(chunks) == 4 * LENGTH
    assert [text_of(chunks, index) for index in range(4)] == texts  # the seed gives the same texts
    for index in range(4):
        roles = [c.delta.role for chunk in chunks for c in chunk.choices if c.index == index]
        assert roles == ["assistant"] + [None] * (LENGTH - 1)


def test_n_choices_of_each_of_several_prompts(api: Api) -> None:
    prompts = [PROMPT, "How many tokens fit?"]
    answer = api.complete(prompts, n=3, best_of=3, logprobs=0, **SAMPLED)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len(set(texts)) == 6
    for i, prompt in enumerate(prompts):
        alone = api.complete(prompt, n=3, **SAMPLED)
        assert [choice.text for choice in alone.choices] == texts[3 * i : 3 * i + 3]
    assert answer.usage.completion_tokens == 6 * LENGTH
    assert answer.usage.prompt_tokens == api.complete(prompts).usage.prompt_tokens
    assert all(len(choice.logprobs.tokens) == LENGTH for choice in answer.choices)
    chunks = api.stream(prompts, n=3, **SAMPLED)
    for index, text in enumerate(texts):
        assert (
            "".join(c.text for chunk in chunks for c in chunk.choices if c.index == index) == text
        )


def test_seeds_of_n_choices(api: Api) -> None:
    seven, eight, none, again = (
        {choice.text for choice in api.complete(n=4, temperature=1, seed=seed).choices}
        for seed in (7, 8, None, None)
    )
    # Seeds 7 and 8 have no choice in common. Without a seed, all choices differ.
    assert len(seven | eight | none | again) == 16
    for seed in (2**63 - 1, -(2**63 - 1)):
        assert (
            len({choice.text for choice in api.complete(n=2, temperature=1, seed=seed).choices})
            == 2
        )
    assert len({choice.text for choice in api.complete(n=3).choices}) == 1  # greedy


def test_a_client_that_leaves_a_chat_frees_all_its_choices(local: Local) -> None:
    with local.expect_leaving():
        body = local.api.body(messages=MESSAGES, max_tokens=6000, stream=True, n=3)
        with local.api.http.stream("POST", CHAT, json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
    assert local.api.chat(MESSAGES, max_tokens=1).choices


WRONG = [
    ("messages", [], "messages []"),
    ("messages", None, "messages None"),
    ("messages", "hello", "messages 'hello'"),
    ("messages", [{"content": "hi"}], "messages.0.role"),
    (
        "messages",
        [{"role": "wizard", "content": "hi"}],
        "messages 'wizard': Input should be 'system', 'developer', 'user'",
    ),
    ("messages", [{"role": "user", "content": 5}], "messages 5"),
    ("messages", [{"role": "user", "content": None}], "chat template refuses them"),
    ("messages", [{"role": "user", "content": "\ud800"}], "not valid Unicode"),
    (
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        "'image_url'",
    ),
    (
        "messages",
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "b", "text": "c"}]}],
        "'b'",
    ),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "with a text"),
    ("temperature", -1, "temperature -1"),
    ("max_tokens", 0, "max_tokens 0"),
    ("top_logprobs", 2, "only with logprobs true"),
    ("top_logprobs", 21, "top_logprobs 21"),
    ("logprobs", 5, "logprobs 5"),
    ("n", 0, "n 0"),
    ("n", 129, "n 129"),
    ("stop", "", "stop ('',)"),
    ("stream_options", {"include_usage": True}, "only with stream true"),
    ("tools", [{"type": "function"}], "tools"),
    ("tool_choice", "required", "tool_choice 'required'"),
    ("chat_template", "{{ 1 }}", "chat_template"),
    ("continue_final_message", True, "continue_final_message"),
]


@pytest.mark.parametrize(("field", "value", "words"), WRONG, ids=repr)
def test_wrong_fields_of_a_chat_are_refused_by_name(
    api: Api, field: str, value: object, words: str
) -> None:
    body = api.body(messages=MESSAGES) | {field: value}
    check_error(api.post(body, CHAT), 400, words, field)


def test_other_errors_of_a_chat(api: Api) -> None:
    check_error(api.post({"model": api.model}, CHAT), 400, "messages: Field required", "messages")
    check_error(
        api.post({"model": "gpt-2", "messages": MESSAGES}, CHAT),
        404,
        "'gpt-2' does not exist",
        "model",
    )
    check_error(api.post(api.body(best_of=3, n=2)), 400, "best_of 3: must be n, 2", "best_of")
    long = [{"role": "user", "content": "0 " * CONTEXT}]
    check_error(
        api.post(api.body(messages=long), CHAT), 400, f"maximum context length is {CONTEXT} tokens"
    )
    with pytest.raises(openai.BadRequestError, match="image_url"):
        part = {"type": "image_url", "image_url": {"url": "data:,"}}
        api.chat_stream([{"role": "user", "content": [part]}])  # the stream has not begun


def test_optional_fields_of_a_chat_take_null(api: Api) -> None:
    names = """model max_completion_tokens temperature top_p top_k seed stop n logprobs top_logprobs
        stream tools"""
    body = {"messages": MESSAGES, "max_tokens": 2, "user": "me"} | dict.fromkeys(names.split())
    assert api.post(body, CHAT).status_code == 200


def test_templates_that_refuse_or_are_missing(api: Api, inner: PreTrainedTokenizerBase) -> None:
    for path in (CHAT, "/tokenize"):
        for template, words in (
            ("{{ raise_exception('roles must take turns') }}", "roles must take turns"),
            ("{{ messages[0].nothing.more }}", "nothing"),
            (None, "the checkpoint has no chat template"),
        ):
            inner.chat_template = template
            check_error(api.post({"messages": MESSAGES}, path), 400, words, "messages")
    assert api.http.get("/tokenizer_info").json()["has_chat_template"] is False
    inner.chat_template = "{{ raise_exception('not ' + messages[0].content) }}"
    halved = [{"role": "user", "content": "\ud83d"}]
    check_error(api.post({"messages": halved}, CHAT), 400, "not \\ud83d", "messages")


def test_without_a_tokenizer_only_completions_of_token_ids_work(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local.engine, "tokenizer", None)
    words = "the checkpoint has no tokenizer"
    check_error(local.api.post({"messages": MESSAGES}, CHAT), 400, words, "messages")
    check_error(local.api.post({"prompt": "a"}, "/tokenize"), 400, words, "prompt")
    check_error(local.api.post({"tokens": [5]}, "/detokenize"), 400, words, "tokens")
    check_error(local.api.http.get("/tokenizer_info"), 400, words)
    answer = local.api.complete([BOS, 5], logprobs=0, max_tokens=1).choices[0]
    assert answer.text == ""
    assert answer.logprobs.tokens[0].startswith("token_id:")


@pytest.mark.parametrize("text", ["", PROMPT, "naïve 日本 😀👩‍👩‍👧  \n\t", "a\x00b", "０１２"])
def test_tokenizing_round_trips(api: Api, tokenizer: Tokenizer, text: str) -> None:
    with_bos = api.post({"prompt": text}, "/tokenize").json()
    ids = tokenizer.encode(text).ids
    assert with_bos == {
        "count": len(ids),
        "max_model_len": CONTEXT,
        "tokens": ids,
        "token_strs": None,
    }
    bare = api.post(
        {
            "model": api.model,
            "prompt": text,
            "add_special_tokens": False,
            "return_token_strs": True,
        },
        "/tokenize",
    ).json()
    assert [BOS, *bare["tokens"]] == ids
    assert bare["token_strs"] == [tokenizer.id_to_token(i) for i in bare["tokens"]]
    assert api.post({"tokens": bare["tokens"]}, "/detokenize").json() == {"prompt": text}
    bos = tokenizer.id_to_token(BOS)
    assert api.post({"tokens": ids}, "/detokenize").json() == {"prompt": bos + text}


def test_tokenizing_messages(api: Api, tokenizer: Tokenizer) -> None:
    ids = render(tokenizer)
    assert api.post({"messages": MESSAGES}, "/tokenize").json()["tokens"] == ids
    body = {"messages": MESSAGES, "add_special_tokens": True}
    assert api.post(body, "/tokenize").json()["tokens"] == ids  # the template wrote BOS already


def test_special_tokens_for_a_template_that_writes_none(
    api: Api, inner: PreTrainedTokenizerBase
) -> None:
    inner.chat_template = "{{ messages[0].content }}"
    body = {"messages": [{"role": "user", "content": "one"}], "add_special_tokens": True}
    bare = inner("one", add_special_tokens=False)["input_ids"]
    assert api.post(body, "/tokenize").json()["tokens"] == [BOS, *bare]
    body["add_special_tokens"] = False
    assert api.post(body, "/tokenize").json()["tokens"] == bare


@pytest.mark.parametrize(
    ("path", "body", "words", "param"),
    [
        ("/tokenize", {}, "either prompt or messages", "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "either prompt or messages", "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt: is not valid Unicode", "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt ['a']", "prompt"),
        ("/tokenize", {"messages": []}, "messages []", "messages"),
        ("/detokenize", {}, "tokens: Field required", "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens 'a'", "tokens"),
        ("/detokenize", {"tokens": [512]}, "tokens: token id 512", "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens: token id -1", "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens", "tokens"),
    ],
    ids=repr,
)
def test_wrong_bodies_for_the_tokenizer(
    api: Api, path: str, body: dict, words: str, param: str
) -> None:
    check_error(api.post(body, path), 400, words, param)
    check_error(
        api.post({"prompt": "a", "tokens": [5]} | {"model": "gpt-2"}, path), 404, "'gpt-2'", "model"
    )


def test_version_and_tokenizer_info(api: Api, tokenizer: Tokenizer) -> None:
    assert api.http.get("/version").json() == {"version": minidcp.__version__}
    info = api.http.get("/tokenizer_info").json()
    names = {"bos_token": tokenizer.id_to_token(BOS), "eos_token": tokenizer.id_to_token(1)}
    assert info.pop("tokenizer_class")
    assert info == dict(
        vocab_size=tokenizer.get_vocab_size(), special_tokens=names, has_chat_template=True
    )


def test_the_schema_describes_bodies_and_answers(api: Api) -> None:
    schema = api.http.get("/openapi.json").json()
    shapes = schema["components"]["schemas"]
    expected = {
        "/v1/completions": ("CompletionRequest", ["Completion"]),
        CHAT: ("ChatRequest", ["ChatCompletion"]),
        "/tokenize": ("TokenizeRequest", ["TokenizeResponse"]),
        "/detokenize": ("DetokenizeRequest", []),
    }
    for path, (body, answers) in expected.items():
        operation = schema["paths"][path]["post"]
        assert body in json.dumps(operation["requestBody"])
        ok = json.dumps(operation["responses"]["200"])
        assert all(f'/{answer}"' in ok for answer in answers)
        assert set(operation["responses"]) == {"200", "4XX", "5XX"}
        assert "ErrorResponse" in json.dumps(operation["responses"]["4XX"])
        assert {body, *answers} <= set(shapes)
    assert {"messages", "n", "top_logprobs", "stream"} <= set(shapes["ChatRequest"]["properties"])
