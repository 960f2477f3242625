"""Runs an LLMEngine in a thread of its own, for callers that wait: `LLM.generate`. Several may call
at once. The server has its own such thread (`server/async_engine.py`). Next: `llm.py`."""

import contextlib
import itertools
import queue
import threading
from dataclasses import dataclass, field

from minidcp.engine.engine import LLMEngine
from minidcp.engine.executor import CLOSED, STOP_SECONDS, EngineDeadError
from minidcp.request import CompletionOutput, OutputDelta, RequestOutput, SamplingParams


@dataclass(frozen=True)
class Prompt:
    """What to complete: token ids, or a text that is still to be tokenized."""

    content: str | list[int]
    text: str | None = None  # what its RequestOutput shows


@dataclass(eq=False)
class Call:
    """Prompts that a caller waits for, and what has become of them."""

    prompts: list[Prompt]
    params: list[SamplingParams]
    outputs: dict[str, RequestOutput] = field(default_factory=dict)  # in the order of the prompts
    num_finished: int = 0
    num_tokens: int = 0  # generated so far

    # Gets None when all outputs are finished, or the error that has ended the call. This is not a
    # threading.Event: an interrupt of its `wait` may leave its lock held, and `set` would hang.
    outcome: queue.SimpleQueue[BaseException | None] = field(default_factory=queue.SimpleQueue)
    is_abandoned: bool = False  # the caller has been interrupted and does not wait any more

    def add(self, delta: OutputDelta) -> None:
        """Add what one step brought to a request's output."""
        output = self.outputs[delta.request_id]
        output.cached_tokens = delta.cached_tokens
        if delta.prompt_logprobs:
            output.prompt_logprobs = delta.prompt_logprobs

        completion = output.outputs[0]
        completion.text += delta.text
        completion.token_ids += delta.token_ids
        if completion.logprobs is not None and delta.logprobs is not None:
            completion.logprobs.append(delta.logprobs)
        self.num_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            completion.finish_reason = delta.finish_reason.value
            completion.error = delta.error
            self.num_finished += 1


class EngineThread:
    """The thread that makes the steps of an engine, and the queue through which calls reach it.

    Python runs signal handlers in the main thread only. So Ctrl-C interrupts a caller that waits in
    the main thread, but never a step: every step is sent to all ranks and taken in. The requests of
    a caller that was interrupted are aborted between two steps.

    What callers use of this has no lock that an interrupt could leave held.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.timeout = engine.config.engine_timeout
        self.inbox: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self.calls: list[Call] = []  # those that are not finished
        self.call_of_request: dict[str, Call] = {}
        self.request_numbers = itertools.count()
        self.is_stopping = False
        self.has_ended = False
        self.thread = threading.Thread(target=self.run, name="LLM", daemon=True)

    # What callers call, from any thread.

    def start(self) -> None:
        self.thread.start()

    def submit(self, call: Call) -> None:
        """Have a call's prompts completed; `call.outcome` tells when that is done."""
        self.inbox.put(call)
        if self.has_ended:  # perhaps just now, and it has not seen the call
            self.refuse_calls()

    def stop(self) -> None:
        """End the thread, and the calls that it still has. Call it when the engine is closed."""
        self.is_stopping = True
        self.inbox.put(None)
        if self.thread.ident is not None:
            self.thread.join(STOP_SECONDS)

    # What happens in the thread.

    def run(self) -> None:
        try:
            while not self.is_stopping:
                self.take_calls()
                self.drop_abandoned_calls()
                self.advance()
        finally:
            self.has_ended = True
            for call in self.calls:
                call.outcome.put(self.explain_end())
            self.refuse_calls()

    def take_calls(self) -> None:
        """Queue the requests of new calls. With nothing else to do, wait for a call."""
        with contextlib.suppress(queue.Empty):
            while not self.is_stopping:
                is_idle = not self.calls
                call = self.inbox.get(block=is_idle)
                if call is not None:
                    self.add_requests(call)

    def add_requests(self, call: Call) -> None:
        self.calls.append(call)
        try:
            for prompt, params in zip(call.prompts, call.params, strict=True):
                if call.is_abandoned:  # to tokenize many prompts takes long
                    break
                self.add_request(call, prompt, params)
        except Exception as error:
            self.end_call(call, error)

    def add_request(self, call: Call, prompt: Prompt, params: SamplingParams) -> None:
        request_id = f"llm-{next(self.request_numbers)}"
        request = self.engine.add_request(request_id, prompt.content, params)
        self.call_of_request[request_id] = call
        call.outputs[request_id] = RequestOutput(
            request_id,
            prompt=prompt.text,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[CompletionOutput(logprobs=None if params.logprobs is None else [])],
        )

    def drop_abandoned_calls(self) -> None:
        for call in list(self.calls):
            if call.is_abandoned:
                self.end_call(call, None)

    def advance(self) -> None:
        """Make a step, and end the calls whose requests are all finished by it."""
        try:
            if self.engine.has_work:
                for delta in self.engine.step(self.timeout):
                    self.call_of_request[delta.request_id].add(delta)
            # When the last request ends, the step after it is in flight already.
            while self.engine.has_work and not self.engine.requests:
                self.engine.step(self.timeout)
        except BaseException as error:  # whatever it is, callers must hear of it and not wait
            for call in list(self.calls):
                self.end_call(call, error)

        for call in list(self.calls):
            if call.num_finished == len(call.prompts):
                self.end_call(call, None)

    def end_call(self, call: Call, error: BaseException | None) -> None:
        """Tell a caller that nothing more will come, and forget its requests."""
        self.calls.remove(call)
        self.engine.abort(*call.outputs)  # those that an error has left unfinished
        for request_id in call.outputs:
            del self.call_of_request[request_id]
        call.outcome.put(error)

    def refuse_calls(self) -> None:
        """End the calls in the inbox, which nobody will take any more."""
        with contextlib.suppress(queue.Empty):
            while True:
                call = self.inbox.get_nowait()
                if call is not None:
                    call.outcome.put(self.explain_end())

    def explain_end(self) -> EngineDeadError:
        return EngineDeadError(self.engine.executor.failure or CLOSED)
