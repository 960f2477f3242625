"""What completions and chats share: n samples of every prompt, answered whole or as a stream.

`completions.py` and `chat.py` say what their choices look like.
"""

from __future__ import annotations

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from minidcp.engine.executor import EngineDeadError
from minidcp.request import OutputDelta, SamplingParams

from .async_engine import AsyncEngine
from .protocol import (
    Answer,
    BaseChoice,
    ErrorResponse,
    GenerationRequest,
    PromptTokensDetails,
    Usage,
)
from .tokenization import Tokenization

T = TypeVar("T")
PartT = TypeVar("PartT", bound=BaseChoice)  # a choice in an event of a stream
WholeT = TypeVar("WholeT", bound=BaseChoice)


@dataclass
class Job:
    """A request's prompts, the same samples for each: choice i * n + j is sample j of prompt i."""

    id: str
    prompts: list[list[int]]
    samples: list[SamplingParams]
    completion_tokens: int = 0
    cached_tokens: int = 0

    def count(self, index: int, delta: OutputDelta) -> None:
        self.completion_tokens += len(delta.token_ids)
        if delta.finish_reason is not None and index % len(self.samples) == 0:  # a prompt counts once
            self.cached_tokens += delta.cached_tokens

    @property
    def usage(self) -> Usage:
        prompt = sum(map(len, self.prompts))
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self.completion_tokens,
            total_tokens=prompt + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.cached_tokens),
        )


class Generation(ABC, Generic[PartT, WholeT]):
    """An endpoint that generates text."""

    id_prefix: str
    whole_type: type[Answer[WholeT]]
    event_type: type[Answer[PartT]]

    def __init__(self, engine: AsyncEngine, tokenization: Tokenization, model_name: str) -> None:
        self.engine, self.tokenization, self.model_name = engine, tokenization, model_name

    @abstractmethod
    def start(self, index: int) -> Callable[[OutputDelta], PartT]:
        """A function that words the deltas of one choice, in order."""

    @abstractmethod
    def merge(self, parts: list[PartT]) -> WholeT:
        """The whole choice."""

    async def generate(
        self,
        body: GenerationRequest,
        prompts: list[list[int]],
        samples: list[SamplingParams],
        request: Request,
    ) -> Response:
        for tokens in prompts:
            self.engine.engine.validate(tokens, samples[0])
        job = Job(f"{self.id_prefix}-{uuid.uuid4().hex}", prompts, samples)
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return StreamingResponse(self.stream(job, usage), media_type="text/event-stream")
        answer = await unless_disconnected(request, self.collect(job))
        return JSONResponse(answer.model_dump())

    async def collect(self, job: Job) -> Answer[WholeT]:
        parts: list[list[PartT]] = [[] for _ in range(len(job.prompts) * len(job.samples))]
        async for part in self.run(job):
            parts[part.index].append(part)
        choices = [self.merge(each) for each in parts]
        return self.whole_type(id=job.id, model=self.model_name, choices=choices, usage=job.usage)

    async def stream(self, job: Job, include_usage: bool) -> AsyncIterator[str]:
        """One event per token; clients measure latency by events, so those with empty text count too."""
        head = self.event_type(id=job.id, model=self.model_name, choices=[])
        try:
            async for part in self.run(job):
                yield event(head.model_copy(update={"choices": [part]}).model_dump_json(exclude={"usage"}))
            if include_usage:
                yield event(head.model_copy(update={"usage": job.usage}).model_dump_json())
        except EngineDeadError as error:
            yield event(ErrorResponse.of(503, f"the engine has stopped: {error}").model_dump_json())
        yield event("[DONE]")

    async def run(self, job: Job) -> AsyncIterator[PartT]:
        """The parts of all choices as they come."""
        merged: asyncio.Queue[tuple[int, OutputDelta | Exception | None]] = asyncio.Queue()

        async def pump(index: int, tokens: list[int], params: SamplingParams) -> None:
            try:
                async for delta in self.engine.generate(tokens, params):
                    merged.put_nowait((index, delta))
                merged.put_nowait((index, None))
            except Exception as error:
                merged.put_nowait((index, error))

        requests = [(tokens, params) for tokens in job.prompts for params in job.samples]
        words = [self.start(index) for index in range(len(requests))]
        pumps = [asyncio.create_task(pump(index, *each)) for index, each in enumerate(requests)]
        try:
            left = len(pumps)
            while left:
                index, item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    job.count(index, item)
                    yield words[index](item)
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


async def unless_disconnected(request: Request, answer: Awaitable[T]) -> T:
    """The answer, or ClientDisconnect (and the answer's cancellation) if the client leaves before."""

    async def wait_for_leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(answer), asyncio.create_task(wait_for_leaving())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def event(data: str) -> str:
    """One server-sent event."""
    return f"data: {data}\n\n"
