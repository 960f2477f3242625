"""A request's grammar as llguidance takes it, and where a schema is wrong. `grammar.py` compiles it
and follows it. Only these two import llguidance, and only when it is needed: it is optional."""

import json
import time
from functools import partial
from typing import Any

from minidcp.config import require
from minidcp.engine.schema_faults import MAX_SECONDS, find_fault, find_uncountable
from minidcp.structured_outputs import StructuredOutputsParams

# Between the parts of JSON, if the request says nothing else. Every usual writer's JSON fits: one
# space, or a line end and an indentation. With more freedom, models sometimes write nothing else.
WHITESPACE = r"[\x20\x09]|\x0D?\x0A[\x20\x09]{0,32}"
NOTHING_FITS = "nothing fits it, or only an empty text"

# llguidance's own bounds, about half of its defaults. Each is counted in steps of its algorithm. On
# the core where they were chosen, compiling took up to 0.6 s with them, mostly 1 ms.
LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}


class SchemaError(ValueError):
    """One of the schemas within a grammar is wrong. The message begins with its name."""


def write_grammar(params: StructuredOutputsParams) -> str:
    """The grammar as llguidance takes it. Raises ValueError if it cannot be read at all."""
    from llguidance import LLMatcher, grammar_from

    kind, text = params.content
    if kind == "json":
        return write_json_grammar(read_json(text), params)
    if kind == "choice":
        # One terminal of all texts. As rules, each would cost as much as the whole terminal.
        choices = [json.dumps(choice, ensure_ascii=False) for choice in json.loads(text)]
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(choices))
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    return grammar_from("grammar", text)


def write_json_grammar(schema: Any, params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    if isinstance(schema, bool):
        require(schema, NOTHING_FITS)
        schema = {}
    require(isinstance(schema, dict), "a JSON Schema is an object")
    uncountable = find_uncountable(schema)
    require(
        uncountable is None,
        f"at {uncountable}: is more than one above the number of required properties, which cannot "
        "be enforced",
    )
    # These go before what the schema has as "x-guidance", which would let it switch checks off.
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema),
        overrides={
            "whitespace_flexible": not params.disable_any_whitespace,
            "whitespace_pattern": choose_whitespace(params),
            "item_separator": ",",
            "key_separator": ":",
            "lenient": False,
            "coerce_one_of": False,
        },
    )


def choose_whitespace(params: StructuredOutputsParams) -> str | None:
    if params.disable_any_whitespace:
        return None
    return params.whitespace_pattern or WHITESPACE


def read_json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("the JSON Schema is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the JSON Schema is not valid JSON: {error}") from None


def refuse_constant(name: str) -> None:
    """Called for NaN, Infinity and -Infinity, which Python's JSON has and JSON has not."""
    raise ValueError(f"{name} is no number")


def locate(params: StructuredOutputsParams) -> str:
    """A pointer to the part of the schema that is wrong."""
    return find_fault(read_json(params.content[1]), explain)


def check_schemas(params: StructuredOutputsParams) -> None:
    """Raises SchemaError if one of the schemas within a grammar is wrong by itself."""
    deadline = time.monotonic() + MAX_SECONDS
    for name, schema in params.schemas.items():
        if time.monotonic() > deadline:
            return
        explain_part = partial(explain, options=schema.get("x-guidance"))
        fault = explain_part(schema)
        if fault:
            raise SchemaError(f"{name}: at {find_fault(schema, explain_part)}: {fault}")


def explain(schema: Any, options: dict[str, Any] | None = None) -> str:
    """What llguidance says is wrong with a schema; "" if nothing is."""
    from llguidance import LLMatcher, LLParserLimits

    if options is not None and isinstance(schema, dict):
        schema = schema | {"x-guidance": options}
    limits = LLParserLimits(**LIMITS)  # type: ignore[arg-type]
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    return LLMatcher.validate_grammar(grammar, limits=limits)
