"""Calls of functions in a model's text: how models write them, and a parser that reads them while
the text grows. It knows nothing of tokens and requests; `tools.py` has what clients ask for."""

import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minidcp.engine.detokenizer import count_overlap

NAME = re.compile(r"[\w.:/-]{1,128}")  # of a function; no notation has a marker of such characters
MAX_SPACE = 64  # characters between two calls
MAX_READ = 4096  # characters at a time: with each call, all that is held is copied


@dataclass(frozen=True)
class Notation:
    """How a model writes calls: `begin`, the calls with `between` between them, `end`. A call is
    `head`, the function's name, `separator`, the arguments as JSON, `tail`."""

    name: str
    begin: str
    head: str
    separator: str
    tail: str
    between: str
    end: str

    def write_call(self, name: str, arguments: str) -> str:
        return f"{self.head}{name}{self.separator}{arguments}{self.tail}"

    def write(self, calls: Iterable[tuple[str, str]]) -> str:
        """The text of these calls, each a name and arguments."""
        written = [self.write_call(name, arguments) for name, arguments in calls]
        return f"{self.begin}{self.between.join(written)}{self.end}"


# The names are those of vLLM's parsers.
DEEPSEEK_V3 = Notation(  # DeepSeek-V3 and R1
    name="deepseek_v3",
    begin="<｜tool▁calls▁begin｜>",
    head="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    separator="\n```json\n",
    tail="\n```<｜tool▁call▁end｜>",
    between="\n",
    end="<｜tool▁calls▁end｜>",
)
DEEPSEEK_V31 = Notation(  # DeepSeek-V3.1
    name="deepseek_v31",
    begin="<｜tool▁calls▁begin｜>",
    head="<｜tool▁call▁begin｜>",
    separator="<｜tool▁sep｜>",
    tail="<｜tool▁call▁end｜>",
    between="",
    end="<｜tool▁calls▁end｜>",
)
# For models whose notation is not known. Only a grammar makes them write it. The arguments must be
# written on one line: then nothing but the end of a call is a brace before a line's end.
JSON_LINES = Notation(
    name="json_lines",
    begin="",
    head='{"name": "',
    separator='", "arguments": ',
    tail="}\n",
    between="",
    end="",
)
NOTATIONS = {notation.name: notation for notation in (DEEPSEEK_V3, DEEPSEEK_V31)}


@dataclass(frozen=True)
class TextPiece:
    """Text that is no part of a call."""

    text: str


@dataclass(frozen=True)
class CallPiece:
    """A part of a call. The first one has the name, and only that; the others have arguments."""

    index: int
    id: str
    name: str | None
    arguments: str


Piece = TextPiece | CallPiece


class ToolCallParser:
    """Reads one answer as it grows. What comes out does not depend on how the text is cut.

    A call counts as one from its separator on. What comes before that and is no call is text, so
    nothing is lost. Text is held back while it may be the beginning of a call.
    """

    def __init__(self, notation: Notation, max_calls: int | None = None) -> None:
        self.notation = notation
        self.max_calls = max_calls  # further ones are left out
        self.num_calls = 0

        self.held = ""  # text that is not in any piece yet
        self.state = self.read_text  # the method that reads what comes next
        self.has_begun_calls = False  # whether `held` starts with the notation's `begin`
        self.id = ""  # of the current call
        self.has_arguments = False
        if not notation.begin:
            self.state = self.read_between

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain now that this text has come."""
        pieces: list[Piece] = []
        for start in range(0, len(text), MAX_READ):
            self.held += text[start : start + MAX_READ]
            while self.state(pieces):
                pass
        return pieces

    def flush(self) -> list[Piece]:
        """The last pieces; to be called once, after the last text."""
        held = self.held
        self.held = ""
        if self.state == self.read_arguments:
            return self.continue_call(held)
        if self.state == self.read_between and self.num_calls > 0 and not held.strip():
            return []  # white space after a call
        return [TextPiece(held)] if held else []

    # The states. Each takes what it can from `held`. Returns True if the new state should go on at
    # once.

    def read_text(self, pieces: list[Piece]) -> bool:
        begin = self.notation.begin
        start = self.held.find(begin)
        if start >= 0:
            self.emit_text(start, pieces)
            self.has_begun_calls = True
            self.state = self.read_between
            return True
        self.emit_text(len(self.held) - count_overlap(self.held, begin), pieces)
        return False

    def read_plain(self, pieces: list[Piece]) -> bool:
        """No call can follow."""
        self.emit_text(len(self.held), pieces)
        return False

    def read_between(self, pieces: list[Piece]) -> bool:
        """Before a call, or before the end of all calls."""
        notation = self.notation
        skipped = len(notation.begin) if self.has_begun_calls else 0
        body = self.held[skipped:].lstrip()
        num_spaces = len(self.held) - skipped - len(body)

        if num_spaces <= MAX_SPACE:
            if body.startswith(notation.head):
                return self.read_name(body[len(notation.head) :], pieces)
            if is_beginning(body, notation.head) or is_beginning(body, notation.end):
                return False
            is_end = notation.end and body.startswith(notation.end)
            if is_end and not self.has_begun_calls:
                self.held = body[len(notation.end) :]
                self.state = self.read_text
                return True
        return self.give_up(pieces)

    def read_name(self, rest: str, pieces: list[Piece]) -> bool:
        """`rest` is what follows the head of a call."""
        separator = self.notation.separator
        found = NAME.match(rest)
        name = found[0] if found is not None else ""
        after = rest[len(name) :]
        if name and after.startswith(separator):
            self.held = after[len(separator) :]
            self.has_begun_calls = False
            self.state = self.read_arguments
            self.begin_call(name, pieces)
            return True
        may_go_on = is_beginning(after, separator) if name else not after
        return False if may_go_on else self.give_up(pieces)

    def read_arguments(self, pieces: list[Piece]) -> bool:
        tail = self.notation.tail
        end = self.held.find(tail)
        if end < 0:
            num_certain = len(self.held) - count_overlap(self.held, tail)
            pieces += self.continue_call(self.held[:num_certain])
            self.held = self.held[num_certain:]
            return False

        pieces += self.continue_call(self.held[:end])
        if not self.has_arguments:
            pieces += self.continue_call("{}")  # clients parse them
        self.held = self.held[end + len(tail) :]
        self.state = self.read_between
        return True

    # What states have in common.

    def give_up(self, pieces: list[Piece]) -> bool:
        """What is held is no call. Only a `begin` cannot be another one's beginning."""
        if self.has_begun_calls:
            self.emit_text(len(self.notation.begin), pieces)
            self.has_begun_calls = False
        self.state = self.read_text if self.notation.begin else self.read_plain
        return True

    def emit_text(self, length: int, pieces: list[Piece]) -> None:
        if length > 0:
            pieces.append(TextPiece(self.held[:length]))
            self.held = self.held[length:]

    def begin_call(self, name: str, pieces: list[Piece]) -> None:
        self.num_calls += 1
        self.id = f"call_{uuid.uuid4().hex[:24]}"
        self.has_arguments = False
        if self.is_wanted():
            pieces.append(CallPiece(self.num_calls - 1, self.id, name, ""))

    def continue_call(self, arguments: str) -> list[Piece]:
        if not arguments:
            return []
        self.has_arguments = True
        if not self.is_wanted():
            return []
        return [CallPiece(self.num_calls - 1, self.id, None, arguments)]

    def is_wanted(self) -> bool:
        return self.max_calls is None or self.num_calls <= self.max_calls


def is_beginning(text: str, marker: str) -> bool:
    """Whether more text may make a marker of this one. It is not one yet."""
    return len(text) < len(marker) and marker.startswith(text)


def join_text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))


def join_calls(pieces: Sequence[Piece]) -> list[CallPiece]:
    """One piece for each call that has any: its name if that is among them, and arguments."""
    calls: dict[int, CallPiece] = {}
    for piece in pieces:
        if isinstance(piece, TextPiece):
            continue
        known = calls.get(piece.index)
        if known is not None:
            arguments = known.arguments + piece.arguments
            piece = CallPiece(known.index, known.id, known.name, arguments)
        calls[piece.index] = piece
    return list(calls.values())
