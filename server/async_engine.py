"""Runs the LLMEngine in a thread and puts asyncio in front of it. Requests and aborts go in through
a queue; deltas come back through the queue of the caller who asked for them. The LLMEngine itself
(`minidcp/engine/engine.py`) knows nothing of asyncio, and nothing else in the server touches it."""

import asyncio
import contextlib
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from minidcp.config import ServeConfig, require
from minidcp.engine.engine import LLMEngine
from minidcp.engine.executor import EngineDeadError
from minidcp.engine.grammar import CompiledGrammar
from minidcp.engine.listener import StepListener
from minidcp.generation_config import SamplingDefaults
from minidcp.request import FinishReason, OutputDelta, SamplingParams

from .example_prompt import NEUTRAL_PROMPT
from .metrics import Metrics, describe_load

logger = logging.getLogger("minidcp")
MAX_COMPILING = 64  # grammars that wait, of all clients; each takes up to a second

IndexedDelta = tuple[int, OutputDelta]  # the index is the request's place in its `generate` call
Stream = asyncio.Queue[IndexedDelta | Exception]

IDLE_SECONDS = 0.5  # how often an idle engine checks that its ranks are alive


class GrammarError(ValueError):
    """A request's grammar could not be followed any further. Raised while an answer is made."""


class UnavailableError(RuntimeError):
    """Nothing can be generated now; a client may try again later."""


class AsyncEngine:
    """An LLMEngine as the event loop uses it. `make` is called in the engine's thread and builds an
    LLMEngine with the listener it gets. Call `start` from the event loop before anything else.

    Every method that needs the LLMEngine raises UnavailableError while the model loads, and
    EngineDeadError after the engine has ended. `failure` then holds the reason."""

    def __init__(
        self, make: Callable[[StepListener], LLMEngine], config: ServeConfig, model_name: str
    ) -> None:
        self.make = make
        self.config = config
        self.model_name = model_name  # in answers and metrics
        self.model_names = config.served_model_name or (model_name,)  # that requests may say
        self.example_prompt = NEUTRAL_PROMPT  # until the checkpoint is there
        self.metrics = Metrics(model_name)
        self.started_at = time.monotonic()

        self._engine: LLMEngine | None = None  # None while the model loads
        self.failure: Exception | None = None

        self.inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        # By request id, of those that wait or run. A request leaves it when it ends, even if its
        # client has not read the answer yet.
        self.streams: dict[str, tuple[int, Stream]] = {}
        self.request_numbers = itertools.count()
        self.stopping = False
        self.num_compiling = 0  # grammars
        self.last_progress = time.monotonic()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    # What the server asks about the engine.

    @property
    def has_loaded(self) -> bool:
        """Whether the model was ever ready; true even after the engine has ended."""
        return self._engine is not None

    @property
    def model_path(self) -> str:
        return self._require_engine().config.model

    @property
    def max_model_len(self) -> int:
        return self._require_engine().max_model_len

    @property
    def vocab_size(self) -> int:
        return self._require_engine().model_config.vocab_size

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        return self._require_engine().sampling_defaults

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The checkpoint's tokenizer, or None if it has none."""
        return self._require_engine().tokenizer

    def tokenize(
        self, text: str, add_special_tokens: bool = True, field: str = "prompt"
    ) -> list[int]:
        """Token ids of a text. Raises ValueError, naming `field`, if it cannot be tokenized."""
        return self._require_engine().tokenize(text, add_special_tokens, field)

    def validate(self, tokens: list[int], params: SamplingParams) -> None:
        """Raises ValueError, naming the field that is wrong, if the engine would refuse these."""
        self._require_engine().limits.check(tokens, params)

    async def compile_grammar(self, params: SamplingParams) -> CompiledGrammar | None:
        """The grammar of these parameters, if they have one. Hold it while their requests run, so
        that the engine finds it. Raises ValueError, naming the field, if it is wrong."""
        if params.structured_outputs is None:
            return None
        grammars = self._require_engine().grammars
        if self.num_compiling >= MAX_COMPILING:
            raise UnavailableError(f"{MAX_COMPILING} grammars are waiting to be compiled")
        self.num_compiling += 1
        try:
            return await asyncio.wrap_future(grammars.compile_later(params.structured_outputs))
        except asyncio.CancelledError:
            if self.stopping:
                raise UnavailableError("the server is shutting down") from None
            raise
        finally:
            self.num_compiling -= 1

    def check_room(self, num_requests: int) -> None:
        """Raises UnavailableError if these requests must not be queued now, and ValueError if there
        are so many that they never can be."""
        max_choices = self.config.max_choices_per_request
        require(
            num_requests <= max_choices,
            f"n: {num_requests} completions in one request, prompts times n; "
            f"at most {max_choices} may be (--max-choices-per-request)",
        )
        max_queued = self.config.max_num_queued_requests
        max_requests = self._require_engine().config.max_num_seqs + max_queued
        if num_requests > max_requests:
            raise ValueError(
                f"n: {num_requests} completions in one request; "
                f"at most {max_requests} can run and wait here"
            )
        if len(self.streams) + num_requests > max_requests:
            raise UnavailableError(
                f"{max_queued} requests are waiting already (--max-num-queued-requests)"
            )

    def check_health(self) -> None:
        """Raises UnavailableError or EngineDeadError if nothing can be generated, and says why."""
        engine = self._require_engine()
        idle_seconds = time.monotonic() - self.last_progress
        if engine.has_work and idle_seconds > engine.config.engine_timeout:
            raise UnavailableError(
                f"the engine is stuck: no step has ended for {idle_seconds:.0f} s"
            )

    def describe_load(self) -> dict[str, Any]:
        """The body of GET /load."""
        uptime_seconds = time.monotonic() - self.started_at
        load = describe_load(self._require_engine(), self.metrics, self.model_name, uptime_seconds)
        return load | {"example_prompt": self.example_prompt}

    def _require_engine(self) -> LLMEngine:
        if self.failure is not None:
            raise EngineDeadError(f"the engine has stopped: {self.failure}")
        if self._engine is None:
            raise UnavailableError("the model is loading")
        return self._engine

    # Generation, in the event loop.

    async def generate(
        self,
        requests: list[tuple[list[int], SamplingParams]],
        keep_alive: float = 0,
        grammar: CompiledGrammar | None = None,
    ) -> AsyncIterator[list[IndexedDelta]]:
        """Yields the deltas of these requests as they come, each with its request's index. With a
        `keep_alive` above 0, yields an empty list after that many seconds without a delta.

        A caller that stops iterating aborts all the requests in one step, on all ranks. Raises
        UnavailableError if too many requests are waiting or the server shuts down, EngineDeadError
        if a rank has ended, TimeoutError if it takes longer than --request-timeout, and
        GrammarError if the grammar of one of them fails."""
        self.check_room(len(requests))
        stream: Stream = asyncio.Queue()
        engine = self._require_engine()
        request_ids = self.submit(engine, requests, stream, grammar)
        timeout = self.start_timeout(engine, request_ids, stream)
        num_unfinished = len(requests)
        try:
            while num_unfinished > 0:
                deltas, error = await receive(stream, keep_alive)
                num_unfinished -= sum(delta.finish_reason is not None for _, delta in deltas)
                raise_grammar_error(deltas, len(requests))
                if deltas or error is None:
                    yield deltas
                if error is not None and num_unfinished > 0:
                    raise error
        finally:
            timeout.cancel()
            self.abort(engine, request_ids)

    def submit(
        self,
        engine: LLMEngine,
        requests: list[tuple[list[int], SamplingParams]],
        stream: Stream,
        grammar: CompiledGrammar | None,
    ) -> list[str]:
        """Hand requests to the engine's thread, as one group; returns their ids."""
        request_ids = [f"request-{next(self.request_numbers)}" for _ in requests]
        for index, (tokens, params) in enumerate(requests):
            request_id = request_ids[index]
            self.streams[request_id] = (index, stream)
            self.metrics.count_request(request_id, len(tokens))
            arguments = (request_id, tokens, params, request_ids[0])
            self.inbox.put(partial(self.add, engine, arguments, grammar))
        return request_ids

    def add(
        self,
        engine: LLMEngine,
        arguments: tuple[str, list[int], SamplingParams, str],
        grammar: CompiledGrammar | None,
    ) -> None:
        """In the engine's thread. `grammar` is held until here, so that the engine finds it."""
        try:
            engine.add_request(*arguments)
        except ValueError as error:  # of a grammar that has become unusable meanwhile
            delta = OutputDelta(arguments[0], "", (), FinishReason.ERROR, error=str(error))
            self.loop.call_soon_threadsafe(self.deliver, [delta])

    def abort(self, engine: LLMEngine, request_ids: list[str]) -> None:
        """Abandon those of these requests that have not finished."""
        unfinished = [request_id for request_id in request_ids if request_id in self.streams]
        if not unfinished:
            return
        for request_id in unfinished:
            del self.streams[request_id]
        self.metrics.count_aborted(unfinished)
        self.inbox.put(partial(engine.abort, *unfinished))

    def start_timeout(
        self, engine: LLMEngine, request_ids: list[str], stream: Stream
    ) -> asyncio.TimerHandle:
        """Abort requests after --request-timeout seconds, and put a TimeoutError on their stream; 0
        means never. Their client may be one that does not read, so nobody may wait for it."""
        seconds = self.config.request_timeout

        def end_requests() -> None:
            self.abort(engine, request_ids)
            stream.put_nowait(TimeoutError(f"the request took longer than {seconds} s"))

        return self.loop.call_later(seconds or math.inf, end_requests)

    def deliver(self, deltas: list[OutputDelta]) -> None:
        """Put a step's deltas on the streams of their requests."""
        for delta in deltas:
            if delta.request_id not in self.streams:
                continue  # its client has left
            index, stream = self.streams[delta.request_id]
            stream.put_nowait((index, delta))
            self.metrics.count_delta(delta)
            if delta.finish_reason is not None:
                del self.streams[delta.request_id]

    def interrupt(self, error: Exception) -> None:
        """End every stream with an error."""
        for _, stream in self.streams.values():
            stream.put_nowait(error)

    # The engine's thread, and its start and end.

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        # For `asyncio.to_thread`, which runs the tokenizer: no two threads may use it at once.
        self.loop.set_default_executor(ThreadPoolExecutor(1))
        self.thread.start()

    def run(self) -> None:
        """The body of the engine's thread: load the model, then take in calls and make steps."""
        try:
            engine = self.make(self.metrics)
            self.metrics.watch(engine)
            self._engine = engine
            while not self.stopping:
                self.run_calls(timeout=0 if engine.has_work else IDLE_SECONDS)
                self.advance(engine)
                self.last_progress = time.monotonic()
        except Exception as error:
            self.loop.call_soon_threadsafe(self.fail, error)
            is_user_error = isinstance(error, ValueError) and not self.has_loaded
            if not is_user_error and not isinstance(error, EngineDeadError):
                raise  # a defect of ours: let the thread print its traceback

    def run_calls(self, timeout: float) -> None:
        """Run the calls in the inbox; if it is empty, wait up to `timeout` seconds for one."""
        try:
            call = self.inbox.get(timeout=timeout)
            while True:
                call()
                call = self.inbox.get_nowait()
        except queue.Empty:
            return

    def advance(self, engine: LLMEngine) -> None:
        """Make one step and hand out its deltas; with nothing to do, check that the ranks live."""
        if not engine.has_work:
            engine.executor.check()
            return
        deltas = engine.step()
        if deltas:
            self.loop.call_soon_threadsafe(self.deliver, deltas)

    def fail(self, error: Exception) -> None:
        self.failure = error
        self.interrupt(EngineDeadError(f"the engine has stopped: {error}"))
        if self.has_loaded:
            logger.error("the engine has ended; stopping: %s", error)

    def interrupt_later(self, seconds: float, error: Exception) -> None:
        """Call `interrupt` after so many seconds. Safe to call from a signal handler."""
        self.loop.call_soon_threadsafe(self.loop.call_later, seconds, self.interrupt, error)

    def close(self) -> None:
        """End the thread and the engine. Safe to call twice."""
        self.stopping = True
        self.inbox.put(lambda: None)  # wakes the thread if it waits
        if self.thread.ident is not None:
            self.thread.join(10)
        if self._engine is not None:
            self._engine.close()


def raise_grammar_error(deltas: list[IndexedDelta], num_requests: int) -> None:
    """Raise the first error that ended one of the requests, if there is any.

    It ends the others too. OpenAI's API has no error of a single choice: no finish_reason says it,
    and its clients stop reading a stream at the first error.
    """
    for index, delta in deltas:
        if delta.error is not None:
            place = f" (choice {index})" if num_requests > 1 else ""
            raise GrammarError(f"{delta.error}{place}")


async def receive(stream: Stream, keep_alive: float) -> tuple[list[IndexedDelta], Exception | None]:
    """Wait for a stream's next item, then take all that are there. Returns the deltas and the first
    error. There is neither after `keep_alive` seconds of silence; 0 waits forever."""
    items: list[IndexedDelta | Exception] = []
    with contextlib.suppress(TimeoutError):
        items.append(await asyncio.wait_for(stream.get(), keep_alive or None))
    while not stream.empty():
        items.append(stream.get_nowait())

    deltas = [item for item in items if not isinstance(item, Exception)]
    errors = [item for item in items if isinstance(item, Exception)]
    return deltas, errors[0] if errors else None
