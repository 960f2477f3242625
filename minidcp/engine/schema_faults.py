"""Where a JSON Schema is wrong. llguidance says what is wrong with a schema, but not where. So the
smallest part of it is looked for that has the same fault by itself."""

import time
from collections.abc import Callable, Iterator
from typing import Any

# Keywords whose value is a schema; a list of schemas; and an object of schemas by name.
SCHEMAS = (
    "items",
    "additionalProperties",
    "contains",
    "not",
    "if",
    "then",
    "else",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
    "additionalItems",
    "contentSchema",
)
SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
SCHEMA_MAPS = (
    "properties",
    "patternProperties",
    "dependentSchemas",
    "$defs",
    "definitions",
    "dependencies",
)
DEFINITIONS = ("$defs", "definitions")

MAX_TRIES = 500  # of parts; each takes a fraction of a millisecond, mostly
MAX_SECONDS = 0.5  # large definitions take longer

Path = tuple[str, ...]


def find_fault(schema: Any, explain: Callable[[Any], str]) -> str:
    """A JSON pointer, such as #/properties/a, to the smallest part with the fault of the whole.

    `explain` says what is wrong with a schema, and gives "" if nothing is.
    """
    fault = explain(schema)
    definitions = {}
    if isinstance(schema, dict):
        definitions = {name: schema[name] for name in DEFINITIONS if name in schema}

    path: Path = ()
    part = schema
    tries_left = MAX_TRIES
    deadline = time.monotonic() + MAX_SECONDS
    visited = {path}
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for child_path, child in list_parts(schema, path, part):
            has_time = tries_left > 0 and time.monotonic() < deadline
            if not has_time or child_path in visited:
                continue
            tries_left -= 1
            visited.add(child_path)
            alone = {**definitions, **child} if isinstance(child, dict) else child
            if explain(alone) == fault:
                path = child_path
                part = child
                is_smaller = True
                break
    return write_pointer(path)


def list_parts(schema: Any, path: Path, part: Any) -> Iterator[tuple[Path, Any]]:
    """The schemas directly within the part at `path`, and the definition that it refers to."""
    if not isinstance(part, dict):
        return
    for keyword, value in part.items():
        if keyword in SCHEMA_MAPS and isinstance(value, dict):
            for name, child in value.items():
                yield (*path, keyword, name), child
        elif keyword in SCHEMA_LISTS and isinstance(value, list):
            for index, child in enumerate(value):
                yield (*path, keyword, str(index)), child
        elif keyword in SCHEMAS:
            yield (*path, keyword), value

    reference = part.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target_path = tuple(reference.removeprefix("#/").split("/"))
        target = schema
        for name in target_path:
            target = target.get(name) if isinstance(target, dict) else None
        if target is not None:
            yield target_path, target


def find_uncountable(part: Any, path: Path = ()) -> str | None:
    """A pointer to a `minProperties` that could be reached by repeating a key, or None.

    llguidance does not keep the keys of additionalProperties and patternProperties apart from each
    other. So of the required number at most one may be such a key.
    """
    if isinstance(part, dict):
        required = part.get("required")
        num_required = len(required) if isinstance(required, list) else 0
        minimum = part.get("minProperties")
        if isinstance(minimum, int) and minimum > num_required + 1:
            return write_pointer((*path, "minProperties"))
    for child_path, child in list_parts(None, path, part):
        found = find_uncountable(child, child_path)
        if found is not None:
            return found
    return None


def write_pointer(path: Path) -> str:
    """RFC 6901, as a fragment."""
    escaped = [name.replace("~", "~0").replace("/", "~1") for name in path]
    return "/".join(["#", *escaped])
