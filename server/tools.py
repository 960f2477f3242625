"""The functions that a request offers to the model, and what follows from them: for the prompt, for
the grammar, and for how the answer is read (`tool_calls.py`)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from transformers import PreTrainedTokenizerBase

from minidcp.config import require, shorten
from minidcp.engine.grammar_text import WHITESPACE
from minidcp.engine.schema_faults import find_uncountable
from minidcp.structured_outputs import MAX_LENGTH, Part, StructuredOutputsParams, write_part

from .template_tools import TemplateTraits
from .tool_calls import JSON_LINES, NAME, Notation, ToolCallParser

MAX_TOOLS = 1024
MAX_PARAMETERS = 1 << 20  # of all their parameters, in characters: templates write them as JSON
# Keywords by which an object can have other properties than those in "properties".
OPENING_KEYWORDS = {
    "additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames",
    "minProperties", "$ref", "allOf", "anyOf", "oneOf", "if",
}  # fmt: skip
MAX_FORCED_CALLS = 16  # in one answer, where the grammar demands calls

DESCRIPTION = """\
## Tools
You have access to the following tools:
{tools}
IMPORTANT: ALWAYS adhere to this exact format for tool use:
{format}

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema"""


def measure(value: Any) -> int:
    """About how many characters a value has as JSON. Other threads can run meanwhile."""
    length = 0
    rest = [value]
    while rest and length <= MAX_PARAMETERS:
        item = rest.pop()
        if isinstance(item, dict):
            rest += item.values()
            length += sum(map(len, item)) + 4 * len(item)
        elif isinstance(item, list):
            rest += item
            length += 2 * len(item)
        elif isinstance(item, str):
            length += len(item)
        else:
            length += 8
    return length


class FunctionDefinition(BaseModel, extra="allow"):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON Schema")
    strict: bool | None = Field(
        None,
        description="refuse schemas that cannot be enforced whole; with tool_choice auto, nothing "
        "is enforced",
    )


class Tool(BaseModel, extra="allow"):
    type: Literal["function"]
    function: FunctionDefinition

    def to_template(self) -> dict[str, Any]:
        """The tool as chat templates take it. Some fail without a description or parameters."""
        given = self.function
        function = {
            "name": given.name,
            "description": given.description or "",
            "parameters": given.parameters or {"type": "object", "properties": {}},
            **(given.model_extra or {}),
        }
        if given.strict is not None:
            function["strict"] = given.strict
        return {"type": self.type, "function": function}


class FunctionName(BaseModel):
    name: str


class NamedFunction(BaseModel):
    type: Literal["function"]
    function: FunctionName


class ToolFields(BaseModel):
    """A part of the bodies in `protocol.py`."""

    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most")

    def check_tools(self) -> None:
        """Raises ValueError, naming the field, if these fields are wrong."""
        names = set()
        for tool in self.tools or []:
            name = tool.function.name
            require(
                NAME.fullmatch(name),
                f"tools: the function name {shorten(name)} must have 1 to 128 characters, which "
                "are letters, digits, or any of _.:/-",
            )
            require(name not in names, f"tools: there are two functions {shorten(name)}")
            names.add(name)

        length = 0
        for tool in self.tools or []:
            length += measure(tool.function.parameters)
            require(
                length <= MAX_PARAMETERS,
                f"tools: their parameters have more than {MAX_PARAMETERS} characters; offer fewer",
            )

        if self.tool_choice == "required" or isinstance(self.tool_choice, NamedFunction):
            require(names, f"{self.name_choice()}: demands a call, and there are no tools")
        if isinstance(self.tool_choice, NamedFunction):
            name = self.tool_choice.function.name
            require(
                name in names,
                f"{self.name_choice()}: is none of the tools; they are {shorten(sorted(names))}",
            )

    def name_choice(self) -> str:
        """The choice as error messages name it."""
        choice = self.tool_choice
        value = choice.function.name if isinstance(choice, NamedFunction) else choice
        return f"tool_choice {shorten(value)}"

    def list_functions(self) -> dict[str, FunctionDefinition]:
        """All functions, by what error messages call their parameters."""
        functions = {}
        for index, tool in enumerate(self.tools or []):
            name = shorten(tool.function.name)
            functions[f"tools[{index}].function.parameters of {name}"] = tool.function
        return functions

    def list_callable(self) -> dict[str, FunctionDefinition]:
        """The functions of which one must be called; empty if none must."""
        functions = self.list_functions()
        if isinstance(self.tool_choice, NamedFunction):
            name = self.tool_choice.function.name
            return {key: value for key, value in functions.items() if value.name == name}
        return functions if self.tool_choice == "required" else {}

    @property
    def max_calls(self) -> int | None:
        has_one = self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedFunction)
        return 1 if has_one else None


@dataclass(frozen=True)
class ToolUse:
    """What a request's tools mean for it, with this model."""

    tools: list[dict[str, Any]] | None = None  # for the chat template
    description: str | None = None  # for the system prompt, if the template lists no tools
    notation: Notation | None = None  # how calls are to be read; None if they are text
    max_calls: int | None = None
    grammar: StructuredOutputsParams | None = None  # in place of the one that the request asks for
    shown_special_tokens: tuple[int, ...] = ()
    banned_token: int | None = None

    def make_parser(self) -> ToolCallParser | None:
        return ToolCallParser(self.notation, self.max_calls) if self.notation is not None else None


def choose_tool_use(
    fields: ToolFields,
    traits: TemplateTraits,
    tokenizer: PreTrainedTokenizerBase,
    answer: StructuredOutputsParams | None = None,
) -> ToolUse:
    """`answer` is what the text must be like. Raises ValueError, naming the field that is wrong."""
    fields.check_tools()
    if not fields.tools:
        return ToolUse()
    tools = [tool.to_template() for tool in fields.tools]
    functions = fields.list_callable()
    notation = traits.notation
    if not traits.lists_tools and not traits.takes_system:
        require(
            not functions,
            f"{fields.name_choice()}: demands a call, but the model's chat template leaves out "
            "tools and system prompts, so the model cannot know them; use a --chat-template that "
            "lists them",
        )
        return ToolUse()
    if notation is None and functions:
        notation = JSON_LINES

    description = None
    if notation is not None and not traits.lists_tools:
        description = describe(tools, notation)
    listed = tools if traits.lists_tools else None
    if notation is None:
        return ToolUse(tools=listed)

    markers = Markers(tokenizer, notation)
    if fields.tool_choice == "none":
        return ToolUse(tools=listed, description=description, banned_token=markers.begin_token)

    grammar = None
    if functions:
        grammar = demand_calls(functions, notation, markers, fields.max_calls)
    elif answer is not None and answer.content[0] == "json":
        functions = fields.list_functions()
        grammar = allow_calls(functions, notation, markers, fields.max_calls, answer)
    return ToolUse(
        tools=listed,
        description=description,
        notation=notation,
        max_calls=fields.max_calls,
        grammar=grammar,
        shown_special_tokens=markers.special_tokens,
    )


def describe(tools: Sequence[dict[str, Any]], notation: Notation) -> str:
    """The tools as text. The wording is that of DeepSeek-V3.1's model card, for any notation."""
    blocks = []
    for tool in tools:
        function = tool["function"]
        parameters = json.dumps(function["parameters"], ensure_ascii=False)
        blocks.append(
            f"\n### {function['name']}\nDescription: {function['description']}\n\n"
            f"Parameters: {parameters}\n"
        )
    example = notation.write([("tool_call_name", "tool_call_arguments")])
    return DESCRIPTION.format(tools="".join(blocks), format=example)


class Markers:
    """Which tokens a notation has in a tokenizer's vocabulary."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, notation: Notation) -> None:
        added = tokenizer.added_tokens_decoder
        whole = notation.write([("", ""), ("", "")])
        self.token_of_text = {
            str(description.content): token
            for token, description in added.items()
            if str(description.content) in whole
        }
        special = [token for token in self.token_of_text.values() if added[token].special]
        self.special_tokens = tuple(sorted(special))
        # The token without which no call begins.
        self.begin_token = self.token_of_text.get(notation.begin)

    def split(self, text: str) -> list[Part]:
        """The text in parts: single tokens, and text between them."""
        parts: list[Part] = []
        rest = text
        while rest:
            found = [(rest.find(marker), marker) for marker in self.token_of_text]
            starts = [(start, marker) for start, marker in found if start >= 0]
            if not starts:
                parts.append(rest)
                break
            start, marker = min(starts)
            if start > 0:
                parts.append(rest[:start])
            parts.append(self.token_of_text[marker])
            rest = rest[start + len(marker) :]
        return parts


def demand_calls(
    functions: Mapping[str, FunctionDefinition],
    notation: Notation,
    markers: Markers,
    max_calls: int | None,
) -> StructuredOutputsParams:
    """A grammar of calls and nothing else."""
    schemas = make_schemas(functions, strict_counts=True)
    rules = write_call_rules(functions, schemas, notation, markers, max_calls)
    grammar = "\n".join(["start: calls", *rules])
    return StructuredOutputsParams(grammar=grammar, field="tools", schemas=schemas)


def allow_calls(
    functions: Mapping[str, FunctionDefinition],
    notation: Notation,
    markers: Markers,
    max_calls: int | None,
    answer: StructuredOutputsParams,
) -> StructuredOutputsParams | None:
    """A grammar of an answer in JSON or calls. None if there cannot be one: then the schema of the
    answer is refused, or obeyed, by itself."""
    try:
        schema = json.loads(answer.content[1])
        is_usable = isinstance(schema, dict) and find_uncountable(schema) is None
    except (ValueError, RecursionError):
        return None
    if not is_usable:
        return None
    options = {
        "whitespace_flexible": not answer.disable_any_whitespace,
        "whitespace_pattern": answer.whitespace_pattern or WHITESPACE,
        "lenient": False,
        "coerce_one_of": False,
    }
    if answer.disable_any_whitespace:
        del options["whitespace_pattern"]
    schemas = make_schemas(functions, strict_counts=False)
    rules = write_call_rules(functions, schemas, notation, markers, max_calls)
    schemas[answer.field] = schema | {"x-guidance": options}
    rules.append("answer: " + write_part(schemas[answer.field]))
    grammar = "\n".join(["start: calls | answer", *rules])
    if len(grammar) > MAX_LENGTH:
        return None
    return StructuredOutputsParams(grammar=grammar, field=answer.field, schemas=schemas)


def write_call_rules(
    functions: Mapping[str, FunctionDefinition],
    schemas: Mapping[str, dict[str, Any]],
    notation: Notation,
    markers: Markers,
    max_calls: int | None,
) -> list[str]:
    """Rules in Lark's notation, the first of which is called `calls`. The functions and the schemas
    of their arguments have the same keys."""

    def write(text: str) -> str:
        return " ".join(write_part(part) for part in markers.split(text))

    max_further = (max_calls or MAX_FORCED_CALLS) - 1
    further = f"({write(notation.between)} call){{0,{max_further}}}" if max_further else ""
    names = " | ".join(f"call_{index}" for index in range(len(functions)))
    rules = [
        f"calls: {write(notation.begin)} call {further} {write(notation.end)}",
        f"call: {names}",
    ]
    for index, (key, function) in enumerate(functions.items()):
        start = write(f"{notation.head}{function.name}{notation.separator}")
        arguments = write_part(schemas[key])
        rules.append(f"call_{index}: {start} {arguments} {write(notation.tail)}")
    return rules


def make_schemas(
    functions: Mapping[str, FunctionDefinition], strict_counts: bool
) -> dict[str, dict[str, Any]]:
    """The schemas of the functions' arguments. If `strict_counts`, those of functions with strict
    true are enforced whole, or refused."""
    schemas = {}
    for key, function in functions.items():
        is_strict = strict_counts and function.strict is True
        schemas[key] = make_arguments_schema(key, function, is_strict)
    return schemas


def make_arguments_schema(
    key: str, function: FunctionDefinition, is_strict: bool
) -> dict[str, Any]:
    """The schema of a function's arguments, with llguidance's options. What llguidance cannot
    enforce is left to the model, unless the function is strict."""
    schema = {"type": "object", **(function.parameters or {})}
    if not OPENING_KEYWORDS & schema.keys():
        # Parameters that do not exist help nobody, and small models add them without end.
        schema["additionalProperties"] = False
    if is_strict:
        uncountable = find_uncountable(schema)
        require(
            uncountable is None,
            f"{key}: at {uncountable}: is more than one above the number of "
            "required properties, which cannot be enforced",
        )
    schema["x-guidance"] = {
        # On one line, as Python writes JSON: see JSON_LINES.
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
        "lenient": not is_strict,
        "coerce_one_of": not is_strict,
    }
    return schema
