"""POST /v1/responses as OpenAI's client and agent frameworks use it. Answers and events must fit
the types of OpenAI's package. The demo's tokenizer has no special tokens for calls here."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter
from servers import LENGTH, Api, Local, check_error, wait_until

from minidcp.engine.grammar import Grammars
from minidcp_server.responses_api import ResponsesRequest
from minidcp_server.tool_calls import DEEPSEEK_V31

pytest_plugins = ["servers"]
PATH = "/v1/responses"
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


class Pet(BaseModel, extra="forbid"):
    legs: int = Field(ge=0, le=8)
    tame: bool


class Add(BaseModel):
    a: int = Field(ge=0, le=9)


ADD = openai.pydantic_function_tool(Add, name="add")["function"] | {"type": "function"}
ONE_CALL: dict[str, Any] = dict(tools=[ADD], tool_choice="required", parallel_tool_calls=False)


@pytest.fixture(scope="module")
def api(local: Local) -> Api:
    return local.api


def respond(api: Api, input: object = "Hi", **fields: Any) -> Response:
    body = dict(model=api.model, input=input, max_output_tokens=LENGTH, temperature=0) | fields
    answer = api.post(body, PATH)
    assert answer.status_code == 200, answer.text
    return Response.model_validate(answer.json(), strict=True)


def stream(api: Api, **fields: Any) -> list[ResponseStreamEvent]:
    """The events, which must be numbered, named, and of OpenAI's types."""
    body = dict(model=api.model, input="Hi", stream=True, max_output_tokens=LENGTH) | fields
    answer = api.post(body, PATH)
    assert answer.status_code == 200, answer.text
    events = []
    for number, lines in enumerate(answer.text.strip().split("\n\n")):
        name, data = lines.split("\n")
        event = EVENT.validate_json(data.removeprefix("data: "))
        assert name == f"event: {event.type}" and event.sequence_number == number
        events.append(event)
    return events


def write(text: str) -> dict[str, Any]:
    """Fields that make the model write this text."""
    return dict(structured_outputs={"choice": [text]}, max_output_tokens=800)


def test_a_response_is_the_chat_with_the_same_messages(api: Api) -> None:
    chat = api.chat([{"role": "user", "content": "Hi"}], ignore_eos=False)
    response = respond(api)
    assert response.output_text == chat.choices[0].message.content != ""
    assert (response.status, response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens) == (chat.usage.prompt_tokens, LENGTH)
    assert usage.total_tokens == usage.input_tokens + LENGTH
    assert response.id.startswith("resp_") and response.output[0].id.startswith("msg_")
    assert (response.store, response.temperature, response.error) == (False, 0, None)
    sampled = dict(temperature=1, seed=5, top_k=20)
    chat = api.chat([{"role": "user", "content": "Hi"}], ignore_eos=False, **sampled)
    assert respond(api, **sampled).output_text == chat.choices[0].message.content


CONVERSATION: list[dict[str, Any]] = [
    {"role": "developer", "content": "Add."},
    {"role": "user", "content": [{"type": "input_text", "text": "1 and 2?"}]},
    {"id": "rs_1", "type": "reasoning", "summary": []},
    {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
    },
    {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
    {"type": "function_call", "call_id": "c2", "name": "add", "arguments": '{"a": 2}'},
    {"type": "function_call_output", "call_id": "c1", "output": "3"},
    {
        "type": "function_call_output",
        "call_id": "c2",
        "output": [{"type": "input_text", "text": "4"}],
    },
]


def test_items_are_messages(api: Api) -> None:
    function = {"name": "add", "arguments": '{"a": 1}'}
    calls = [
        {"id": "c1", "type": "function", "function": function},
        {"id": "c2", "type": "function", "function": function | {"arguments": '{"a": 2}'}},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Add."},
        {"role": "user", "content": "1 and 2?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "tool", "tool_call_id": "c2", "content": "4"},
    ]
    request = ResponsesRequest(input=CONVERSATION, instructions="Be brief.")
    assert request.list_messages() == messages
    chat = api.chat(messages, ignore_eos=False)
    response = respond(api, CONVERSATION, instructions="Be brief.")
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    only_calls = ResponsesRequest(input=[CONVERSATION[1], *CONVERSATION[4:6]]).list_messages()
    assert [message["role"] for message in only_calls] == ["user", "assistant"]


TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def list_types(events: list[ResponseStreamEvent]) -> list[str]:
    """The events' types; several deltas in a row count as one."""
    types: list[str] = []
    for event in events:
        if types[-1:] != [event.type]:
            types.append(event.type)
    return types


def test_a_stream_of_text(api: Api) -> None:
    events = stream(api, temperature=0)
    assert list_types(events) == [*TEXT_EVENTS, "response.incomplete"]
    whole = respond(api)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > LENGTH / 2 and "" not in deltas
    final = events[-1].response
    assert final.output_text == "".join(deltas) == whole.output_text
    assert final.usage.output_tokens == LENGTH
    for event in events:
        assert getattr(event, "output_index", 0) == 0
        assert getattr(event, "item_id", final.output[0].id) == final.output[0].id
    assert stream(api, **write("Yes."))[-1].type == "response.completed"


def test_text_and_calls(api: Api) -> None:
    calls = [("add", '{"a": 1}'), ("add", '{"a": 2}')]
    text = "Let me see." + DEEPSEEK_V31.write(calls)
    events = stream(api, tools=[ADD], **write(text))
    call_events = [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    expected = [*TEXT_EVENTS, *call_events, *call_events, "response.completed"]
    assert list_types(events) == expected
    final = events[-1].response
    whole = respond(api, tools=[ADD], **write(text))
    for response in (final, whole):
        message, *items = response.output
        assert message.content[0].text == "Let me see."
        assert [(item.name, item.arguments) for item in items] == calls
        assert len({item.call_id for item in items}) == len({item.id for item in items}) == 2
        assert {item.status for item in response.output} == {"completed"}
    assert [tool.name for tool in final.tools] == ["add"]


def test_openai_python(api: Api) -> None:
    """create, parse, and the helpers for streams, with tools and schemas."""
    client = api.client.responses
    fields: dict[str, Any] = dict(model=api.model, input="Hi", max_output_tokens=400)
    response = client.create(**fields, **ONE_CALL)
    (call,) = response.output
    assert response.status == "completed"
    Add.model_validate_json(call.arguments)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    conversation = [{"role": "user", "content": "Hi"}, *response.output, output]
    answer = client.create(**fields | dict(input=conversation, tools=[ADD], max_output_tokens=4))
    assert answer.output_text

    parsed = client.parse(**fields, text_format=Pet, temperature=1)
    assert isinstance(parsed.output_parsed, Pet)
    assert parsed.text.format.name == "Pet" and parsed.text.format.type == "json_schema"
    with client.stream(**fields, text_format=Pet) as events:
        seen = {event.type for event in events}
        final = events.get_final_response()
    assert {"response.output_text.done", "response.completed"} <= seen
    assert isinstance(final.output_parsed, Pet)

    tool = openai.pydantic_function_tool(Add, name="add")
    with client.stream(**fields, **ONE_CALL | dict(tools=[tool])) as events:
        (item,) = events.get_final_response().output
    assert isinstance(item.parsed_arguments, Add)
    named = dict(tools=[ADD], tool_choice={"type": "function", "name": "add"})
    assert [item.name for item in client.create(**fields, **named).output] == ["add"]
    with pytest.raises(openai.BadRequestError, match="nothing is stored"):
        client.create(**fields, store=True)


def test_logprobs(api: Api) -> None:
    chat = api.chat([{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=2)
    expected = [
        (entry.token, len(entry.top_logprobs)) for entry in chat.choices[0].logprobs.content
    ]
    fields = dict(include=["message.output_text.logprobs"], top_logprobs=2, temperature=0)
    part = respond(api, ignore_eos=True, **fields).output[0].content[0]
    assert [(entry.token, len(entry.top_logprobs)) for entry in part.logprobs] == expected
    events = stream(api, ignore_eos=True, **fields)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [entry.token for event in deltas for entry in event.logprobs] == [t for t, _ in expected]
    assert respond(api, include=["reasoning.encrypted_content"]).output[0].content[0].logprobs == []


def test_what_asks_for_nothing(api: Api) -> None:
    """Fields that SDKs send by default."""
    fields: dict[str, Any] = dict(store=False, background=False, truncation="disabled")
    fields |= dict(previous_response_id=None, conversation=None, prompt=None, tools=[], include=[])
    fields |= dict(text={"format": {"type": "text"}}, tool_choice="auto", metadata={"a": "b"})
    fields |= dict(reasoning={}, service_tier="auto", user="me", parallel_tool_calls=True)
    response = respond(api, **fields)
    assert response.output_text == respond(api).output_text
    assert (response.metadata, response.user) == ({"a": "b"}, "me")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("previous_response_id", dict(previous_response_id="resp_1"), "send the whole conversation"),
    ("store", dict(store=True), "nothing is stored here"),
    ("background", dict(background=True), "background True is not supported"),
    ("conversation", dict(conversation="conv_1"), "send the whole conversation"),
    ("truncation", dict(truncation="auto"), "not supported"),
    ("prompt", dict(prompt={"id": "p"}), "not supported"),
    ("tools", dict(tools=[{"type": "web_search"}]), "the type 'web_search' is not supported"),
    ("tools", dict(tools=[{"type": "function"}]), ""),
    ("tools", dict(tools=[{"type": "function", "name": "a b"}]), "'a b'"),
    (
        "tools",
        dict(
            tools=[ADD, {"type": "function", "name": "f", "parameters": {"type": "strin"}}],
            tool_choice="required",
        ),
        "tools[1].parameters of 'f': at #: Invalid type: strin",
    ),
    ("tool_choice", dict(tools=[ADD], tool_choice={"type": "file_search"}), "'file_search'"),
    ("tool_choice", dict(tools=[ADD], tool_choice="any"), ""),
    ("tool_choice", dict(tool_choice="required"), "there are no tools"),
    ("input", dict(input=[{"type": "item_reference", "id": "msg_1"}]), "with store false"),
    ("input", dict(input=[{"type": "computer_call"}]), "'computer_call'"),
    ("input", dict(input=[{"role": "user", "content": [{"type": "input_image"}]}]), "input_image"),
    ("input", dict(input=[{"role": "nobody", "content": "x"}]), "'nobody'"),
    ("input", dict(input=[{"role": "user", "content": 5}]), "a text or parts"),
    ("input", dict(input=[{"role": "user", "content": ["x"]}]), "'x'"),
    ("input", dict(input=[{"role": "user", "content": [{"type": []}]}]), "[]"),
    ("input", dict(input=[{"type": "reasoning"}]), "has no message"),
    ("input", dict(input=[{"type": "function_call", "arguments": "{}"}]), "the name None"),
    ("input", dict(input=[]), ""),
    ("input", dict(input=5), ""),
    ("text", dict(text={"format": {"type": "json_schema", "name": "x"}}), "no schema"),
    (
        "text",
        dict(text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "strin"}}}),
        "strin",
    ),
    ("text", dict(text={"format": {"type": "grammar"}}), "json_schema"),
    ("max_output_tokens", dict(max_output_tokens=0), "at least 1"),
    ("max_tokens", dict(max_tokens=10), "use max_output_tokens"),
    ("n", dict(n=2), "n 2 is not supported"),
    ("max_output_tokens", dict(max_output_tokens="x"), ""),
    ("temperature", dict(temperature=-1), "[0, 100]"),
    ("top_logprobs", dict(top_logprobs=21), ""),
]


@pytest.mark.parametrize(("field", "fields", "words"), REFUSED, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_refused(
    api: Api, field: str, fields: dict[str, Any], words: str, streamed: bool
) -> None:
    body = dict(model=api.model, input="Hi", stream=streamed) | fields
    check_error(api.post(body, PATH), 400, words, field)


def test_a_stream_that_fails(api: Api, local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no more")

    monkeypatch.setattr(Grammars, "find_next", fail)
    events = stream(api, structured_outputs={"regex": "[a-z]{40}"})
    assert events[-1].type == "response.failed"
    response = events[-1].response
    assert response.status == "failed" and "no more" in response.error.message
    wait_until(local.is_idle, 5, "the request has not ended")


def test_clients_that_leave(local: Local) -> None:
    body = dict(model=local.api.model, input="Hi", stream=True, max_output_tokens=6000)
    with (
        local.expect_leaving(),
        local.api.http.stream("POST", PATH, json=body | dict(ignore_eos=True)) as response,
    ):
        lines = response.iter_lines()
        for _ in range(8):
            next(lines)


# Frameworks whose default this API is.


def test_openai_agents(api: Api) -> None:
    import agents

    agents.set_tracing_disabled(True)
    asked = []

    @agents.function_tool
    def weather(city: str) -> str:
        """Tells the weather.

        Args:
            city: where
        """
        asked.append(city)
        return "rain"

    async def run() -> tuple[Any, list[str], Any]:
        async with openai.AsyncOpenAI(**api.options) as client:
            model = agents.OpenAIResponsesModel(model=api.model, openai_client=client)
            written = DEEPSEEK_V31.write([("weather", '{"city": "Köln"}')])
            extra = {"structured_outputs": {"choice": [written]}}
            settings = agents.ModelSettings(max_tokens=600, temperature=0, extra_body=extra)
            agent = agents.Agent(
                name="a", instructions="Be brief.", model=model, tools=[weather],
                model_settings=settings, tool_use_behavior="stop_on_first_tool",
            )  # fmt: skip
            result = await agents.Runner.run(agent, "How is the weather?")

            streamed = agents.Runner.run_streamed(agent, "How is the weather?")
            types = [event.type async for event in streamed.stream_events()]

            say = {"structured_outputs": {"choice": ["It rains."]}}
            followed = agent.clone(model_settings=agents.ModelSettings(extra_body=say))
            answer = await agents.Runner.run(followed, result.to_input_list())
            typed = agents.Agent(
                name="b", model=model, output_type=Pet,
                model_settings=agents.ModelSettings(max_tokens=400),
            )  # fmt: skip
            pet = await agents.Runner.run(typed, "A pet?")
            return result.final_output, types, (answer.final_output, pet.final_output)

    output, types, (answer, pet) = asyncio.run(run())
    assert output == "rain" and asked == ["Köln", "Köln"]
    assert "raw_response_event" in types and "run_item_stream_event" in types
    assert answer == "It rains." and isinstance(pet, Pet)


def test_langchain_and_pydantic_ai(api: Api) -> None:
    import langchain_openai as langchain

    model = langchain.ChatOpenAI(
        base_url=f"{api.url}/v1", api_key="x", model=api.model, use_responses_api=True,
        max_retries=0, max_tokens=400,
    )  # fmt: skip
    (call,) = model.bind_tools([Add], tool_choice="Add").invoke("Add").tool_calls
    Add.model_validate(call["args"])
    assert isinstance(model.with_structured_output(Pet).invoke("A pet?"), Pet)
    chunks = list(model.bind(max_tokens=4).stream("Hi"))
    assert "".join(chunk.text for chunk in chunks)

    import pydantic_ai
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{api.url}/v1", api_key="x")
    agent = pydantic_ai.Agent(
        OpenAIResponsesModel(api.model, provider=provider),
        output_type=Pet,
        model_settings={"parallel_tool_calls": False},
    )
    assert isinstance(asyncio.run(agent.run("A pet?")).output, Pet)


def test_the_schema_of_the_request_is_openais() -> None:
    """What OpenAI's package can send is a field here, or refused or ignored on purpose."""
    from openai.types.responses.response_create_params import ResponseCreateParamsBase

    from minidcp_server.responses_api import IGNORED_FIELDS, REFUSED_FIELDS

    known = {*ResponsesRequest.model_fields, *REFUSED_FIELDS, *IGNORED_FIELDS}
    assert set(ResponseCreateParamsBase.__annotations__) <= known
    assert json.dumps(ResponsesRequest.model_json_schema())
