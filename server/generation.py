"""POST /v1/completions, and what chats share with it: n samples of every prompt, answered whole or
as a stream of events. `chat.py` has chats, `protocol.py` the requests; `async_engine.py` generates,
`logprobs.py` formats log-probabilities, `responses.py` sends answers."""

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, ClassVar, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from minidcp.engine.executor import EngineDeadError
from minidcp.engine.grammar import CompiledGrammar
from minidcp.request import FinishReason, OutputDelta

from .async_engine import AsyncEngine, GrammarError, IndexedDelta, UnavailableError
from .errors import ErrorResponse
from .json_pieces import JsonList, join_pieces, write_json
from .logprobs import Columns, LogprobsFormatter, Position
from .protocol import CompletionRequest, GenerationRequest, StreamOptions
from .responses import (
    cancel_on_disconnect,
    format_event,
    prepend,
    respond_in_pieces,
    write_long_event,
)
from .side_work import SideWorker
from .tokenization import TokenizerService

T = TypeVar("T")

# As many log-probabilities are formatted in the event loop. That is cheaper than to involve another
# thread, and takes a fraction of a millisecond.
MAX_LOGPROBS_AT_ONCE = 100
MAX_CHECKS_AT_ONCE = 20_000  # of token ids, in the event loop: a millisecond
STATUS_OF_ERROR: dict[type[Exception], int] = {TimeoutError: 504, GrammarError: 400}  # else 503
TOKENS_PER_PIECE = 8  # with their alternatives; so that each piece of work is short


@dataclass
class Choice:
    """One choice as far as it is generated."""

    has_begun: bool = False
    num_characters: int = 0  # of its text that is sent or in `texts`
    text_end: int = 0  # where its text ends, with what is held back of it
    finish_reason: FinishReason | None = None
    # Only of an answer that is sent whole.
    texts: list[str] = field(default_factory=list)
    logprobs: dict[str, JsonList] = field(default_factory=dict)

    def add_text(self, text: str, num_held_back: int = 0) -> None:
        self.num_characters += len(text)
        self.text_end = self.num_characters + num_held_back


class Generation(ABC):
    """One POST that generates. Choice i * n + j is sample j of prompt i."""

    ID_PREFIX: ClassVar[str]
    ANSWER_OBJECT: ClassVar[str]
    EVENT_OBJECT: ClassVar[str]

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer_service: TokenizerService,
        formatter: LogprobsFormatter,
        side_worker: SideWorker,
        body: GenerationRequest,
    ) -> None:
        self.engine = engine
        self.tokenizer_service = tokenizer_service
        self.formatter = formatter
        self.side_worker = side_worker
        self.body = body
        self.samples = body.make_sampling_params(engine.sampling_defaults)  # of every prompt
        self.num_logprobs = self.samples[0].logprobs
        self.header = {
            "id": f"{self.ID_PREFIX}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": engine.model_name,
        }
        self.grammar: CompiledGrammar | None = None
        self.prompts: list[list[int]] = []  # token ids
        self.choices: list[Choice] = []
        self.num_completion_tokens = 0
        self.num_cached_tokens = 0

    async def answer(self, request: Request) -> Response:
        """Raises ValueError, naming the field that is wrong, before any answer begins."""
        await self.prepare()
        compiling = self.engine.compile_grammar(self.samples[0])
        self.grammar = await cancel_on_disconnect(request, compiling)
        self.choices = [Choice() for _ in range(len(self.prompts) * len(self.samples))]
        if not self.body.stream:
            return respond_in_pieces(await cancel_on_disconnect(request, self.collect()))

        # The answer begins with the first event: before that, the connection can tell whether a
        # client that sends nothing more still listens (`connection.py`).
        events = self.stream()
        first = await cancel_on_disconnect(request, anext(events))
        return StreamingResponse(prepend(first, events), media_type="text/event-stream")

    @abstractmethod
    async def prepare(self) -> None:
        """Encode and check the prompts. Raises ValueError, naming the field that is wrong, and
        UnavailableError if there is no room for the request."""

    def check_room(self, num_prompts: int) -> None:
        """Called before the work of encoding, and before a stream's status 200 is sent."""
        self.engine.check_room(num_prompts * len(self.samples))

    async def validate_prompts(self) -> None:
        params = self.samples[0]  # samples differ only in their seeds

        def validate_all() -> None:
            for tokens in self.prompts:
                self.engine.validate(tokens, params)

        num_ids = len(params.logit_bias) + len(params.stop_token_ids)
        num_checks = sum(len(tokens) + num_ids for tokens in self.prompts)
        if num_checks <= MAX_CHECKS_AT_ONCE:
            validate_all()
        else:
            await asyncio.to_thread(validate_all)

    def generate(self, keep_alive: float = 0) -> AsyncIterator[list[IndexedDelta]]:
        requests = [(tokens, params) for tokens in self.prompts for params in self.samples]
        if self.body.only_scores_prompt and self.num_logprobs is None:
            return end_at_once(len(requests))
        batches = self.engine.generate(requests, keep_alive, self.grammar)
        return drop_tokens(batches) if self.body.only_scores_prompt else batches

    async def collect(self) -> list[bytes]:
        """The whole answer, in pieces."""
        async for batch in self.generate():
            await self.run_work(self.take_in(batch), batch)
        answer = {
            **self.header,
            "object": self.ANSWER_OBJECT,
            "choices": [self.describe_whole_choice(index) for index in range(len(self.choices))],
            "usage": self.describe_usage(),
        }
        return await self.side_worker.run(join_pieces(write_json(answer)))

    def take_in(self, batch: list[IndexedDelta]) -> Iterator[bytes]:
        """Add deltas to their choices. Yields after every short piece of work."""
        for index, delta in batch:
            choice = self.choices[index]
            text, positions = self.read_delta(index, delta)
            choice.texts.append(text)
            if self.num_logprobs is not None:
                yield from self.encode_logprobs(choice.logprobs, positions)

    def describe_whole_choice(self, index: int) -> dict[str, Any]:
        choice = self.choices[index]
        text = "".join(choice.texts)
        logprobs = None if self.num_logprobs is None else choice.logprobs
        return {
            "index": index,
            **self.describe_text(index, text),
            "logprobs": logprobs,
            "finish_reason": self.describe_finish(index),
        }

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, one for each token. A token without text gets one too,
        because clients measure latency by events."""
        options = self.body.stream_options or StreamOptions()
        header = {**self.header, "object": self.EVENT_OBJECT}
        has_usage = bool(options.continuous_usage_stats)
        try:
            async for batch in self.generate(self.engine.config.sse_keep_alive_interval):
                if not batch:
                    yield b": keep-alive\n\n"
                    continue
                events = self.write_events(batch, header, has_usage)
                for piece in join_pieces(await self.run_work(events, batch)):
                    yield piece
            if options.include_usage:
                yield format_event({**header, "choices": [], "usage": self.describe_usage()})
        except (EngineDeadError, UnavailableError, TimeoutError, GrammarError) as error:
            status = STATUS_OF_ERROR.get(type(error), 503)
            yield format_event(ErrorResponse.make(status, str(error)).model_dump())
        yield b"data: [DONE]\n\n"

    def write_events(
        self, batch: list[IndexedDelta], header: dict[str, Any], has_usage: bool
    ) -> Iterator[bytes]:
        """The events of deltas. Yields after every short piece of work."""
        for index, delta in batch:
            is_first = not self.choices[index].has_begun
            is_long = bool(delta.prompt_logprobs)
            text, positions = self.read_delta(index, delta)
            logprobs: dict[str, Any] | None = None
            if is_long:
                logprobs = {}
                yield from self.encode_logprobs(logprobs, positions)
            elif self.num_logprobs is not None:
                logprobs = self.format_logprobs(positions)

            choice = {
                "index": index,
                **self.describe_new_text(index, text, is_first),
                "logprobs": logprobs,
                "finish_reason": self.describe_finish(index),
            }
            event = {**header, "choices": [choice]}
            if has_usage:
                event["usage"] = self.describe_usage()
            if is_long:
                yield from join_pieces(write_long_event(event))
            else:
                yield format_event(event)

    def read_delta(self, index: int, delta: OutputDelta) -> tuple[str, Iterable[Position]]:
        """The text and the tokens that a delta adds to its choice."""
        choice = self.choices[index]
        choice.has_begun = True
        text_start = choice.text_end
        choice.add_text(delta.text, delta.num_held_back)
        choice.finish_reason = delta.finish_reason
        self.count_tokens(index, delta)

        entry = delta.logprobs
        if entry is None:
            return delta.text, []
        offset = self.formatter.locate_last(entry.token_id, text_start, choice.text_end)
        return delta.text, [Position(entry.token_id, offset, entry)]

    def encode_logprobs(
        self, lists: dict[str, JsonList], positions: Iterable[Position]
    ) -> Iterator[bytes]:
        """Append to lists of log-probabilities. Yields after every short piece of work."""
        for piece in cut(positions, TOKENS_PER_PIECE):
            for name, items in self.format_logprobs(piece).items():
                lists.setdefault(name, JsonList()).extend(items)
            yield b""  # nothing can be sent yet

    async def run_work(self, work: Iterator[bytes], batch: list[IndexedDelta]) -> list[bytes]:
        """Do the work that these deltas make, outside the event loop if it is long."""
        num_logprobs = 0
        if self.num_logprobs is not None:
            num_logprobs = len(batch) * (1 + self.num_logprobs)
        has_prompt = any(delta.prompt_logprobs for _, delta in batch)
        if num_logprobs <= MAX_LOGPROBS_AT_ONCE and not has_prompt:
            return list(work)
        return await self.side_worker.run(work)

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

    def describe_finish(self, index: int) -> str | None:
        """Why a choice has ended; None if it goes on."""
        return self.choices[index].finish_reason

    @abstractmethod
    def describe_text(self, index: int, text: str) -> dict[str, Any]:
        """The members of a choice of a whole answer that have its text."""

    @abstractmethod
    def describe_new_text(self, index: int, text: str, is_first: bool) -> dict[str, Any]:
        """The members of an event's choice that have the text that is new."""

    @abstractmethod
    def format_logprobs(self, positions: Iterable[Position]) -> Columns:
        """Lists with an item for each token."""


class CompletionGeneration(Generation):
    ID_PREFIX = "cmpl"
    ANSWER_OBJECT = "text_completion"
    EVENT_OBJECT = "text_completion"

    body: CompletionRequest
    echoed_texts: list[str]  # the prompts' texts, if the answers begin with them

    async def prepare(self) -> None:
        prompts = self.body.list_prompts()
        self.check_room(len(prompts))
        add_special_tokens = self.body.add_special_tokens
        for prompt in prompts:
            tokens = await self.tokenizer_service.encode_prompt(prompt, add_special_tokens)
            self.prompts.append(tokens)
        await self.validate_prompts()
        self.echoed_texts = []
        if self.body.echo:
            for prompt in prompts:
                self.echoed_texts.append(await self.read_text(prompt))

    async def read_text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        skip_special_tokens = self.body.skip_special_tokens is not False
        return await self.tokenizer_service.detokenize(prompt, skip_special_tokens)

    def read_delta(self, index: int, delta: OutputDelta) -> tuple[str, Iterable[Position]]:
        choice = self.choices[index]
        if choice.has_begun or not self.echoed_texts:
            return super().read_delta(index, delta)

        prompt_index = index // len(self.samples)
        echoed = self.echoed_texts[prompt_index]
        choice.add_text(echoed)
        text, positions = super().read_delta(index, delta)
        prompt_positions = self.locate_prompt(prompt_index, delta)
        return echoed + text, chain(prompt_positions, positions)

    def locate_prompt(self, prompt_index: int, delta: OutputDelta) -> Iterator[Position]:
        """The tokens of an echoed prompt."""
        tokens = self.prompts[prompt_index]
        offsets = self.formatter.locate_tokens(tokens, self.echoed_texts[prompt_index])
        entries = delta.prompt_logprobs or []
        return map(Position, tokens, offsets, entries)

    def describe_text(self, index: int, text: str) -> dict[str, Any]:
        return {"text": text}

    def describe_new_text(self, index: int, text: str, is_first: bool) -> dict[str, Any]:
        return {"text": text}

    def format_logprobs(self, positions: Iterable[Position]) -> Columns:
        return self.formatter.format_completion(positions)


async def end_at_once(num_choices: int) -> AsyncIterator[list[IndexedDelta]]:
    """The deltas of choices for which the model computes nothing."""
    delta = OutputDelta("", "", (), FinishReason.LENGTH)
    yield [(index, delta) for index in range(num_choices)]


async def drop_tokens(
    batches: AsyncIterator[list[IndexedDelta]],
) -> AsyncIterator[list[IndexedDelta]]:
    """The deltas without what was generated, for answers that only score the prompt."""
    async for batch in batches:
        yield [(index, drop_token(delta)) for index, delta in batch]


def drop_token(delta: OutputDelta) -> OutputDelta:
    reason = delta.finish_reason and FinishReason.LENGTH
    return replace(delta, text="", token_ids=(), logprobs=None, finish_reason=reason)


def cut(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`. The last list is shorter, and may be empty."""
    iterator = iter(items)
    piece = list(islice(iterator, size))
    while len(piece) == size:
        yield piece
        piece = list(islice(iterator, size))
    yield piece
