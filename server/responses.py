"""How answers are sent: whole or as server-sent events, in pieces, and only as long as the client
is there. `generation.py` has what is in them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from pydantic_core import to_json
from starlette.requests import ClientDisconnect

from .json_pieces import write_json

T = TypeVar("T")

# Python's line readers, among others, end a line at these. JSON escapes the others like them.
LINE_ENDS = {
    "\u0085".encode(): b"\\u0085",
    "\u2028".encode(): b"\\u2028",
    "\u2029".encode(): b"\\u2029",
}


def format_event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + escape_line_ends(to_json(content)) + b"\n\n"


def write_long_event(content: dict[str, Any]) -> Iterator[bytes]:
    """The same, in pieces, and with lists that are encoded already."""
    yield b"data: "
    for piece in write_json(content):
        yield escape_line_ends(piece)
    yield b"\n\n"


def escape_line_ends(data: bytes) -> bytes:
    for line_end, escape in LINE_ENDS.items():
        data = data.replace(line_end, escape)
    return data


def respond_in_pieces(pieces: list[bytes]) -> Response:
    """A response with this JSON."""
    if len(pieces) == 1:
        return Response(pieces[0], media_type="application/json")
    headers = {"Content-Length": str(sum(map(len, pieces)))}
    return StreamingResponse(send_all(pieces), headers=headers, media_type="application/json")


async def send_all(pieces: list[bytes]) -> AsyncIterator[bytes]:
    """All pieces, none of which is kept once it is sent."""
    pieces.reverse()
    while pieces:
        yield pieces.pop()


async def prepend(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


async def cancel_on_disconnect(request: Request, answer: Awaitable[T]) -> T:
    """Wait for the answer. If the client leaves first, cancel it and raise ClientDisconnect."""
    working = asyncio.ensure_future(answer)

    async def watch_client() -> None:
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                working.cancel()
                return

    watching = asyncio.create_task(watch_client())
    try:
        return await working
    except asyncio.CancelledError:
        raise ClientDisconnect from None
    finally:
        watching.cancel()
