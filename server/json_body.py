"""The JSON of request bodies. Python parses JSON in one go, and no other thread runs meanwhile. So
a large body is first measured by NumPy, which lets threads run, and refused if it holds too much.
Then a thread parses it in small pieces. `app.py` uses the route class."""

import asyncio
import codecs
import json
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from minidcp.config import shorten

# What a body may hold; docs/operations.md says so. A million token ids are some hundred documents.
MAX_VALUES = 1_000_000
MAX_CONTAINERS = 100_000  # lists, objects and the keys of objects: each costs as much as 10 numbers
MAX_DEPTH = 100
MAX_NUMBER_BYTES = 5000  # Python takes fewer digits yet

PIECE_BYTES = 8 << 10  # parsed in less than 3 ms, whatever it holds
WINDOW_BYTES = 64 << 10  # what is measured at a time

QUOTE = ord('"')
BACKSLASH = ord("\\")

OPEN = 1
CLOSE = 2
COMMA = 3
COLON = 4
KIND_OF_BYTE = np.zeros(256, np.uint8)
KIND_OF_BYTE[list(b"[{")] = OPEN
KIND_OF_BYTE[list(b"]}")] = CLOSE
KIND_OF_BYTE[list(b",")] = COMMA
KIND_OF_BYTE[list(b":")] = COLON
TOO_MANY_DIGITS = HTTPException(400, "the body holds a number with too many digits")
CLOSING = {ord("["): ord("]"), ord("{"): ord("}")}


class IntList(list[int]):
    """A list of integers, as the parser knows. Nobody needs to look at each of them again."""


class BodyParser:
    """Parses the bodies of requests, large ones in a thread of its own."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(1, "json")

    async def parse(self, body: bytes) -> Any:
        """Raises JSONDecodeError if it is not JSON, and a 400 if it holds too much."""
        if len(body) <= PIECE_BYTES:
            return parse_piece(body)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.executor, parse_large, body)

    def close(self) -> None:
        self.executor.shutdown()

    def make_route_class(self) -> type[APIRoute]:
        """The class of routes whose bodies are parsed here."""
        parser = self

        class JsonRequest(Request):
            async def json(self) -> Any:
                return await parser.parse(await self.body())

        class JsonRoute(APIRoute):
            def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
                handle = super().get_route_handler()
                if self.body_field is None:
                    return handle

                async def handle_json(request: Request) -> Response:
                    json_request = JsonRequest(request.scope, request.receive)
                    if not await json_request.body():
                        raise HTTPException(400, "the body is empty; send a JSON object")
                    check_content_headers(request.headers)
                    return await handle(json_request)

                return handle_json

        return JsonRoute


def check_content_headers(headers: Headers) -> None:
    """Raises a 415 if the body is not said to be JSON, or is compressed. A browser sends JSON to
    another site only if that site allows it; it sends other types to any."""
    content_type = headers.get("content-type", "")
    main_type, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    is_json = main_type == "application" and (subtype == "json" or subtype.endswith("+json"))
    if not is_json:
        given = f"is {shorten(content_type)}" if content_type else "is missing"
        raise HTTPException(415, f"the header Content-Type {given}; send application/json")

    encoding = headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise HTTPException(
            415,
            f"the header Content-Encoding is {shorten(encoding)}; send the body uncompressed",
        )


def parse_piece(piece: bytes) -> Any:
    """Parse JSON that is small. Raises JSONDecodeError, or a 400 for limits of Python's parser."""
    try:
        return json.loads(piece.decode("utf-8-sig"))
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise invalid(f"not UTF-8 ({error.reason})") from None
    except ValueError:
        raise TOO_MANY_DIGITS from None
    except RecursionError:
        raise too_much(f"levels of lists and objects, at most {MAX_DEPTH}") from None


def parse_large_scalar(text: bytes) -> Any:
    """Parse a string or a number, with much white space around it or long itself."""
    text = text.strip(b" \t\r\n")
    if len(text) > MAX_NUMBER_BYTES and text[0] != QUOTE:
        raise TOO_MANY_DIGITS
    return parse_piece(text)


def parse_large(body: bytes) -> Any:
    """Parse JSON of any size in pieces."""
    body = body.removeprefix(codecs.BOM_UTF8)
    return PieceParser(body).parse_value(0, len(body))


def invalid(reason: str) -> json.JSONDecodeError:
    return json.JSONDecodeError(reason, "", 0)


def too_much(what: str) -> HTTPException:
    return HTTPException(400, f"the body holds too many {what}; send less in one request")


class Scanner:
    """Finds the brackets, braces, commas and colons that are outside strings, window by window."""

    def __init__(self) -> None:
        self.is_in_string = 0
        self.is_escaped = 0  # whether the next byte follows an odd number of backslashes
        self.depth = 0

    def scan(self, window: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Their positions, their kinds, and how deep they are nested. A bracket counts as inside
        the list that it opens and outside the list that it closes."""
        quotes = self.find_quotes(window)
        in_string = np.zeros(len(window), np.uint8)
        in_string[quotes] = 1
        in_string = np.bitwise_xor.accumulate(in_string) ^ np.uint8(self.is_in_string)
        self.is_in_string = int(in_string[-1])

        kinds = KIND_OF_BYTE.take(window)
        kinds *= 1 - in_string
        positions = np.flatnonzero(kinds)
        kinds = kinds[positions]
        steps = (kinds == OPEN).astype(np.int32) - (kinds == CLOSE)
        depths = self.depth + np.cumsum(steps)
        if len(depths) > 0:
            self.depth = int(depths[-1])
        return positions, kinds, depths

    def find_quotes(self, window: NDArray[np.uint8]) -> NDArray[Any]:
        """The quotes that begin and end strings. The others follow an odd number of backslashes."""
        quotes = np.flatnonzero(window == QUOTE)
        is_backslash = window == BACKSLASH
        if not is_backslash.any():
            starts_escaped = self.is_escaped
            self.is_escaped = 0
            is_first_escaped = starts_escaped and len(quotes) > 0 and quotes[0] == 0
            return quotes[1:] if is_first_escaped else quotes

        # By position: the last byte before it that is no backslash.
        before = np.empty(len(window) + 1, np.int32)
        before[0] = -1 - self.is_escaped
        before[1:] = np.where(is_backslash, before[0], np.arange(len(window), dtype=np.int32))
        before = np.maximum.accumulate(before)
        self.is_escaped = int(len(window) - 1 - before[-1]) % 2
        num_backslashes = quotes - 1 - before[quotes]
        is_real = num_backslashes % 2 == 0
        return np.asarray(quotes[is_real])


class PieceParser:
    """Parses one body. It finds where lists and objects can be cut, and Python parses the pieces.
    A piece is a whole number of items, so all of it is checked as strictly as at once."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.positions, self.kinds, self.depths = measure(body)

    def parse_value(self, start: int, end: int) -> Any:
        """The value in body[start:end]."""
        begin, stop = np.searchsorted(self.positions, (start, end))
        if end - start <= PIECE_BYTES:
            return parse_piece(self.body[start:end])
        if begin == stop:
            return parse_large_scalar(self.body[start:end])

        opening = int(self.positions[begin])
        closing = int(self.positions[stop - 1])
        is_whole = (
            CLOSING.get(self.body[opening]) == self.body[closing]
            and is_blank(self.body[start:opening])
            and is_blank(self.body[closing + 1 : end])
        )
        if not is_whole:
            raise invalid("a value is not complete, or followed by something else")
        if stop - begin == 2 and is_blank(self.body[opening + 1 : closing]):
            return parse_piece(self.body[opening : opening + 1] + self.body[closing : closing + 1])

        is_inner = self.depths[begin:stop] == self.depths[begin]
        commas = self.positions[begin:stop][is_inner & (self.kinds[begin:stop] == COMMA)]
        colons = self.positions[begin:stop][is_inner & (self.kinds[begin:stop] == COLON)]
        if self.body[opening] == ord("["):
            return self.parse_list(cut(opening + 1, closing, commas))
        return self.parse_object(cut(opening + 1, closing, commas), colons)

    def parse_list(self, pieces: Iterator[tuple[int, int, bool]]) -> list[Any]:
        items: list[Any] = []
        has_ints_only = True
        for start, end, is_single in pieces:
            if is_single:
                items.append(self.parse_value(start, end))
                has_ints_only = False
                continue
            parsed = parse_piece(b"[" + self.body[start:end] + b"]")
            if not parsed:
                raise invalid("a list has a comma too many")
            items += map(mark_ints, parsed)
            has_ints_only = has_ints_only and are_ints(parsed)
        return IntList(items) if has_ints_only else items

    def parse_object(
        self, pieces: Iterator[tuple[int, int, bool]], colons: NDArray[Any]
    ) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for start, end, is_single in pieces:
            first_colon = int(np.searchsorted(colons, start))
            if is_single and first_colon < len(colons):
                colon = int(colons[first_colon])
                name = parse_piece(self.body[start:colon])
                if not isinstance(name, str):
                    raise invalid("a key is not a string")
                fields[name] = self.parse_value(colon + 1, end)
                continue
            parsed = parse_piece(b"{" + self.body[start:end] + b"}")
            if not parsed:
                raise invalid("an object has a comma too many")
            fields.update(parsed)
        return fields


def is_long(items: list[Any]) -> bool:
    """Whether so many items cannot come from a body that is parsed at once."""
    return len(items) > PIECE_BYTES // 2  # each has a comma


def are_ints(items: list[Any]) -> bool:
    return set(map(type, items)) == {int}


def mark_ints(value: Any) -> Any:
    """The value, as an IntList if it is a list of integers."""
    return IntList(value) if isinstance(value, list) and are_ints(value) else value


def measure(body: bytes) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """What a Scanner finds in the whole body. Raises a 400 as soon as it has found too much."""
    scanner = Scanner()
    array = np.frombuffer(body, np.uint8)
    found = []
    num_values = num_containers = 0
    for start in range(0, len(array), WINDOW_BYTES):
        positions, kinds, depths = scanner.scan(array[start : start + WINDOW_BYTES])
        found.append((positions + start, kinds, depths))

        num_by_kind = np.bincount(kinds, minlength=COLON + 1)
        num_containers += int(num_by_kind[OPEN] + num_by_kind[COLON])
        num_values += int(num_by_kind[COMMA])  # a comma less than values
        if num_values >= MAX_VALUES:
            raise too_much(f"values, at most {MAX_VALUES}")
        if num_containers > MAX_CONTAINERS:
            raise too_much(f"lists, objects and keys of objects, at most {MAX_CONTAINERS}")
        if len(depths) > 0 and depths.max() > MAX_DEPTH:
            raise too_much(f"levels of lists and objects, at most {MAX_DEPTH}")

    all_positions, all_kinds, all_depths = zip(*found, strict=True)
    return (
        np.concatenate(all_positions),
        np.concatenate(all_kinds),
        np.concatenate(all_depths),
    )


def cut(start: int, end: int, commas: NDArray[Any]) -> Iterator[tuple[int, int, bool]]:
    """Cut body[start:end] at commas into pieces of items, each as large as it may be.

    Yields (start, end, whether it is a single item too large for a piece).
    """
    next_comma = 0
    while next_comma < len(commas):
        last = int(np.searchsorted(commas, start + PIECE_BYTES)) - 1
        is_single = last < next_comma
        if is_single:
            last = next_comma
        yield start, int(commas[last]), is_single
        start = int(commas[last]) + 1
        next_comma = last + 1
    yield start, end, end - start > PIECE_BYTES


def is_blank(text: bytes) -> bool:
    return not text.strip(b" \t\r\n")
