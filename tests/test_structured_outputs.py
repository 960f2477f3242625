"""Structured outputs over HTTP: the fields of OpenAI, vLLM and SGLang, and what is refused."""

from __future__ import annotations

import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field
from servers import PROMPT, Api, Local, check_error, wait_until

from minidcp.engine import grammar
from minidcp.engine.grammar import Grammars

pytest_plugins = ["servers"]
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Who are you?"}]


class Pet(BaseModel, extra="forbid"):
    kind: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=8)


class Person(BaseModel, extra="forbid"):
    age: int = Field(ge=0, le=150)
    pet: Pet | None
    is_tall: bool


SCHEMA = Person.model_json_schema()
SAMPLED = dict(max_tokens=300, temperature=1, seed=3, ignore_eos=False)


@pytest.fixture(scope="module")
def api(local: Local) -> Api:
    return local.api


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "stop", choice
    return choice["text"] if "text" in choice else choice["message"]["content"]


JSON_FIELDS = [
    dict(response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}}),
    dict(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "p", "strict": True, "schema": SCHEMA, "description": "x"},
        }
    ),
    dict(structured_outputs={"json": SCHEMA}),
    dict(structured_outputs={"json": json.dumps(SCHEMA), "disable_any_whitespace": True}),
    dict(structured_outputs={"json": SCHEMA, "regex": None, "structural_tag": None}),
    dict(guided_json=SCHEMA),
    dict(guided_json=json.dumps(SCHEMA), guided_whitespace_pattern=" "),
    dict(json_schema=json.dumps(SCHEMA)),  # SGLang's
]


@pytest.mark.parametrize("fields", JSON_FIELDS, ids=lambda fields: next(iter(fields)))
def test_schemas_by_every_name(api: Api, fields: dict[str, Any]) -> None:
    chat = dict(model=api.model, messages=MESSAGES) | SAMPLED | fields
    Person.model_validate_json(text_of(api.post(chat, CHAT)))
    text = text_of(api.post(api.body(**SAMPLED, **fields)))
    Person.model_validate_json(text)
    if "disable_any_whitespace" in str(fields):
        assert not set(text) & set(" \n\t")


OTHER_FIELDS = [
    (dict(guided_regex="[ab]{3}"), r"[ab]{3}"),
    (dict(regex="[ab]{3}"), r"[ab]{3}"),
    (dict(structured_outputs={"regex": "[ab]{3}"}), r"[ab]{3}"),
    (dict(guided_choice=["yes", "no"]), "yes|no"),
    (dict(structured_outputs={"choice": ["yes", "no"]}), "yes|no"),
    (dict(guided_grammar='start: "<" /[0-9]{2}/ ">"'), "<[0-9]{2}>"),
    (dict(ebnf='root ::= "<" [0-9] [0-9] ">"'), "<[0-9]{2}>"),
    (dict(structured_outputs={"grammar": 'root ::= "<" [0-9] ">"'}), "<[0-9]>"),
]


@pytest.mark.parametrize(("fields", "pattern"), OTHER_FIELDS, ids=lambda x: str(x)[:40])
def test_other_kinds_by_every_name(api: Api, fields: dict[str, Any], pattern: str) -> None:
    text = text_of(api.post(api.body(**SAMPLED, **fields)))
    assert re.fullmatch(pattern, text), text


def test_any_json_object(api: Api) -> None:
    """With a bias for its end it is empty. Without, the random model may not find an end."""
    tokenize = api.post({"prompt": "}", "add_special_tokens": False}, "/tokenize")
    (brace,) = tokenize.json()["tokens"]
    for fields in (
        dict(response_format={"type": "json_object"}),
        dict(structured_outputs={"json_object": True}),
        dict(guided_json={"type": "object"}),
    ):
        choice = api.post(api.body(**fields)).json()["choices"][0]
        assert choice["text"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)
        assert json.loads(text_of(api.post(api.body(logit_bias={brace: 100}, **fields)))) == {}


def test_the_openai_client_parses(api: Api) -> None:
    completion = api.client.chat.completions.parse(
        model=api.model, messages=MESSAGES, response_format=Person, max_tokens=300, seed=1
    )
    assert isinstance(completion.choices[0].message.parsed, Person)
    with api.client.chat.completions.stream(
        model=api.model, messages=MESSAGES, response_format=Person, max_tokens=300, seed=2
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Person)
    assert final.choices[0].finish_reason == "stop"
    with pytest.raises(openai.LengthFinishReasonError):
        api.client.chat.completions.parse(
            model=api.model, messages=MESSAGES, response_format=Person, max_tokens=2
        )


def test_choices_streams_and_logprobs(api: Api) -> None:
    fields = dict(messages=MESSAGES, model=api.model, n=4, logprobs=True, top_logprobs=2)
    fields |= dict(response_format=JSON_FIELDS[0]["response_format"], max_tokens=300, seed=1)
    whole = api.client.chat.completions.create(**fields)
    assert len({choice.message.content for choice in whole.choices}) > 1
    for choice in whole.choices:
        Person.model_validate_json(choice.message.content)
        assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content

    texts = [""] * 4
    reasons: list[str | None] = [None] * 4
    for chunk in api.client.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == ["stop"] * 4


def test_usage_counts_the_tokens(api: Api) -> None:
    body = api.body(logprobs=0, structured_outputs={"choice": ["a fine answer"]})
    response = api.post(body).json()
    assert response["choices"][0]["text"] == "a fine answer"
    num_tokens = len(response["choices"][0]["logprobs"]["tokens"])
    assert response["usage"]["completion_tokens"] == num_tokens


def test_values_that_ask_for_nothing(api: Api) -> None:
    plain = api.post(api.body()).json()["choices"][0]["text"]
    names = "guided_json guided_regex guided_choice guided_grammar json_schema regex ebnf"
    nothing: dict[str, Any] = dict.fromkeys(names.split())
    nothing |= dict(response_format={"type": "text"}, structured_outputs={}, guided_choice=[])
    nothing |= dict(guided_regex="", guided_whitespace_pattern=None)
    for fields in (nothing, dict(response_format=None, structured_outputs=None)):
        response = api.post(api.body(**fields))
        assert response.json()["choices"][0]["text"] == plain


REFUSED = [
    ("response_format", {"type": "json_schema"}, "no schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "no schema"),
    ("response_format", {"type": "structural_tag"}, "json_schema"),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"schema": {"items": {"not": {}}}}},
        "at #/items: ",
    ),
    ("structured_outputs", {"regex": "a", "choice": ["b"]}, "regex and choice"),
    ("structured_outputs", {"disable_any_whitespace": True}, "exactly one"),
    ("structured_outputs", {"structural_tag": "{}"}, "structural_tag"),
    ("structured_outputs", {"json": {"type": "strin"}}, "strin"),
    ("structured_outputs", {"choice": []}, "choice"),
    ("structured_outputs", "x", ""),
    ("guided_json", {"properties": {"a": {"uniqueItems": True}}}, "at #/properties/a: "),
    ("guided_json", '{"type":', "not valid JSON"),
    ("guided_regex", "(a", "unclosed group"),
    ("guided_regex", 5, ""),
    ("guided_choice", [""], "non-empty"),
    ("guided_choice", ["x"] * 5000, ""),
    ("guided_choice", ["x" * 1000] * 1000, "131072"),
    ("guided_grammar", "start: b", "unknown name"),
    ("json_schema", "[]", "an object"),
    ("ebnf", "x ::= (", ""),
    ("guided_decoding_backend", "outlines", "not supported"),
]


@pytest.mark.parametrize(("field", "value", "words"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_is_refused(api: Api, field: str, value: Any, words: str) -> None:
    check_error(api.post(api.body(**{field: value})), 400, words, field)
    chat = dict(model=api.model, messages=MESSAGES, stream=True) | {field: value}
    check_error(api.post(chat, CHAT), 400, words, field)


def test_only_one_may_be_given(api: Api) -> None:
    body = api.body(guided_regex="a", response_format={"type": "json_object"})
    response = api.post(body)
    check_error(response, 400, "response_format and guided_regex: only one", "response_format")


def test_without_the_package(api: Api, local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    body = api.body(response_format={"type": "json_schema", "json_schema": {"schema": {"a": 1}}})
    check_error(api.post(body), 400, "pip install 'llguidance>=1.9,<2'", "response_format")
    assert api.post(api.body()).status_code == 200


def test_the_loop_goes_on_while_a_grammar_is_compiled(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other requests are answered meanwhile, by the event loop and by the engine."""
    is_free = threading.Event()
    has_begun = threading.Event()
    compile_anew = Grammars.compile_anew

    def wait(self: Grammars, params: Any) -> Any:
        has_begun.set()
        assert is_free.wait(60)
        return compile_anew(self, params)

    monkeypatch.setattr(Grammars, "compile_anew", wait)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(api.post, api.body(guided_regex="[xyz]{2}"))
        assert has_begun.wait(60)
        assert api.complete(max_tokens=4).usage.completion_tokens == 4
        assert api.http.get("/health").status_code == 200
        is_free.set()
        assert set(text_of(slow.result())) <= set("xyz")


def test_a_grammar_that_fails_is_an_error(
    api: Api, local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = dict(guided_regex="[a-z]{9}q{31}", ignore_eos=False, max_tokens=64)
    assert api.post(api.body(**fields | dict(max_tokens=1))).status_code == 200  # compiles it
    monkeypatch.setattr(grammar, "MAX_MASK_SECONDS", -1.0)
    check_error(api.post(api.body(**fields)), 400, "failed after 1 tokens", "guided_regex")

    # A grammar that has failed is compiled anew.
    monkeypatch.undo()
    assert api.post(api.body(**fields | dict(max_tokens=1))).status_code == 200
    monkeypatch.setattr(grammar, "MAX_MASK_SECONDS", -1.0)
    streamed = api.post(api.body(**fields, stream=True))
    assert streamed.status_code == 200
    *_, error, done = [line for line in streamed.text.split("\n\n") if line]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 400
    assert done == "data: [DONE]"
    wait_until(local.is_idle, 5, "the requests have not ended")
    assert 'finished_reason="error"' in api.http.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_one_choice_whose_grammar_fails_ends_all(
    api: Api, local: Local, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """OpenAI's API has no error of a single choice. The message says which one it was."""
    find_next = Grammars.find_next

    def fail(self: Grammars, place: grammar.Place, *arguments: Any) -> bytes | None:
        if place.request.prompt_token_ids == [6]:
            raise ValueError("too hard")
        return find_next(self, place, *arguments)

    monkeypatch.setattr(Grammars, "find_next", fail)
    response = api.post(api.body([[5], [6]], guided_regex="[a-z]{99}", stream=stream))
    text = response.text if not stream else response.text.split("\n\n")[-3]
    error = json.loads(text.removeprefix("data: "))["error"]
    words = "guided_regex: the grammar failed after 1 tokens: too hard (choice 1)"
    assert (error["code"], error["message"]) == (400, words)
    wait_until(local.is_idle, 5, "the other choice has not ended")


def test_clients_that_leave(local: Local) -> None:
    """An aborted request leaves no grammar behind."""
    body = local.api.body(PROMPT, guided_regex="[a-z]+", max_tokens=6000, stream=True)
    with (
        local.expect_leaving(),
        local.api.http.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        for _ in range(4):
            next(lines)
    wait_until(lambda: not local.engine.grammars.places, 5, "a grammar is left")


def test_langchain(api: Api) -> None:
    import langchain_openai as langchain

    model = langchain.ChatOpenAI(
        model=api.model,
        base_url=f"{api.url}/v1",
        api_key="x",
        max_tokens=300,
        temperature=1,
        seed=3,
        max_retries=0,
    )
    structured = model.with_structured_output(Person, method="json_schema", strict=True)
    assert isinstance(structured.invoke("Who are you?"), Person)
