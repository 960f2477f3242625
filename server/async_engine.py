"""The engine in a thread of its own, and asyncio in front of it.

Requests and aborts go in through a queue, deltas come back to each request's own asyncio queue. The
engine itself (`minidcp/engine/engine.py`) knows nothing of asyncio.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from minidcp.engine.engine import LLMEngine
from minidcp.engine.executor import EngineDeadError
from minidcp.request import OutputDelta, SamplingParams

IDLE_SECONDS = 0.5  # between two looks at the ranks' health when there is nothing to do


class AsyncEngine:
    """Call `start` from the event loop before anything else; `on_death` runs in it if a rank ends."""

    def __init__(self, engine: LLMEngine, on_death: Callable[[], None]) -> None:
        self.engine, self.on_death = engine, on_death
        self.inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.streams: dict[str, asyncio.Queue[OutputDelta | EngineDeadError]] = {}
        self.tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self.ids = itertools.count()
        self.death: EngineDeadError | None = None
        self.stopping = False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def run(self) -> None:
        """The engine thread: take what came in, make a step, hand out what it gave."""
        try:
            while not self.stopping:
                self.take_commands()
                if self.engine.has_work:
                    deltas = self.engine.step()
                    if deltas:
                        self.loop.call_soon_threadsafe(self.deliver, deltas)
                else:
                    self.engine.check_health()
        except Exception as error:
            death = error if isinstance(error, EngineDeadError) else EngineDeadError(repr(error))
            self.loop.call_soon_threadsafe(self.die, death)
            if death is not error:
                raise  # a defect of ours: show where

    def take_commands(self) -> None:
        """Run what is in the inbox; wait for it a moment if there is nothing else to do."""
        try:
            self.inbox.get(timeout=0 if self.engine.has_work else IDLE_SECONDS)()
            while True:
                self.inbox.get_nowait()()
        except queue.Empty:
            pass

    def deliver(self, deltas: list[OutputDelta]) -> None:
        for delta in deltas:
            stream = self.streams.get(delta.request_id)
            if stream is not None:  # else its client has left
                stream.put_nowait(delta)

    def die(self, death: EngineDeadError) -> None:
        self.death = death
        for stream in self.streams.values():
            stream.put_nowait(death)
        self.on_death()

    async def tokenize(self, prompt: str | list[int]) -> list[int]:
        """Token ids, computed off the event loop."""
        if isinstance(prompt, list):
            return prompt
        return await asyncio.wrap_future(self.tokenizing.submit(self.engine.tokenize, prompt))

    async def generate(self, tokens: list[int], params: SamplingParams) -> AsyncIterator[OutputDelta]:
        """The deltas of one completion. Leaving early aborts it and frees its blocks.

        Raises:
            EngineDeadError: a rank has ended.
        """
        if self.death is not None:
            raise self.death
        request_id = f"request-{next(self.ids)}"
        stream = self.streams[request_id] = asyncio.Queue()
        self.inbox.put(lambda: self.engine.add_request(request_id, tokens, params))
        finished = False
        try:
            while not finished:
                item = await stream.get()
                if isinstance(item, EngineDeadError):
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            del self.streams[request_id]
            if not finished:
                self.inbox.put(lambda: self.engine.abort(request_id))

    def close(self) -> None:
        self.stopping = True
        self.inbox.put(lambda: None)
        self.thread.join(10)
        self.engine.close()
        self.tokenizing.shutdown()
