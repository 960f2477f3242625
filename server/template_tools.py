"""What a chat template does with tools: whether it lists them in the prompt, and how it writes
calls. Both are found out by rendering. Also earlier calls, in the form that the template takes."""

import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from minidcp.config import require, shorten

from .tool_calls import NOTATIONS, Notation

Message = dict[str, Any]
Render = Callable[[list[Message], list[dict[str, Any]] | None], str]  # may raise ValueError

MAX_ARGUMENTS = 1 << 20  # characters of a call's arguments, where the template wants them parsed
NAME = "f7a1c93e"  # of the function that is called to see what becomes of it
ARGUMENTS = '{"b2d8": 1}'


@dataclass(frozen=True)
class TemplateTraits:
    lists_tools: bool = False
    takes_system: bool = False  # a text in the system prompt reaches the prompt
    notation: Notation | None = None  # in which it writes calls; None if that is not known
    takes_text: bool = False  # arguments of calls as text, as clients send them, and not as a dict
    # What the content of a message is that only calls functions.
    no_content: str | None = None


def find_traits(render: Render) -> TemplateTraits:
    user = {"role": "user", "content": "Hi"}
    tools = [
        {
            "type": "function",
            "function": {
                "name": NAME,
                "description": "",
                "parameters": {"type": "object", "properties": {}},
            },
        }
    ]
    base = TemplateTraits(
        lists_tools=NAME in try_render(render, [user], tools),
        takes_system=NAME in try_render(render, add_to_system_prompt([user], NAME), None),
    )

    # DeepSeek-V3's first template shows calls only with a content of null, later ones fail at null,
    # and so on. The form that shows a call as the model writes it is the right one.
    forms = []
    for takes_text in (True, False):
        for no_content in (None, ""):
            forms.append(replace(base, takes_text=takes_text, no_content=no_content))
    for form in forms:
        call = {"role": "assistant", "content": None, "tool_calls": [make_call()]}
        text = try_render(render, [user, *prepare_calls([call], form)], None)
        if "None" in text:
            continue  # it writes null as Python does
        for notation in NOTATIONS.values():
            if notation.write_call(NAME, ARGUMENTS) in text:
                return replace(form, notation=notation)
        if NAME in text and ARGUMENTS in text:
            return form
    return base


def make_call() -> dict[str, Any]:
    function = {"name": NAME, "arguments": ARGUMENTS}
    return {"id": "call_0", "type": "function", "function": function}


def try_render(render: Render, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
    """The text; empty if the template refuses these."""
    try:
        return render(messages, tools)
    except ValueError:
        return ""


def prepare_calls(messages: Iterable[Message], traits: TemplateTraits) -> list[Message]:
    """The messages with their calls in the form that the template takes."""
    prepared = []
    for message in messages:
        calls = message.get("tool_calls")
        if calls:
            require(isinstance(calls, list), f"messages: tool_calls {shorten(calls)} is no list")
            message = message | {"tool_calls": [prepare_call(call, traits) for call in calls]}
            if message["role"] == "assistant":
                message = message | {"content": message["content"] or traits.no_content}
        prepared.append(message)
    return prepared


def prepare_call(call: Any, traits: TemplateTraits) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"messages: the tool call {shorten(call)} has no function with a name")
    return {"type": "function", **call, "function": prepare_function(function, traits)}


def prepare_function(function: dict[str, Any], traits: TemplateTraits) -> dict[str, Any]:
    arguments = function.get("arguments")
    if traits.takes_text:
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
    elif isinstance(arguments, str):
        require(
            len(arguments) <= MAX_ARGUMENTS,
            f"messages: the arguments of a tool call have {len(arguments)} characters; "
            f"at most {MAX_ARGUMENTS} may be",
        )
        with suppress(ValueError, RecursionError):  # a model's mistake, which it may see again
            arguments = json.loads(arguments or "{}")
    return function | {"arguments": arguments}


def separate_calls(messages: list[Message], render: Render) -> tuple[list[Message], Sequence[int]]:
    """The messages, but where the template leaves out the calls of messages that also have a text,
    those calls are in a message of their own. Also which message each of them comes from."""
    marked = []
    names = {}
    for index, message in enumerate(messages):
        if message.get("tool_calls") and message["content"]:
            names[index] = f"f{secrets.token_hex(8)}"
            calls = [rename_call(call, names[index]) for call in message["tool_calls"]]
            message = message | {"tool_calls": calls}
        marked.append(message)
    if not names:
        return messages, range(len(messages))

    text = try_render(render, marked, None)
    separated: list[Message] = []
    origins = []
    for index, message in enumerate(messages):
        if index in names and names[index] not in text:
            without_calls = dict(message)
            del without_calls["tool_calls"]
            separated.append(without_calls)
            origins.append(index)
            message = message | {"content": None}
        separated.append(message)
        origins.append(index)
    return separated, origins


def rename_call(call: dict[str, Any], name: str) -> dict[str, Any]:
    return call | {"function": call["function"] | {"name": name}}


def add_to_system_prompt(messages: list[Message], text: str) -> list[Message]:
    """The messages with a text at the end of the first system prompt, or as that."""
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    content = f"{first['content']}\n\n{text}" if first["content"] else text
    return [first | {"content": content}, *messages[1:]]
