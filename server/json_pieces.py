"""JSON that is written in pieces, because an answer can have megabytes. What it is written from are
plain values, and `JsonList`s that were encoded as they grew."""

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic_core import to_json

PIECE_BYTES = 1 << 16  # about what a connection takes at once


class JsonList:
    """A list that is encoded while it grows. Its items are not kept."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def extend(self, items: list[Any]) -> None:
        if items:
            self.pieces.append(to_json(items)[1:-1])  # without the brackets


def write_json(value: Any) -> Iterator[bytes]:
    """The JSON of a value, in small pieces."""
    if isinstance(value, JsonList):
        yield b"["
        yield from separate([piece] for piece in value.pieces)
        yield b"]"
    elif isinstance(value, list):
        yield b"["
        yield from separate(write_json(item) for item in value)
        yield b"]"
    elif isinstance(value, dict):
        yield b"{"
        yield from separate(write_member(name, item) for name, item in value.items())
        yield b"}"
    else:
        yield to_json(value)


def write_member(name: str, value: Any) -> Iterator[bytes]:
    yield to_json(name) + b":"
    yield from write_json(value)


def separate(items: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    """The pieces of all items, with commas between the items."""
    for index, pieces in enumerate(items):
        if index > 0:
            yield b","
        yield from pieces


def join_pieces(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of about PIECE_BYTES."""
    joined: list[bytes] = []
    num_bytes = 0
    for piece in pieces:
        joined.append(piece)
        num_bytes += len(piece)
        if num_bytes >= PIECE_BYTES:
            yield b"".join(joined)
            joined = []
            num_bytes = 0
    if joined:
        yield b"".join(joined)
