"""JSON Schemas of the supported kinds, made by hypothesis. Whatever fits them is short."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schemas = st.SearchStrategy[dict[str, Any]]

PATTERNS = ["^[0-9]{2,4}$", "^(ab|cd)+x?$", "^[A-Za-z_]\\w{0,6}$", "q+", "^\\d{3}-\\d{4}$"]
FORMATS = ["date", "time", "date-time", "ipv4", "uuid", "email", "hostname", "duration"]
NAMES = ["name", "age", "is it?", "naïve", "日本", 'a"b', "x/y", "id"]

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1000, 1000),
    st.text(max_size=6),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.sampled_from(NAMES), st.booleans(), max_size=2),
)


@st.composite
def bounded(draw: st.DrawFn, schema: dict[str, Any], lower: str, upper: str, most: int) -> Any:
    """The schema with a lower and an upper bound, or one of them, or none where most is 0."""
    smallest = draw(st.integers(0, abs(most)))
    largest = draw(st.integers(smallest, abs(most)))
    return schema | {lower: smallest, upper: largest}


def numbers() -> Schemas:
    kinds = st.sampled_from(["integer", "number"])
    ranges = [("minimum", "maximum"), ("minimum", "exclusiveMaximum")]

    @st.composite
    def build(draw: st.DrawFn) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": draw(kinds)}
        if draw(st.booleans()):
            lower, upper = draw(st.sampled_from(ranges))
            smallest = draw(st.integers(-10_000, 10_000))
            schema |= {lower: smallest, upper: smallest + draw(st.integers(1, 10_000))}
        elif schema["type"] == "integer" and draw(st.booleans()):
            schema |= {"multipleOf": draw(st.integers(1, 12)), "minimum": 0, "maximum": 500}
        return schema

    return build()


def strings() -> Schemas:
    lengths = bounded({"type": "string"}, "minLength", "maxLength", 8)
    patterns = st.sampled_from(PATTERNS).map(
        lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 10}
    )
    formats = st.sampled_from(FORMATS).map(lambda name: {"type": "string", "format": name})
    return st.one_of(lengths, patterns, formats)


def values() -> Schemas:
    constants = VALUES.map(lambda value: {"const": value})
    enums = st.lists(VALUES, min_size=1, max_size=4).map(lambda items: {"enum": items})
    types = st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["null", "boolean"]}])
    return st.one_of(constants, enums, types)


@st.composite
def objects(draw: st.DrawFn, parts: Schemas) -> dict[str, Any]:
    properties = draw(st.dictionaries(st.sampled_from(NAMES), parts, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    schema: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
    extra = draw(st.sampled_from(["none", "some"]))
    if extra == "none":
        return schema | {"additionalProperties": False}
    names = {"^k[0-9]$": draw(parts)}
    schema |= {"patternProperties": names, "additionalProperties": False}
    if required == list(properties):
        schema["maxProperties"] = len(properties) + 2
    return schema


@st.composite
def arrays(draw: st.DrawFn, parts: Schemas) -> dict[str, Any]:
    if draw(st.booleans()):
        items = draw(st.lists(parts, min_size=1, max_size=3))
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    return draw(bounded({"type": "array", "items": draw(parts)}, "minItems", "maxItems", 3))


@st.composite
def references(draw: st.DrawFn, parts: Schemas) -> dict[str, Any]:
    """Alternatives, and the same definition in two places."""
    choice = {"anyOf": draw(st.lists(parts, min_size=1, max_size=3))}
    if draw(st.booleans()):
        return choice
    pair = {"a": {"$ref": "#/$defs/part"}, "b": {"$ref": "#/$defs/part"}}
    shape = {"type": "object", "properties": pair, "required": ["a", "b"]}
    return shape | {"additionalProperties": False, "$defs": {"part": draw(parts)}}


def schemas() -> Schemas:
    leaves = st.one_of(numbers(), strings(), values())
    inner = st.recursive(
        leaves, lambda parts: st.one_of(objects(parts), arrays(parts)), max_leaves=6
    )
    return st.one_of(objects(inner), arrays(inner), references(inner), inner)
