"""Tools over HTTP, as clients see them. The demo's model would never call a function by itself:
calls are demanded, or a grammar makes the model write what a test wants."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import pydantic_function_tool
from openai.types.chat import ChatCompletionMessage
from pydantic import BaseModel, Field
from servers import Api, Local, check_error
from tokenizer_files import describe_token

from minidcp.structured_outputs import write_part
from minidcp_server.tool_calls import DEEPSEEK_V31

pytest_plugins = ["servers"]
CHAT = "/v1/chat/completions"
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Who are you?"}]
TOKEN_OF_MARKER: dict[str, int] = {}  # of the checkpoint below


class Add(BaseModel):
    a: int = Field(ge=0, le=99)
    b: int = Field(ge=0, le=99)


class Now(BaseModel):
    pass


ADD = pydantic_function_tool(Add, name="add", description="Adds.")
NOW = pydantic_function_tool(Now, name="now", description="Tells the time.")
SAMPLED = dict(temperature=1, seed=3, max_tokens=800, ignore_eos=False)
REQUIRED = dict(tools=[ADD, NOW], tool_choice="required") | SAMPLED
ONE = dict(parallel_tool_calls=False)
MARKERS = [
    f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
]
CALLS = [("add", '{"a": 1, "b": 2}'), ("now", "{}")]


@pytest.fixture(scope="module")
def demo(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, but the markers of calls are special tokens, as those of DeepSeek's models. They
    take the place of the tokens that were learned last."""
    directory = tmp_path_factory.mktemp("tools") / "demo"
    shutil.copytree(demo, directory, copy_function=os.link)
    content = json.loads((demo / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first = len(vocab) - len(MARKERS)
    for name in [name for name, token in vocab.items() if token >= first]:
        del vocab[name]
        content["model"]["merges"].pop()
    for token, marker in enumerate(MARKERS, first):
        content["added_tokens"].append(describe_token(marker) | {"id": token, "special": True})
        TOKEN_OF_MARKER[marker] = token
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def api(local: Local) -> Api:
    return local.api


def demand(text: str) -> dict[str, str]:
    """A grammar of this text only."""
    parts = [part for part in re.split(f"({'|'.join(MARKERS)})", text) if part]
    written = [write_part(TOKEN_OF_MARKER.get(part, part)) for part in parts]
    return {"grammar": f"start: {' '.join(written)}"}


def write(text: str) -> dict[str, Any]:
    """Fields that make the model write this text."""
    return dict(extra_body={"structured_outputs": demand(text)}, max_tokens=800, temperature=0)


def chat(api: Api, **fields: Any) -> Any:
    (choice,) = api.client.chat.completions.create(
        **dict(model=api.model, messages=MESSAGES) | fields
    ).choices
    return choice


def check_calls(message: ChatCompletionMessage) -> None:
    assert message.content is None
    for call in message.tool_calls or []:
        arguments = json.loads(call.function.arguments)
        (Add if call.function.name == "add" else Now).model_validate(arguments)


def test_text_is_the_answer_where_no_call_is(api: Api) -> None:
    for fields in ({}, dict(tool_choice="auto"), dict(tool_choice="none")):
        for parallel in (True, False, None):
            choice = chat(
                api,
                tools=[ADD],
                parallel_tool_calls=parallel,
                max_tokens=8,
                temperature=0,
                **fields,
            )
            assert choice.message.content and choice.message.tool_calls is None
            assert choice.finish_reason == "length"


@pytest.mark.parametrize("seed", range(3))
def test_required(api: Api, seed: int) -> None:
    choice = chat(api, **{name: REQUIRED[name] for name in ("tools", "tool_choice")}, seed=seed)
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    check_calls(choice.message)
    choice = chat(api, tools=[ADD, NOW], tool_choice="required", seed=seed, **ONE)
    assert len(choice.message.tool_calls) == 1
    named = {"type": "function", "function": {"name": "now"}}
    choice = chat(api, tools=[ADD, NOW], tool_choice=named, seed=seed)
    assert [call.function.name for call in choice.message.tool_calls] == ["now"]
    check_calls(choice.message)


def test_calls_in_the_models_notation(api: Api) -> None:
    text = "Let me see." + DEEPSEEK_V31.write(CALLS)
    choice = chat(api, tools=[ADD, NOW], **write(text))
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    calls = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == CALLS
    assert len({call.id for call in calls}) == 2
    one = chat(api, tools=[ADD, NOW], **ONE, **write(text))
    assert len(one.message.tool_calls) == 1
    for fields in ({}, dict(tools=[ADD], tool_choice="none")):  # special tokens are skipped
        content = chat(api, **fields, **write(text)).message.content
        assert content.startswith("Let me see.") and "｜" not in content
    broken = "<｜tool▁calls▁begin｜>oops"
    choice = chat(api, tools=[ADD], **write(broken))
    assert (choice.message.content, choice.finish_reason) == (broken, "stop")


def test_a_stream_of_calls(api: Api) -> None:
    text = "Yes." + DEEPSEEK_V31.write(CALLS)
    chunks = list(
        api.client.chat.completions.create(
            model=api.model, messages=MESSAGES, tools=[ADD, NOW], stream=True, **write(text)
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    entries = [entry for delta in deltas for entry in delta.tool_calls or []]
    for index, (name, arguments) in enumerate(CALLS):
        first, *others = [entry for entry in entries if entry.index == index]
        assert (first.type, first.function.name) == ("function", name)
        assert all(entry.id is None and entry.function.name is None for entry in others)
        assert "".join(entry.function.arguments for entry in [first, *others]) == arguments
    assert len(entries) > 4  # pieces
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["tool_calls"]

    with api.client.chat.completions.stream(
        model=api.model, messages=MESSAGES, tools=[ADD, NOW], **write(text)
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        message = stream.get_final_completion().choices[0].message
    assert [event.parsed_arguments for event in done] == [Add(a=1, b=2), Now()]
    assert [call.function.parsed_arguments for call in message.tool_calls] == [Add(a=1, b=2), Now()]


def test_several_choices_and_logprobs(api: Api) -> None:
    answer = api.client.chat.completions.create(
        model=api.model, messages=MESSAGES, tools=[ADD], tool_choice="required", n=3, seed=1,
        logprobs=True, **ONE,
    )  # fmt: skip
    for choice in answer.choices:
        check_calls(choice.message)
        assert len(choice.logprobs.content) > len(choice.message.tool_calls[0].function.arguments)


def test_a_whole_conversation(api: Api) -> None:
    """parse, then the answer with its calls and their results back in."""
    answer = api.client.chat.completions.parse(
        model=api.model, messages=MESSAGES, tools=[ADD], tool_choice="required", **ONE
    )
    message = answer.choices[0].message
    (call,) = message.tool_calls
    sums = call.function.parsed_arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": str(sums.a + sums.b)}
    messages = [*MESSAGES, message, result]
    assert chat(api, messages=messages, tools=[ADD], max_tokens=4).message.content
    body = {
        "messages": [*MESSAGES, message.model_dump(exclude_none=True), result],
        "tools": [ADD],
        "return_token_strs": True,
    }
    tokens = api.post(body, "/tokenize").json()["tokens"]
    prompt = api.post({"tokens": tokens}, "/detokenize").json()["prompt"]
    assert DEEPSEEK_V31.write([("add", call.function.arguments)]) in prompt
    assert f"Function: {result['content']}" in prompt and '"description": "Adds."' in prompt


def test_an_answer_in_json_or_calls(api: Api) -> None:
    """A schema for the answer does not keep the model from calling functions."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"prompt": "{", "add_special_tokens": False}
    (open_brace,) = api.post(body, "/tokenize").json()["tokens"]
    fields: dict[str, Any] = dict(tools=[NOW], response_format=form, max_tokens=800, seed=1)
    choice = chat(api, **fields, logit_bias={str(open_brace): 100})
    assert set(json.loads(choice.message.content)) == {"ok"} and not choice.message.tool_calls
    choice = chat(api, **fields, **ONE, logit_bias={str(TOKEN_OF_MARKER[MARKERS[0]]): 100})
    assert [call.function.name for call in choice.message.tool_calls] == ["now"]


LENIENT = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
WRONG = {"type": "object", "properties": {"a": {"type": "strin"}}}


def make_tool(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def make_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("tool_choice", dict(tool_choice="required"), "there are no tools"),
    ("tool_choice", dict(tools=[], tool_choice="required"), "there are no tools"),
    (
        "tool_choice",
        dict(tools=[ADD], tool_choice={"type": "function", "function": {"name": "subtract"}}),
        "'subtract': is none of the tools; they are ['add']",
    ),
    ("tool_choice", dict(tools=[ADD], tool_choice="any"), ""),
    ("tool_choice", dict(tools=[ADD], tool_choice={"type": "allowed_tools"}), ""),
    ("tools", dict(tools=[{"type": "custom", "custom": {"name": "x"}}]), "'function'"),
    ("tools", dict(tools=[{"type": "function"}]), ""),
    ("tools", dict(tools=[make_tool(name="")]), "1 to 128 characters"),
    ("tools", dict(tools=[make_tool(name="a b")]), "'a b'"),
    ("tools", dict(tools=[make_tool(), make_tool()]), "two functions 'f'"),
    ("tools", dict(tools=[make_tool()] * 1025), "1024"),
    ("tools", dict(tools=[make_tool(parameters={"x": "y" * (1 << 20)})]), "1048576"),
    (
        "tools",
        dict(tools=[make_tool(parameters=LENIENT, strict=True)], tool_choice="required"),
        "tools[0].function.parameters of 'f': at #/properties/a: Unimplemented keys: "
        '["uniqueItems"]',
    ),
    (
        "tools",
        dict(
            tools=[make_tool(parameters={"minProperties": 2}, strict=True)], tool_choice="required"
        ),
        "tools[0].function.parameters of 'f': at #/minProperties: ",
    ),
    (
        "tools",
        dict(tools=[ADD, make_tool(parameters=WRONG)], response_format=make_format({})),
        "tools[1].function.parameters of 'f': at #/properties/a: Invalid type: strin",
    ),
    (
        "tools",
        dict(
            tools=[ADD, make_tool(parameters=WRONG)],
            tool_choice={"type": "function", "function": {"name": "f"}},
        ),
        "tools[1].function.parameters of 'f': at #/properties/a: Invalid type: strin",
    ),
    (
        "response_format",
        dict(tools=[make_tool(parameters=LENIENT)], response_format=make_format(WRONG)),
        "response_format: at #/properties/a: Invalid type: strin",
    ),
    ("tools", dict(tools=[make_tool(parameters=[])]), ""),
    ("functions", dict(functions=[{"name": "f"}]), "not supported"),
    ("messages", dict(messages=[*MESSAGES, {"role": "assistant", "tool_calls": 5}]), "no list"),
    (
        "messages",
        dict(messages=[{"role": "user", "content": "a", "tool_calls": [{}]}]),
        "has no function with a name",
    ),
    (
        "messages",
        dict(messages=[{"role": "user", "content": "a", "tool_calls": [1]}]),
        "has no function with a name",
    ),
    (
        "messages",
        dict(messages=[*MESSAGES, {"role": "assistant", "tool_calls": [{"id": "a"}]}]),
        "has no function with a name",
    ),
]


@pytest.mark.parametrize(("field", "fields", "words"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_is_refused(api: Api, field: str, fields: dict[str, Any], words: str) -> None:
    body = dict(model=api.model, messages=MESSAGES, max_tokens=4, stream=True) | fields
    response = api.post(body, CHAT)
    check_error(response, 400, words, field)
    assert len(response.text) < 1000


def test_schemas_that_cannot_be_enforced_whole(api: Api) -> None:
    """Most tools of today are not strict, and say more than a grammar can."""
    tool = make_tool(parameters=LENIENT | {"required": ["a"]})
    choice = chat(api, tools=[tool], tool_choice="required", **ONE, max_tokens=400, seed=5)
    arguments = choice.message.tool_calls[0].function.arguments
    assert arguments.startswith('{"a": [')
    for parameters in ({}, None, {"properties": {}}):
        tool = make_tool(parameters=parameters)
        choice = chat(api, tools=[tool], tool_choice="required", **ONE, max_tokens=140, seed=5)
        assert choice.message.tool_calls[0].function.arguments == "{}"


V2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<A>{{ m.content }}"
    "{% elif m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_a_template_without_tools(
    api: Api, local: Local, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As DeepSeek-V2's: it answers with text and says so once, and calls where that is demanded."""
    monkeypatch.setattr(local.engine.tokenizer, "chat_template", V2)
    plain = api.post({"messages": MESSAGES, "model": api.model}, "/tokenize").json()
    with caplog.at_level(logging.WARNING, "minidcp"):
        for _ in range(2):
            choice = chat(api, tools=[ADD], max_tokens=4, temperature=0)
            assert choice.message.content == chat(api, max_tokens=4, temperature=0).message.content
    assert len([r for r in caplog.records if "leaves them out of the prompt" in r.message]) == 1
    for stream in (False, True):
        tokens = api.post({"messages": MESSAGES, "tools": [ADD]}, "/tokenize").json()
        assert tokens["tokens"] == plain["tokens"]
        fields: dict[str, Any] = dict(tools=[ADD, NOW], tool_choice="required", seed=2)
        if not stream:
            check_calls(chat(api, **fields).message)
            continue
        with api.client.chat.completions.stream(
            model=api.model, messages=MESSAGES, **fields
        ) as events:
            choice = events.get_final_completion().choices[0]
        assert choice.finish_reason == "tool_calls"
        check_calls(choice.message)


# Open WebUI. It sends tools with every message, without a tool_choice: `process_chat_payload` in
# backend/open_webui/utils/middleware.py. What it collects of a stream: `stream_body_handler` there.

TIMESTAMP = {
    "name": "get_current_timestamp",
    "description": "Get the current Unix timestamp in seconds.",
    "parameters": {"properties": {}, "type": "object"},
}
CALCULATE = {
    "name": "calculate_timestamp",
    "description": "Get the current Unix timestamp, optionally adjusted by days, weeks, months, or "
    "years.\nUse this to calculate timestamps for date filtering in search functions.",
    "parameters": {
        "properties": {
            name: {"default": 0, "type": "integer", "description": f"Number of {name}"}
            for name in ("days_ago", "weeks_ago", "months_ago", "years_ago")
        },
        "type": "object",
    },
}
OPEN_WEBUI: dict[str, Any] = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "messages": [{"role": "user", "content": "What time is it?"}],
    "tools": [{"type": "function", "function": spec} for spec in (TIMESTAMP, CALCULATE)],
}


def collect_as_open_webui(response: httpx.Response) -> tuple[str, list[dict[str, Any]]]:
    content = ""
    calls: list[dict[str, Any]] = []
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if not data or data == "[DONE]":
            continue
        choices = json.loads(data).get("choices", [])
        if not choices:
            continue
        delta = choices[0].get("delta", {})
        for call in delta.get("tool_calls") or []:
            index = call.get("index")
            known = next((other for other in calls if other.get("index") == index), None)
            if known is None:
                call.setdefault("function", {})
                call["function"].setdefault("name", "")
                call["function"].setdefault("arguments", "")
                calls.append(call)
                continue
            known["function"]["name"] += call.get("function", {}).get("name", "")
            known["function"]["arguments"] += call.get("function", {}).get("arguments", "")
        content += delta.get("content") or ""
    return content, calls


def test_open_webui_chats_and_shows_a_call(api: Api) -> None:
    body = OPEN_WEBUI | {"model": api.model, "max_tokens": 12, "temperature": 0}
    with api.http.stream("POST", CHAT, json=body) as response:
        content, calls = collect_as_open_webui(response)
    assert response.status_code == 200 and content and not calls

    written = DEEPSEEK_V31.write([("calculate_timestamp", '{"days_ago": 3}')])
    body |= {"structured_outputs": demand(written), "max_tokens": 800}
    with api.http.stream("POST", CHAT, json=body) as response:
        content, calls = collect_as_open_webui(response)
    assert content == ""
    (call,) = calls
    assert call["function"] == {"name": "calculate_timestamp", "arguments": '{"days_ago": 3}'}

    back = [
        {"role": "assistant", "content": content, "tool_calls": calls},
        {"role": "tool", "tool_call_id": call["id"], "content": '{"calculated_timestamp": 1}'},
    ]
    body = OPEN_WEBUI | {"model": api.model, "max_tokens": 12, "temperature": 0}
    body["messages"] = body["messages"] + back
    with api.http.stream("POST", CHAT, json=body) as response:
        content, calls = collect_as_open_webui(response)
    assert content and not calls


# Frameworks.


def test_langchain(api: Api) -> None:
    import langchain_openai as langchain

    model = langchain.ChatOpenAI(
        base_url=f"{api.url}/v1",
        api_key="x",
        model=api.model,
        max_retries=0,
        seed=1,
        max_tokens=800,
    )
    bound = model.bind_tools([Add, Now], tool_choice="required")
    for call in bound.invoke("Add something").tool_calls:
        {"Add": Add, "Now": Now}[call["name"]].model_validate(call["args"])
    (call,) = model.bind_tools([Now], tool_choice="Now").invoke("Now?").tool_calls
    assert (call["name"], call["args"]) == ("Now", {})
    whole = None
    for chunk in model.bind_tools([Add], tool_choice="Add").stream("Add"):
        whole = chunk if whole is None else whole + chunk
    Add.model_validate(whole.tool_calls[0]["args"])
    parsed = model.with_structured_output(Add, method="function_calling").invoke("Add")
    assert isinstance(parsed, Add)
    assert model.bind_tools([Add]).bind(max_tokens=4).invoke("Hi").content


def test_pydantic_ai(api: Api) -> None:
    """Its agent demands a call of the tool that ends the run."""
    import pydantic_ai
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(
        api.model, provider=OpenAIProvider(base_url=f"{api.url}/v1", api_key="x")
    )
    agent = pydantic_ai.Agent(
        model, output_type=Add, model_settings={"seed": 4, "parallel_tool_calls": False}
    )
    assert isinstance(asyncio.run(agent.run("Add")).output, Add)

    asked = []
    talker = pydantic_ai.Agent(model, model_settings={"max_tokens": 600, "temperature": 0})

    @talker.tool_plain
    def now() -> str:
        """Tells the time."""
        asked.append(1)
        return "noon"

    async def run() -> str:
        written = DEEPSEEK_V31.write([("now", "{}")])
        extra = {"extra_body": {"structured_outputs": demand(written)}}
        async with talker.iter("What time is it?", model_settings=extra) as steps:
            async for _ in steps:
                if asked:  # now it may answer with what it wants
                    extra["extra_body"].clear()
        return steps.result.output

    assert asyncio.run(run()) and asked == [1]
