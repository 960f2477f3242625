"""The engine in a thread of its own, and asyncio in front of it. Requests and aborts go in through a queue, deltas come
back to the queue of whoever asked. The engine itself (`minidcp/engine/engine.py`) knows nothing of asyncio."""

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

from minidcp.config import ServeConfig
from minidcp.engine.engine import LLMEngine
from minidcp.engine.executor import EngineDeadError
from minidcp.request import OutputDelta, SamplingParams

from .metrics import Metrics

logger = logging.getLogger("minidcp")
Stream = asyncio.Queue[tuple[int, OutputDelta] | Exception]
IDLE_SECONDS = 0.5  # between two looks at the ranks' health when there is nothing to do


class UnavailableError(RuntimeError):
    """No request is taken, or none goes on, for a while."""


class AsyncEngine:
    """Call `start` from the event loop first. `make` loads the engine, in the thread; `failure` says why it ended."""

    def __init__(self, make: Callable[[], LLMEngine], config: ServeConfig, model_name: str) -> None:
        self.make, self.config, self.model_name = make, config, model_name
        self.loaded: LLMEngine | None = None
        self.failure: Exception | None = None
        self.metrics = Metrics(model_name)
        self.inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.streams: dict[str, tuple[int, Stream]] = {}
        self.ids = itertools.count()
        self.stopping = False
        self.last_progress = time.monotonic()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    @property
    def engine(self) -> LLMEngine:
        """Raises UnavailableError while it loads, and EngineDeadError when it has ended."""
        if self.failure is not None:
            raise EngineDeadError(f"the engine has stopped: {self.failure}")
        if self.loaded is None:
            raise UnavailableError("the model is loading")
        return self.loaded

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_default_executor(ThreadPoolExecutor(1))  # of `asyncio.to_thread`: tokenizers want one thread
        self.thread.start()

    def run(self) -> None:
        """The engine thread: take what came in, make a step, hand out what it gave."""
        try:
            engine = self.make()
            engine.observe = self.metrics.observe
            self.metrics.watch(engine)
            self.loaded = engine
            while not self.stopping:
                with contextlib.suppress(queue.Empty):  # until nothing is left; with no work, wait for it a moment
                    self.inbox.get(timeout=0 if engine.has_work else IDLE_SECONDS)()
                    while True:
                        self.inbox.get_nowait()()
                if engine.has_work:
                    if deltas := engine.step():
                        self.loop.call_soon_threadsafe(self.deliver, deltas)
                else:
                    engine.executor.check()
                self.last_progress = time.monotonic()
        except Exception as error:
            self.loop.call_soon_threadsafe(self.fail, error)
            user_error = isinstance(error, ValueError) and self.loaded is None
            if not user_error and not isinstance(error, EngineDeadError):
                raise  # a defect of ours: show where

    def deliver(self, deltas: list[OutputDelta]) -> None:
        for delta in deltas:
            if delta.request_id in self.streams:  # else its client has left
                index, stream = self.streams[delta.request_id]
                stream.put_nowait((index, delta))
                self.metrics.count_token(delta)

    def fail(self, error: Exception) -> None:
        self.failure = error
        self.interrupt(EngineDeadError(f"the engine has stopped: {error}"))
        if self.loaded is not None:
            logger.error("the engine has ended; stopping: %s", error)

    def interrupt(self, error: Exception) -> None:
        """End every stream with an error."""
        for _, stream in self.streams.values():
            stream.put_nowait(error)

    def check_health(self) -> None:
        """Raises UnavailableError or EngineDeadError, with the reason why nothing can be generated."""
        engine, idle = self.engine, time.monotonic() - self.last_progress
        if engine.has_work and idle > self.config.engine_timeout:
            raise UnavailableError(f"the engine is stuck: no step has ended for {idle:.0f} s")

    def check_room(self, count: int) -> None:
        """Raises UnavailableError if so many more requests may not wait, ValueError if they never may."""
        limit, most = self.config.max_num_queued_requests, self.engine.config.max_num_seqs
        if count > most + limit:
            raise ValueError(f"n: {count} completions in one request; at most {most + limit} can run and wait here")
        if len(self.streams) + count > most + limit:
            raise UnavailableError(f"{limit} requests are waiting already (--max-num-queued-requests)")

    async def generate(
        self, requests: list[tuple[list[int], SamplingParams]], keep_alive: float = 0
    ) -> AsyncIterator[list[tuple[int, OutputDelta]]]:
        """The deltas of some completions as they come, each with its request's index; an empty list after
        `keep_alive` seconds without any. Leaving early aborts all of them in one step, on all ranks. Raises
        UnavailableError if too many requests are waiting or the server shuts down, EngineDeadError if a rank has ended,
        and TimeoutError if it took longer than --request-timeout."""
        self.check_room(len(requests))
        engine = self.engine
        stream: Stream = asyncio.Queue()
        ids = [f"request-{next(self.ids)}" for _ in requests]
        for index, (request_id, (tokens, params)) in enumerate(zip(ids, requests, strict=True)):
            self.streams[request_id] = index, stream
            self.metrics.count_request(request_id, tokens)
            self.inbox.put(partial(engine.add_request, request_id, tokens, params))
        late = TimeoutError(f"the request took longer than {self.config.request_timeout} s")
        timer = self.loop.call_later(self.config.request_timeout or math.inf, stream.put_nowait, late)
        left = len(requests)
        try:
            while left:
                items = []
                with contextlib.suppress(TimeoutError):  # it is quiet
                    items.append(await asyncio.wait_for(stream.get(), keep_alive or None))
                while not stream.empty():
                    items.append(stream.get_nowait())
                error = next((item for item in items if isinstance(item, Exception)), None)
                deltas = [item for item in items if not isinstance(item, Exception)]
                left -= sum(delta.finish_reason is not None for _, delta in deltas)
                if deltas or error is None:
                    yield deltas
                if error is not None and left:
                    raise error
        finally:
            timer.cancel()
            for request_id in ids:
                del self.streams[request_id]
            if left:
                self.metrics.forget(ids)
                self.inbox.put(partial(engine.abort, *ids))

    def close(self) -> None:
        """Safe to call twice."""
        self.stopping = True
        self.inbox.put(lambda: None)
        if self.thread.ident is not None:
            self.thread.join(10)
        if self.loaded is not None:
            self.loaded.close()
