"""What a completion must be like: a JSON Schema, a regular expression, a choice or a grammar. Plain
Python, under vLLM's names. `engine/grammar.py` enforces it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from minidcp.config import require, shorten

# Of a schema, pattern or grammar as text: compiling takes time. docs/operations.md says so too.
MAX_LENGTH = 128 << 10
KINDS = ("json", "regex", "choice", "grammar", "json_object")

# What a grammar can be put together from: a text, a token id, or a JSON Schema.
Part = str | int | dict[str, Any]


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What a completion must be like. Exactly one of the first five fields must be given.

    The completion ends where the grammar does: `finish_reason` is then "stop". If max_tokens cuts
    it first ("length"), it is only the beginning of something that fits. Raises ValueError if a
    field is wrong; what the engine finds wrong with a schema or grammar, it says when it compiles
    it.
    """

    json: str | dict[str, Any] | bool | None = None  # a JSON Schema; a str holds one as JSON
    regex: str | None = None  # in the syntax of Rust's regex crate; it must match the whole text
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None  # Lark in llguidance's variant, or GBNF, which is also called EBNF
    json_object: bool | None = None  # any JSON object

    # Only of JSON. By default a space, or a line end and an indentation, may stand wherever JSON
    # allows whitespace.
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None  # a regular expression

    # JSON Schemas within a grammar, by what error messages call them.
    schemas: dict[str, dict[str, Any]] = field(
        default_factory=dict, kw_only=True, compare=False, repr=False
    )
    # What error messages call this: the field of a client's request.
    field: str = field(default="structured_outputs", kw_only=True, compare=False)

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if self.json is False:  # a schema, though one that nothing fits
            given.append("json")
        require(
            len(given) == 1,
            f"{self.field}: has {' and '.join(given) or 'nothing'}; "
            f"exactly one of {', '.join(KINDS)} must be given",
        )
        self.check(isinstance(self.json, str | dict | bool | None), "json", "a JSON Schema")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            self.check(value is None or isinstance(value, str), name, "a text")
        if self.choice is not None:
            are_texts = isinstance(self.choice, list | tuple) and all(
                isinstance(text, str) and text for text in self.choice
            )
            self.check(are_texts and len(self.choice) > 0, "choice", "a list of non-empty texts")

    def check(self, is_valid: bool, name: str, allowed: str) -> None:
        if not is_valid:
            raise ValueError(
                f"{self.field}: {name} {shorten(getattr(self, name))} must be {allowed}"
            )

    @cached_property
    def content(self) -> tuple[str, str]:
        """The kind, one of "json", "regex", "choice" and "grammar", and its text.

        Computed once, since a schema may be large. Raises ValueError if it is too large.
        """
        if self.json_object:
            return "json", '{"type": "object"}'
        if isinstance(self.json, str):
            return "json", self.limit([self.json])
        if self.json is not None:
            return "json", self.limit(json.JSONEncoder().iterencode(self.json))
        if self.choice is not None:
            return "choice", self.limit(json.JSONEncoder().iterencode(self.choice))
        if self.regex is not None:
            return "regex", self.limit([self.regex])
        assert self.grammar is not None
        return "grammar", self.limit([self.grammar])

    def limit(self, pieces: Iterable[str]) -> str:
        """The pieces as one text, if that is short enough."""
        text = []
        length = 0
        try:
            for piece in pieces:
                text.append(piece)
                length += len(piece)
                require(
                    length <= MAX_LENGTH,
                    f"{self.field}: is longer than the {MAX_LENGTH} characters that are allowed",
                )
        except (TypeError, RecursionError) as error:  # of a schema that is no JSON, offline
            raise ValueError(f"{self.field}: cannot be written as JSON ({error})") from None
        return "".join(text)

    @classmethod
    def from_parts(
        cls, *alternatives: Sequence[Part], max_repeats: int = 1, **options: Any
    ) -> Self:
        """A grammar of one of these alternatives, or of up to `max_repeats` of them in a row.

        The parts of an alternative follow each other. A str stands for that text in ordinary
        tokens, an int for the token with that id, which is how special tokens are given, and a dict
        for JSON that fits the schema. `options` are the other fields. For calls of tools:

            from_parts(["<f>", schema_of_f, "</f>"], ["<g>", schema_of_g, "</g>"], max_repeats=4)
        """
        rules = []
        for index, parts in enumerate(alternatives):
            rules.append(f"part_{index}: " + " ".join(write_part(part) for part in parts))
        names = " | ".join(f"part_{index}" for index in range(len(alternatives)))
        start = f"start: ({names}){{1,{max_repeats}}}"
        return cls(grammar="\n".join([start, *rules]), **options)


def write_part(part: Part) -> str:
    """A part of an alternative in Lark's notation."""
    if isinstance(part, str):
        return json.dumps(part, ensure_ascii=False)
    if isinstance(part, int):
        return f"<[{part}]>"
    return "%json " + json.dumps(part)
