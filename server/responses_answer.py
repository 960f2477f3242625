"""POST /v1/responses: the answer of a chat as OpenAI's Responses API has it, whole or as typed
events. `responses_api.py` has the requests."""

import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import chain
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from minidcp.engine.executor import EngineDeadError
from minidcp.request import FinishReason, OutputDelta

from .async_engine import AsyncEngine, GrammarError, UnavailableError
from .chat import ChatGeneration
from .json_pieces import JsonList, join_pieces, write_json
from .logprobs import LogprobsFormatter
from .responses import write_long_event
from .responses_api import ResponsesRequest, rename_field
from .side_work import SideWorker
from .tokenization import TokenizerService
from .tool_calls import CallPiece, Piece

Event = dict[str, Any]
FAILURES = (EngineDeadError, UnavailableError, TimeoutError, GrammarError)


class ResponsesGeneration(ChatGeneration):
    ID_PREFIX = "resp"
    ANSWER_OBJECT = "response"
    EVENT_OBJECT = "response"

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer_service: TokenizerService,
        formatter: LogprobsFormatter,
        side_worker: SideWorker,
        request: ResponsesRequest,
    ) -> None:
        self.request = request
        try:
            super().__init__(engine, tokenizer_service, formatter, side_worker, request.to_chat())
        except ValueError as error:
            raise ValueError(rename_field(str(error))) from None
        self.items = OutputItems()
        self.num_events = 0

    async def answer(self, request: Request) -> Response:
        try:
            return await super().answer(request)
        except ValueError as error:
            raise ValueError(rename_field(str(error))) from None

    async def collect(self) -> list[bytes]:
        async for batch in self.generate():
            for index, delta in batch:
                self.advance(index, delta)
        answer = self.describe_response(self.find_status())
        return await self.side_worker.run(join_pieces(write_json(answer)))

    async def stream(self) -> AsyncIterator[bytes]:
        # Sent with the first token's events: until then the connection can tell whether a client
        # that has closed its sending half still listens.
        opening = await self.encode_response("response.created", "in_progress")
        opening += await self.encode_response("response.in_progress", "in_progress")
        try:
            async for batch in self.generate(self.engine.config.sse_keep_alive_interval):
                if not batch:
                    yield b": keep-alive\n\n"
                    continue
                events = [event for delta in batch for event in self.advance(*delta)]
                encoded = opening + await self.encode(events)
                if encoded:
                    yield encoded
                    opening = b""
        except FAILURES as error:
            code = "invalid_prompt" if isinstance(error, GrammarError) else "server_error"
            failure = {"code": code, "message": rename_field(str(error))}
            yield opening + await self.encode_response("response.failed", "failed", failure)
            return
        status = self.find_status()
        yield await self.encode_response(f"response.{status}", status)

    def advance(self, index: int, delta: OutputDelta) -> list[Event]:
        """Take in what one step added. Returns the events that this makes."""
        text, positions = self.read_delta(index, delta)
        logprobs: list[Any] = []
        if self.num_logprobs is not None:
            logprobs = self.format_logprobs(positions)["content"]
        events = list(self.items.add(self.parse(index, text), logprobs))
        if delta.finish_reason is not None:
            events += self.items.finish(self.find_status())
        return events

    def find_status(self) -> str:
        return "incomplete" if self.is_cut() else "completed"

    def is_cut(self) -> bool:
        return self.choices[0].finish_reason == FinishReason.LENGTH

    async def encode(self, events: list[Event]) -> bytes:
        """Number and encode events: those with whole texts outside the event loop."""
        work = []
        is_long = False
        for event in events:
            event["sequence_number"] = self.num_events
            self.num_events += 1
            work.append(write_typed_event(event))
            is_long = is_long or not event["type"].endswith((".delta", ".added"))
        pieces = join_pieces(chain.from_iterable(work))
        return b"".join(await self.side_worker.run(pieces) if is_long else pieces)

    async def encode_response(
        self, event_type: str, status: str, error: dict[str, str] | None = None
    ) -> bytes:
        """An event with the whole response."""
        response = self.describe_response(status, error)
        return await self.encode([{"type": event_type, "response": response}])

    def describe_response(self, status: str, error: dict[str, str] | None = None) -> dict[str, Any]:
        request = self.request
        params = self.samples[0]
        has_ended = status != "in_progress"
        return {
            "id": str(self.header["id"]).replace("-", "_"),
            "object": "response",
            "created_at": self.header["created"],
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if self.is_cut() else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "model": self.header["model"],
            "output": self.items.finished,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": request.describe_format()},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": self.describe_tokens() if has_ended else None,
            "user": request.user,
            "metadata": request.metadata or {},
        }

    def describe_tokens(self) -> dict[str, Any]:
        usage = self.describe_usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": self.num_cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


class OutputItems:
    """The items of an answer: messages and calls, one after the other. Every change is an event, in
    the order in which OpenAI sends them."""

    def __init__(self) -> None:
        self.finished: list[dict[str, Any]] = []
        self.open: dict[str, Any] | None = None  # the item that grows
        self.texts: list[str] = []  # of the open item: its text, or its arguments
        self.logprobs = JsonList()
        self.pending: list[Any] = []  # log-probabilities of tokens whose text has not come yet

    def add(self, pieces: Iterable[Piece], logprobs: list[Any]) -> Iterator[Event]:
        """`logprobs` are those of the tokens that came with these pieces."""
        self.pending += logprobs
        for piece in pieces:
            if isinstance(piece, CallPiece):
                self.pending = []
                yield from self.add_call_piece(piece)
            elif piece.text or self.pending:
                yield from self.add_text(piece.text)

    def add_text(self, text: str) -> Iterator[Event]:
        if self.open is None or self.open["type"] != "message":
            yield from self.close("completed")
            yield from self.open_message()
        logprobs = self.pending
        self.pending = []
        self.texts.append(text)
        self.logprobs.extend(logprobs)
        delta = {"delta": text, "logprobs": logprobs}
        yield {"type": "response.output_text.delta", **self.locate_text(), **delta}

    def add_call_piece(self, piece: CallPiece) -> Iterator[Event]:
        if piece.name is not None:
            yield from self.close("completed")
            item = {"id": make_id("fc"), "type": "function_call", "status": "in_progress"}
            item |= {"call_id": piece.id, "name": piece.name, "arguments": ""}
            yield self.open_item(item)
            return
        self.texts.append(piece.arguments)
        delta = {"delta": piece.arguments}
        yield {"type": "response.function_call_arguments.delta", **self.locate(), **delta}

    def finish(self, status: str) -> Iterator[Event]:
        """The answer has ended. It has at least one item, even without any text."""
        if self.open is None and not self.finished:
            yield from self.open_message()
        yield from self.close(status)

    def open_message(self) -> Iterator[Event]:
        item = {"id": make_id("msg"), "type": "message", "status": "in_progress"}
        yield self.open_item(item | {"role": "assistant", "content": []})
        part = make_part("", [])
        yield {"type": "response.content_part.added", **self.locate_text(), "part": part}

    def open_item(self, item: dict[str, Any]) -> Event:
        self.open = item
        self.texts = []
        self.logprobs = JsonList()
        index = len(self.finished)
        return {"type": "response.output_item.added", "output_index": index, "item": dict(item)}

    def close(self, status: str) -> Iterator[Event]:
        item = self.open
        if item is None:
            return
        text = "".join(self.texts)
        if item["type"] == "message":
            place = self.locate_text()
            part = make_part(text, self.logprobs)
            done = {"text": text, "logprobs": self.logprobs}
            yield {"type": "response.output_text.done", **place, **done}
            yield {"type": "response.content_part.done", **place, "part": part}
            item["content"] = [part]
        else:
            item["arguments"] = text
            done = {"name": item["name"], "arguments": text}
            yield {"type": "response.function_call_arguments.done", **self.locate(), **done}
        item["status"] = status
        index = len(self.finished)
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
        self.finished.append(item)
        self.open = None

    def locate(self) -> dict[str, Any]:
        """Where the open item is."""
        assert self.open is not None
        return {"item_id": self.open["id"], "output_index": len(self.finished)}

    def locate_text(self) -> dict[str, Any]:
        return {**self.locate(), "content_index": 0}


def write_typed_event(event: Event) -> Iterator[bytes]:
    yield f"event: {event['type']}\n".encode()
    yield from write_long_event(event)


def make_part(text: str, logprobs: list[Any] | JsonList) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def make_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
