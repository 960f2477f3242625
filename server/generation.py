"""POST /v1/completions and /v1/chat/completions: n samples of every prompt, answered whole or as a
stream of events. A choice is a dict, in an event or in the whole answer. `protocol.py` has the
requests, `async_engine.py` generates."""

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from typing import Any, ClassVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic_core import to_json
from starlette.requests import ClientDisconnect

from minidcp.engine.executor import EngineDeadError
from minidcp.request import FinishReason, OutputDelta, TokenLogprobs

from .async_engine import AsyncEngine, IndexedDelta, UnavailableError
from .errors import ErrorResponse
from .protocol import ChatRequest, CompletionRequest, GenerationRequest, StreamOptions
from .tokenization import TokenizerService


class Generation(ABC):
    """One POST that generates. Choice i * n + j is sample j of prompt i."""

    ID_PREFIX: ClassVar[str]
    ANSWER_OBJECT: ClassVar[str]
    EVENT_OBJECT: ClassVar[str]

    def __init__(
        self, engine: AsyncEngine, tokenizer_service: TokenizerService, body: GenerationRequest
    ) -> None:
        self.engine = engine
        self.tokenizer_service = tokenizer_service
        self.body = body
        self.samples = body.make_sampling_params()  # of every prompt
        self.header = {
            "id": f"{self.ID_PREFIX}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": engine.model_name,
        }
        self.prompts: list[list[int]] = []  # token ids
        self.num_completion_tokens = 0
        self.num_cached_tokens = 0

    async def answer(self, request: Request) -> Response:
        """Raises ValueError, naming the field that is wrong, before any answer begins."""
        await self.prepare()
        if self.body.stream:
            return StreamingResponse(self.stream(), media_type="text/event-stream")
        return JSONResponse(await cancel_on_disconnect(request, self.collect()))

    @abstractmethod
    async def prepare(self) -> None:
        """Encode and check the prompts. Raises ValueError, naming the field that is wrong, and
        UnavailableError if there is no room for the request."""

    def check_room(self, num_prompts: int) -> None:
        """Called before the work of encoding, and before a stream's status 200 is sent."""
        self.engine.check_room(num_prompts * len(self.samples))

    def validate_prompts(self) -> None:
        for tokens in self.prompts:
            self.engine.validate(tokens, self.samples[0])  # samples differ only in their seeds

    def generate(self, keep_alive: float = 0) -> AsyncIterator[list[IndexedDelta]]:
        requests = [(tokens, params) for tokens in self.prompts for params in self.samples]
        batches = self.engine.generate(requests, keep_alive)
        return drop_tokens(batches) if self.body.only_scores_prompt else batches

    async def collect(self) -> dict[str, Any]:
        """The whole answer."""
        num_choices = len(self.prompts) * len(self.samples)
        deltas_by_choice: list[list[OutputDelta]] = [[] for _ in range(num_choices)]
        async for batch in self.generate():
            for index, delta in batch:
                self.count_tokens(index, delta)
                deltas_by_choice[index].append(delta)
        return {
            **self.header,
            "object": self.ANSWER_OBJECT,
            "choices": [
                self.format_choice(index, deltas, is_event=False)
                for index, deltas in enumerate(deltas_by_choice)
            ],
            "usage": self.describe_usage(),
        }

    async def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events, one for each token. A token without text gets one too,
        because clients measure latency by events."""
        options = self.body.stream_options or StreamOptions()
        header = {**self.header, "object": self.EVENT_OBJECT}
        try:
            async for batch in self.generate(self.engine.config.sse_keep_alive_interval):
                if not batch:
                    yield ": keep-alive\n\n"
                    continue
                events = []
                for index, delta in batch:
                    self.count_tokens(index, delta)
                    choice = self.format_choice(index, [delta], is_event=True)
                    event = {**header, "choices": [choice]}
                    if options.continuous_usage_stats:
                        event["usage"] = self.describe_usage()
                    events.append(format_event(event))
                yield "".join(events)
            if options.include_usage:
                yield format_event({**header, "choices": [], "usage": self.describe_usage()})
        except (EngineDeadError, UnavailableError, TimeoutError) as error:
            status = 504 if isinstance(error, TimeoutError) else 503
            yield format_event(ErrorResponse.make(status, str(error)).model_dump())
        yield "data: [DONE]\n\n"

    def count_tokens(self, index: int, delta: OutputDelta) -> None:
        self.num_completion_tokens += len(delta.token_ids)
        is_first_sample = index % len(self.samples) == 0  # a prompt counts once
        if delta.finish_reason is not None and is_first_sample:
            self.num_cached_tokens += delta.cached_tokens

    def describe_usage(self) -> dict[str, Any]:
        num_prompt_tokens = sum(len(tokens) for tokens in self.prompts)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }

    @abstractmethod
    def format_choice(
        self, index: int, deltas: list[OutputDelta], is_event: bool
    ) -> dict[str, Any]:
        """The choice with this index: all its deltas or, in an event, only its next ones."""


class CompletionGeneration(Generation):
    ID_PREFIX = "cmpl"
    ANSWER_OBJECT = "text_completion"
    EVENT_OBJECT = "text_completion"

    body: CompletionRequest

    def __init__(
        self, engine: AsyncEngine, tokenizer_service: TokenizerService, body: CompletionRequest
    ) -> None:
        super().__init__(engine, tokenizer_service, body)
        self.echoed_texts: list[str] = []  # the prompts' texts, if the answers begin with them
        self.text_offsets: dict[int, int] = {}  # by choice: where the next token's text begins

    async def prepare(self) -> None:
        prompts = self.body.list_prompts()
        self.check_room(len(prompts))
        add_special_tokens = self.body.add_special_tokens
        for prompt in prompts:
            tokens = await self.tokenizer_service.encode_prompt(prompt, add_special_tokens)
            self.prompts.append(tokens)
        self.validate_prompts()
        if self.body.echo:
            for prompt in prompts:
                self.echoed_texts.append(await self.read_text(prompt))

    async def read_text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        skip_special_tokens = self.body.skip_special_tokens is not False
        return await self.tokenizer_service.detokenize(prompt, skip_special_tokens)

    def format_choice(
        self, index: int, deltas: list[OutputDelta], is_event: bool
    ) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        entries = [delta.logprobs for delta in deltas if delta.token_ids]
        if index not in self.text_offsets:  # the choice begins
            self.text_offsets[index] = 0
            if self.echoed_texts:
                text = self.echoed_texts[index // len(self.samples)] + text
                entries = [*(deltas[0].prompt_logprobs or []), *entries]

        logprobs = None
        if self.samples[0].logprobs is not None:
            logprobs = self.format_logprobs(index, entries)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": deltas[-1].finish_reason,
        }

    def format_logprobs(self, index: int, entries: list[TokenLogprobs | None]) -> dict[str, Any]:
        """Four lists with an item for each token. An entry is None for an echoed prompt's first
        token, which has no log-probability."""
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        text_offsets: list[int] = []
        for position, entry in enumerate(entries):
            if entry is None:
                prompt = self.prompts[index // len(self.samples)]
                token = self.tokenizer_service.token_text(prompt[position])
                token_logprobs.append(None)
                top_logprobs.append(None)
            else:
                token = self.tokenizer_service.token_text(entry.token_id)
                token_logprobs.append(entry.logprob)
                top_logprobs.append(self.format_top(token, entry))
            tokens.append(token)
            text_offsets.append(self.text_offsets[index])
            self.text_offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offsets,
        }

    def format_top(self, token: str, entry: TokenLogprobs) -> dict[str, float]:
        """Log-probabilities of the likeliest tokens and the sampled one, by text. Where two tokens
        have the same text, the likelier one counts."""
        top: dict[str, float] = {}
        for candidate, logprob in entry.top:
            top.setdefault(self.tokenizer_service.token_text(candidate), logprob)
        top.setdefault(token, entry.logprob)
        return top


class ChatGeneration(Generation):
    ID_PREFIX = "chatcmpl"
    ANSWER_OBJECT = "chat.completion"
    EVENT_OBJECT = "chat.completion.chunk"

    body: ChatRequest

    def __init__(
        self, engine: AsyncEngine, tokenizer_service: TokenizerService, body: ChatRequest
    ) -> None:
        super().__init__(engine, tokenizer_service, body)
        self.begun_choices: set[int] = set()

    async def prepare(self) -> None:
        self.check_room(1)
        self.prompts = [await self.tokenizer_service.encode_messages(self.body)]
        self.validate_prompts()

    def format_choice(
        self, index: int, deltas: list[OutputDelta], is_event: bool
    ) -> dict[str, Any]:
        message: dict[str, Any] = {}
        if index not in self.begun_choices:
            # The role comes with the first token. Clients that measure the time to the first token
            # would take a separate event with the role for that token.
            self.begun_choices.add(index)
            message["role"] = "assistant"
        message["content"] = "".join(delta.text for delta in deltas)

        logprobs = None
        if self.samples[0].logprobs is not None:
            logprobs = self.format_logprobs([delta.logprobs for delta in deltas])
        return {
            "index": index,
            "delta" if is_event else "message": message,
            "logprobs": logprobs,
            "finish_reason": deltas[-1].finish_reason,
        }

    def format_logprobs(self, entries: list[TokenLogprobs | None]) -> dict[str, Any]:
        content = []
        for entry in entries:
            if entry is None:
                continue
            item = self.format_token(entry.token_id, entry.logprob)
            item["top_logprobs"] = [self.format_token(token, value) for token, value in entry.top]
            content.append(item)
        return {"content": content}

    def format_token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.tokenizer_service.token_text(token),
            "logprob": logprob,
            "bytes": self.tokenizer_service.token_bytes(token),
        }


async def drop_tokens(
    batches: AsyncIterator[list[IndexedDelta]],
) -> AsyncIterator[list[IndexedDelta]]:
    """The deltas without what was generated, for answers that only score the prompt."""
    async for batch in batches:
        yield [(index, drop_token(delta)) for index, delta in batch]


def drop_token(delta: OutputDelta) -> OutputDelta:
    reason = delta.finish_reason and FinishReason.LENGTH
    return replace(delta, text="", token_ids=(), logprobs=None, finish_reason=reason)


# Python's line readers, among others, end a line at these. JSON escapes the others like them.
LINE_ENDS = {"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def format_event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    data = to_json(content).decode()
    for line_end, escape in LINE_ENDS.items():
        data = data.replace(line_end, escape)
    return f"data: {data}\n\n"


async def cancel_on_disconnect(
    request: Request, answer: Awaitable[dict[str, Any]]
) -> dict[str, Any]:
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
