"""POST /v1/completions and /v1/chat/completions: n samples of every prompt, answered whole or as a stream. A choice is
a dict, in an event or in the answer. `protocol.py` has the requests."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic_core import to_json
from starlette.requests import ClientDisconnect

from minidcp.engine.executor import EngineDeadError
from minidcp.request import OutputDelta, TokenLogprobs

from .async_engine import AsyncEngine, UnavailableError
from .protocol import ChatRequest, CompletionRequest, ErrorResponse, StreamOptions
from .tokenization import Tokenization


class Generation:
    """One POST: choice i * n + j is sample j of prompt i. This is a completion; `Chat` words it otherwise."""

    PREFIX, WHOLE, EVENT = "cmpl", "text_completion", "text_completion"

    def __init__(self, engine: AsyncEngine, spelling: Tokenization, body: CompletionRequest | ChatRequest) -> None:
        self.engine, self.spelling, self.body, self.samples = engine, spelling, body, body.samples()
        self.prompts: list[list[int]] = []
        self.echoed: list[str] = []  # the prompts' texts, if they begin the answers
        self.offsets: dict[int, int] = {}  # by choice, of the next token in the text
        self.completion_tokens = self.cached_tokens = 0
        self.head = {"id": f"{self.PREFIX}-{uuid.uuid4().hex}", "created": int(time.time()), "model": engine.model_name}

    async def answer(self, request: Request) -> Response:
        """Raises ValueError, naming the field that is wrong, before any answer begins."""
        body, prompts = self.body, self.body.prompts()
        self.engine.check_room(len(prompts) * len(self.samples))  # before any work, and before a stream's 200
        self.prompts = [await self.spelling.encode(prompt, body.add_special_tokens) for prompt in prompts]
        for tokens in self.prompts:
            self.engine.engine.validate(tokens, self.samples[0])
        if isinstance(body, CompletionRequest) and body.echo:
            skip = body.skip_special_tokens is not False
            self.echoed = [p if isinstance(p, str) else await self.spelling.detokenize(p, skip) for p in prompts]
        if body.stream:
            return StreamingResponse(self.stream(), media_type="text/event-stream")
        return JSONResponse(await unless_disconnected(request, self.collect()))

    async def collect(self) -> dict[str, Any]:
        deltas: list[list[OutputDelta]] = [[] for _ in range(len(self.prompts) * len(self.samples))]
        async for batch in self.run():
            for index, delta in batch:
                self.count(index, delta)
                deltas[index].append(delta)
        choices = [self.word_choice(index, each, whole=True) for index, each in enumerate(deltas)]
        return self.head | {"object": self.WHOLE, "choices": choices, "usage": self.usage()}

    async def stream(self) -> AsyncIterator[str]:
        """An event per token; clients measure latency by events, so those with empty text count too."""
        options = self.body.stream_options or StreamOptions()
        head = self.head | {"object": self.EVENT}
        try:
            async for batch in self.run(self.engine.config.sse_keep_alive_interval):
                events = [] if batch else [": keep-alive\n\n"]
                for index, delta in batch:
                    self.count(index, delta)
                    event = head | {"choices": [self.word_choice(index, [delta], whole=False)]}
                    if options.continuous_usage_stats:
                        event["usage"] = self.usage()
                    events.append(write_event(event))
                yield "".join(events)
            if options.include_usage:
                yield write_event(head | {"choices": [], "usage": self.usage()})
        except (EngineDeadError, UnavailableError, TimeoutError) as error:
            status = 504 if isinstance(error, TimeoutError) else 503
            yield write_event(ErrorResponse.of(status, str(error)).model_dump())
        yield "data: [DONE]\n\n"

    def run(self, keep_alive: float = 0) -> AsyncIterator[list[tuple[int, OutputDelta]]]:
        return self.engine.generate([(ids, params) for ids in self.prompts for params in self.samples], keep_alive)

    def count(self, index: int, delta: OutputDelta) -> None:
        self.completion_tokens += len(delta.token_ids)
        if delta.finish_reason is not None and index % len(self.samples) == 0:  # a prompt counts once
            self.cached_tokens += delta.cached_tokens

    def usage(self) -> dict[str, Any]:
        prompt, completion = sum(map(len, self.prompts)), self.completion_tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return counts | {"prompt_tokens_details": {"cached_tokens": self.cached_tokens}}

    def word_choice(self, index: int, deltas: list[OutputDelta], whole: bool) -> dict[str, Any]:
        """The choice that these deltas, all or the next ones of choice `index`, make."""
        text, entries = "".join(delta.text for delta in deltas), [delta.logprobs for delta in deltas]
        first = index not in self.offsets
        if first:
            self.offsets[index] = 0
            if self.echoed:
                text = self.echoed[index // len(self.samples)] + text
                entries = [*(deltas[0].prompt_logprobs or []), *entries]
        return {
            "index": index,
            **self.word_text(text, whole, first),
            "logprobs": None if self.samples[0].logprobs is None else self.word_logprobs(index, entries),
            "finish_reason": deltas[-1].finish_reason,
        }

    def word_text(self, text: str, whole: bool, first: bool) -> dict[str, Any]:
        return {"text": text}

    def word_logprobs(self, index: int, entries: list[TokenLogprobs | None]) -> dict[str, Any]:
        """An entry per token in every column. A prompt's first token has no log-probability."""
        rows, spell = [], self.spelling.spell
        for position, entry in enumerate(entries):
            top: dict[str, float] | None = None
            if entry is None:
                name = spell(self.prompts[index // len(self.samples)][position])
            else:
                name, top = spell(entry.token_id), {}
                for candidate, value in entry.top:  # two ids can share a text; the likelier one counts
                    top.setdefault(spell(candidate), value)
                top.setdefault(name, entry.logprob)
            rows.append((name, entry and entry.logprob, top, self.offsets[index]))
            self.offsets[index] += len(name)
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return dict(zip(names, zip(*rows, strict=True), strict=True))


class Chat(Generation):
    PREFIX, WHOLE, EVENT = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def word_text(self, text: str, whole: bool, first: bool) -> dict[str, Any]:
        # The role comes with the first token: an event of its own would look like one to who measures.
        message = {"role": "assistant", "content": text} if whole or first else {"content": text}
        return {"message" if whole else "delta": message}

    def word_logprobs(self, index: int, entries: list[TokenLogprobs | None]) -> dict[str, Any]:
        def word(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self.spelling.spell(token), "logprob": logprob, "bytes": self.spelling.spell_bytes(token)}

        known = [entry for entry in entries if entry is not None]
        return {"content": [word(e.token_id, e.logprob) | {"top_logprobs": [word(*t) for t in e.top]} for e in known]}


def write_event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {to_json(content).decode()}\n\n"


async def unless_disconnected(request: Request, answer: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """The answer, or ClientDisconnect (and the answer's cancellation) if the client leaves before."""

    async def cancel_when_left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        working.cancel()

    working, leaving = asyncio.ensure_future(answer), asyncio.create_task(cancel_when_left())
    try:
        return await working
    except asyncio.CancelledError:
        raise ClientDisconnect from None
    finally:
        leaving.cancel()
