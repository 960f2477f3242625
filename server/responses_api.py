"""Requests of OpenAI's Responses API. Nothing is stored: every request brings its conversation, and
becomes the chat with the same messages, tools and parameters. `responses_answer.py` has what is
sent back."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from minidcp.config import require, shorten

from .protocol import MAX_MESSAGES, SAMPLING_FIELDS, ChatRequest, Sampling, at_most
from .structured_outputs import StructuredOutputFields
from .tools import MAX_TOOLS
from .unsupported import is_refused

# What would need a memory, or something else that is not here, and the values that ask for nothing.
REFUSED_FIELDS: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_tokens": (),
    "moderation": (),
    "n": (1,),
    "previous_response_id": (),
    "prompt": (),
    "store": (False,),
    "truncation": ("disabled",),
}
# OpenAI's fields that change nothing here, or only how hard a model of theirs thinks.
IGNORED_FIELDS = {
    "access_programs",
    "background_options",
    "max_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning",
    "safety_identifier",
    "service_tier",
    "stream_options",
}
ADVICE = {
    "previous_response_id": "send the whole conversation as input",
    "conversation": "send the whole conversation as input",
    "logprobs": "use include, with message.output_text.logprobs",
    "max_completion_tokens": "use max_output_tokens",
    "max_tokens": "use max_output_tokens",
    "store": "nothing is stored here; send false, or leave it out",
    "truncation": 'leave it out, or send "disabled"',
}
# What the chat that a request becomes calls its fields.
NAME_OF_CHAT_FIELD = {
    "messages": "input",
    "response_format": "text",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
}
ROLES = ("user", "assistant", "system", "developer")
TEXT_TYPES = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
LOGPROBS = "message.output_text.logprobs"

Items = Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1)]


class TextFormat(BaseModel, extra="allow"):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="the schema is always enforced")


class TextConfig(BaseModel):
    format: TextFormat | None = None


class ResponsesRequest(Sampling, StructuredOutputFields):  # type: ignore[misc, valid-type]
    """Body of POST /v1/responses. Chats' fields for sampling and structured outputs work too."""

    input: Annotated[str | Items, at_most(MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextConfig | None = None
    tools: Annotated[list[dict[str, Any]] | None, at_most(MAX_TOOLS)] = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] | None = Field(
        None, description=f"{LOGPROBS} is obeyed; the others are about what never comes"
    )
    metadata: dict[str, str] | None = Field(None, description="comes back as it is")
    user: str | None = None

    @model_validator(mode="after")
    def refuse_unsupported(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in REFUSED_FIELDS:
                is_wrong = value is not None and value not in REFUSED_FIELDS[name]
            else:
                is_wrong = name not in IGNORED_FIELDS and is_refused(name, value)
            if is_wrong:
                advice = ADVICE.get(name, "leave it out")
                raise ValueError(f"{name} {shorten(value)} is not supported; {advice}")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or []) or bool(self.top_logprobs)

    def to_chat(self) -> ChatRequest:
        """Raises ValueError, naming the field of this request that is wrong."""
        same = (*SAMPLING_FIELDS, *StructuredOutputFields.model_fields)
        fields = {name: getattr(self, name) for name in same}
        fields |= {
            "model": self.model,
            "messages": self.list_messages(),
            "tools": [convert_tool(tool) for tool in self.tools or []] or None,
            "tool_choice": convert_tool_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.convert_format() or self.response_format,
            "max_completion_tokens": self.max_output_tokens,
            "stream": self.stream,
            "logprobs": self.wants_logprobs or None,
            "top_logprobs": self.top_logprobs,
        }
        try:
            return ChatRequest.model_validate(fields)
        except ValidationError as error:
            raise ValueError(describe_error(error)) from None

    def convert_format(self) -> dict[str, Any] | None:
        form = self.text.format if self.text is not None else None
        if form is None or form.type == "text":
            return None
        require(self.response_format is None, "text: has a format, and so has response_format")
        if form.type != "json_schema":
            return {"type": form.type}
        require(form.schema_ is not None, "text: the format json_schema has no schema; give one")
        return {"type": form.type, "json_schema": {"name": form.name, "schema": form.schema_}}

    def describe_format(self) -> dict[str, Any]:
        form = self.text.format if self.text is not None else None
        if form is None or form.type != "json_schema":
            return {"type": form.type if form is not None else "text"}
        return {
            "type": form.type,
            "name": form.name,
            "description": form.description,
            "schema": form.schema_,
            "strict": form.strict,
        }

    def list_messages(self) -> list[dict[str, Any]]:
        """The conversation as chats have it."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            add_item(item, messages)
        require(messages, "input: has no message; give one")
        return messages


def add_item(item: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """Add what an item says to the messages, or to the last of them."""
    kind = item.get("type") or "message"
    if kind == "message":
        role = item.get("role")
        require(role in ROLES, f"input: role {shorten(role)} must be one of {', '.join(ROLES)}")
        messages.append({"role": role, "content": join_content(item.get("content"))})
    elif kind == "function_call":
        add_call(item, messages)
    elif kind == "function_call_output":
        call_id = item.get("call_id")
        content = join_content(item.get("output"))
        messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
    elif kind == "item_reference":
        raise ValueError(
            f"input: an item_reference to {shorten(item.get('id'))} is not supported, because "
            "nothing is stored here; send the item itself (SDKs do so with store false)"
        )
    # Reasoning is left out, as DeepSeek's chat templates leave out that of earlier answers.
    elif kind != "reasoning":
        raise ValueError(
            f"input: an item of type {shorten(kind)} is not supported; only message, "
            "function_call, function_call_output and reasoning"
        )


def add_call(item: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """A call belongs to the answer before it, with its text and other calls."""
    name = item.get("name")
    require(isinstance(name, str), f"input: a function_call has the name {shorten(name)}")
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    function = {"name": name, "arguments": item.get("arguments")}
    call = {"id": item.get("call_id"), "type": "function", "function": function}
    messages[-1].setdefault("tool_calls", []).append(call)


def join_content(content: Any) -> str:
    """The text of a message or of a function's output."""
    if isinstance(content, str):
        return content
    require(isinstance(content, list), f"input: content {shorten(content)} must be a text or parts")
    return "\n".join(read_parts(content))  # as chats join them


def read_parts(parts: Iterable[Any]) -> Iterable[str]:
    """The text of each part. Raises ValueError if one has none."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else part
        text = None
        if isinstance(part, dict) and isinstance(kind, str):
            text = part.get(TEXT_TYPES.get(kind, ""))
        if not isinstance(text, str):
            raise ValueError(
                f"input: a content part of type {shorten(kind)} is not supported; only input_text "
                "and output_text, with a text"
            )
        yield text


def convert_tool(tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type")
    require(
        kind == "function",
        f"tools: the type {shorten(kind)} is not supported; only 'function'",
    )
    function = {name: value for name, value in tool.items() if name != "type"}
    return {"type": "function", "function": function}


def convert_tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    require(
        kind == "function",
        f"tool_choice: the type {shorten(kind)} is not supported; only 'function'",
    )
    return {"type": "function", "function": {"name": choice.get("name")}}


def describe_error(error: ValidationError) -> str:
    """The first error of a chat that was made of a request, as one of the request."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return rename_field(str(first["ctx"]["error"]))
    field = str(first["loc"][0])
    return rename_field(f"{field}: {shorten(first['input'])}: {first['msg']}")


def rename_field(message: str) -> str:
    """A message about a field of a chat, with the field's name in this API."""
    if message.startswith("tools["):
        return message.replace(".function.", ".", 1)
    for chat_name, name in NAME_OF_CHAT_FIELD.items():
        rest = message.removeprefix(chat_name)
        if rest != message and rest[:1] in (":", " "):
            return name + rest
    return message
