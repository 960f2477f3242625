"""Grammars of requests: compiled once, then followed token by token in threads beside the engine's.
What comes out for each step is a mask: the tokens that may be next. `grammar_text.py` has what
llguidance gets, `structured_outputs.py` what users ask for. Next: `engine.py`."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minidcp.config import require
from minidcp.engine.grammar_text import (
    LIMITS,
    NOTHING_FITS,
    SchemaError,
    check_schemas,
    locate,
    write_grammar,
)
from minidcp.request import Request
from minidcp.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:  # an optional package; transformers takes seconds to import
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("minidcp")

PACKAGE = "llguidance>=1.9,<2"
MAX_ERROR_LENGTH = 500  # llguidance quotes whole lines

MAX_MASK_SECONDS = 0.5  # of a core's time for one mask, mostly 20 µs; some cost is not in LIMITS
COMPILER_STACK = 512 << 20  # llguidance recurses into rules, of which a text may have 18,000
MAX_COMPILED = 32  # kept for the next request that has the same grammar
NUM_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """A grammar before its first token, and which tokens may be the first."""

    matcher: LLMatcher  # never changed: requests get copies
    mask: bytes


@dataclass(frozen=True, eq=False)
class Place:
    """Where a request is in its grammar. One thread at a time moves the matcher."""

    request: Request
    matcher: LLMatcher


@dataclass(frozen=True)
class Outcome:
    """What may follow a request's last token: the tokens of the mask, or nothing."""

    request: Request
    mask: bytes | None = None  # None: the grammar is at its end, or has failed
    error: str | None = None  # why it has failed


class Grammars:
    """The grammars of a model's requests.

    Masks are computed in threads. llguidance lets the interpreter run meanwhile, and a grammar that
    takes long delays only requests that have grammars. `compile_later` may be called by any thread,
    everything else only by the engine's.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, eos_ids: Iterable[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.num_bytes = -(-vocab_size // 8)  # of a mask
        self.eos_ids = list(eos_ids)

        self.lock = threading.Lock()  # held to read or change the four below
        self.compilers: ThreadPoolExecutor | None = None
        self.ll_tokenizer: LLTokenizer | None = None
        self.recent: OrderedDict[object, CompiledGrammar] = OrderedDict()
        # Every grammar that somebody holds, even if it is no longer recent. Hold one until its
        # request is opened: then the engine's thread need not wait for it.
        self.alive: weakref.WeakValueDictionary[object, CompiledGrammar] = (
            weakref.WeakValueDictionary()
        )

        self.places: dict[str, Place] = {}  # by request id
        self.num_pending = 0
        self.outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.maskers = ThreadPoolExecutor(NUM_THREADS, "grammar")

    # Compiling, in a thread of its own.

    def compile_later(self, params: StructuredOutputsParams) -> Future[CompiledGrammar]:
        """The result raises ValueError if the grammar is wrong or not supported. The message begins
        with `params.field`, or with the name of a schema within the grammar."""
        with self.lock:
            if self.compilers is None:
                self.compilers = start_compiler()
            return self.compilers.submit(self.compile, params)

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        key = make_key(params)
        with self.lock:
            compiled = self.alive.get(key)
        if compiled is None:
            try:
                compiled = self.compile_anew(params)
            except RecursionError:
                raise ValueError(f"{params.field}: is nested too deeply") from None
            except SchemaError as error:
                raise ValueError(clean_error(str(error))) from None
            except ValueError as error:
                raise ValueError(f"{params.field}: {clean_error(str(error))}") from None

        with self.lock:
            self.alive[key] = compiled
            self.recent[key] = compiled
            self.recent.move_to_end(key)
            if len(self.recent) > MAX_COMPILED:
                self.recent.popitem(last=False)
        return compiled

    def forget(self, params: StructuredOutputsParams) -> None:
        """Let the next request compile it anew. All copies of a matcher share a lexer, and the
        number of its states is limited."""
        key = make_key(params)
        with self.lock:
            self.alive.pop(key, None)
            self.recent.pop(key, None)

    def compile_anew(self, params: StructuredOutputsParams) -> CompiledGrammar:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise ValueError(
                f"needs the package llguidance, which is not installed: pip install '{PACKAGE}'"
            ) from None
        tokenizer = self.get_tokenizer()
        limits = LLParserLimits(**LIMITS)  # type: ignore[arg-type]
        matcher = LLMatcher(tokenizer, write_grammar(params), log_level=0, limits=limits)
        if matcher.is_error():
            check_schemas(params)
            where = ""
            if params.content[0] == "json":
                where = f"at {locate(params)}: "
            raise ValueError(where + matcher.get_error())

        # So a grammar that fails at its very beginning is refused, and no answer begins.
        start = time.thread_time()
        mask = matcher.compute_bitmask()
        check_progress(matcher, start)
        require(
            not is_empty(clear(mask, tokenizer.eos_tokens)),
            NOTHING_FITS,
        )
        return CompiledGrammar(matcher, mask)

    def get_tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance needs it. With a large vocabulary it takes a second."""
        with self.lock:
            if self.ll_tokenizer is None:
                require(self.tokenizer is not None, "the checkpoint has no tokenizer")
                from llguidance.hf import from_tokenizer

                # Embeddings are often padded to more rows than there are tokens. Ids that the
                # tokenizer does not have are in no mask.
                vocab_size = max(self.vocab_size, len(self.tokenizer))  # type: ignore[arg-type]
                self.ll_tokenizer = from_tokenizer(
                    self.tokenizer,  # type: ignore[arg-type]
                    n_vocab=vocab_size,
                    eos_token=self.eos_ids or None,
                )
            return self.ll_tokenizer

    # Following, in the engine's thread.

    def open(self, request: Request) -> None:
        """Begin to follow a new request's grammar, and give it its first mask."""
        params = request.params.structured_outputs
        assert params is not None
        with self.lock:
            compiled = self.alive.get(make_key(params))
        if compiled is None:
            compiled = self.compile_later(params).result()
        self.places[request.request_id] = Place(request, compiled.matcher.deep_copy())
        request.mask = self.choose_allowed(compiled.mask, request, num_outputs=0)

    def advance(self, request: Request, token: int) -> None:
        """Have a sampled token taken in; `collect` will tell what may follow it."""
        place = self.places[request.request_id]
        self.num_pending += 1
        self.maskers.submit(self.work, place, token, request.num_outputs)

    def collect(self, seconds: float) -> list[Outcome]:
        """What has become known since the last call. Waits up to `seconds` for what has not."""
        deadline = time.monotonic() + seconds
        outcomes = []
        with suppress(queue.Empty):
            while self.num_pending > 0:
                outcome = self.outcomes.get(timeout=max(0.0, deadline - time.monotonic()))
                self.num_pending -= 1
                place = self.places.get(outcome.request.request_id)
                if place is not None and place.request is outcome.request:  # else it has ended
                    outcomes.append(outcome)
        return outcomes

    def drop(self, request: Request) -> None:
        """Forget a request, whether it has a grammar or not."""
        self.places.pop(request.request_id, None)

    def close(self) -> None:
        """End the threads. They must not run when the interpreter ends."""
        if self.compilers is not None:
            self.compilers.shutdown(cancel_futures=True)
        self.maskers.shutdown(cancel_futures=True)

    # In a thread of `maskers`.

    def work(self, place: Place, token: int, num_outputs: int) -> None:
        request = place.request
        if self.places.get(request.request_id) is not place:  # it has ended
            self.outcomes.put(Outcome(request))
            return
        try:
            mask = self.find_next(place, token, num_outputs)
            self.outcomes.put(Outcome(request, mask))
        except BaseException as error:  # a panic of Rust code is no Exception
            assert request.params.structured_outputs is not None
            self.forget(request.params.structured_outputs)
            self.outcomes.put(Outcome(request, error=describe_failure(error, request)))

    def find_next(self, place: Place, token: int, num_outputs: int) -> bytes | None:
        """The tokens that may follow `token`, output number `num_outputs`; None if none may.

        Raises ValueError if the grammar cannot be followed any further.
        """
        matcher = place.matcher
        start = time.thread_time()
        matcher.consume_token(token)
        if not matcher.is_error() and matcher.is_stopped() and matcher.is_accepting():
            return None
        mask = matcher.compute_bitmask()
        check_progress(matcher, start)

        tokenizer = self.get_tokenizer()
        if is_empty(clear(mask, tokenizer.eos_tokens)):
            require(matcher.is_accepting(), "no token can continue the text so that it fits")
            return None
        return self.choose_allowed(mask, place.request, num_outputs)

    def choose_allowed(self, mask: bytes, request: Request, num_outputs: int) -> bytes:
        """The mask without the tokens at which the request must not end after `num_outputs` tokens.

        The grammar goes before min_tokens: a stop token stays if no other token fits.
        """
        eos_tokens = self.get_tokenizer().eos_tokens
        # The engine does not stop at these (ignore_eos), so they must not be sampled.
        unwanted_ends = [token for token in eos_tokens if token not in request.stop_ids]
        allowed = clear(mask, unwanted_ends)
        if not request.params.may_stop_after(num_outputs + 1):
            longer = clear(allowed, request.stop_ids)
            allowed = clear(mask, eos_tokens) if is_empty(longer) else longer
        return bytes(allowed[: self.num_bytes])


def start_compiler() -> ThreadPoolExecutor:
    """A thread whose stack is deep enough for any grammar. Only what is used of it takes memory."""
    previous = threading.stack_size(COMPILER_STACK)
    try:
        compilers = ThreadPoolExecutor(1, "grammar compiler")
        compilers.submit(int).result()  # its thread starts now, with this stack
    finally:
        threading.stack_size(previous)
    return compilers


def make_key(params: StructuredOutputsParams) -> object:
    """Equal for grammars that allow the same."""
    kind, text = params.content
    return (kind, text, params.disable_any_whitespace, params.whitespace_pattern)


def check_progress(matcher: LLMatcher, start: float) -> None:
    """Raises ValueError if the last work on the matcher failed, or has taken too long."""
    if matcher.is_error():
        message = clean_error(matcher.get_error())
        raise ValueError(NOTHING_FITS if message.startswith("NoExtension") else message)
    seconds = time.thread_time() - start
    require(
        seconds <= MAX_MASK_SECONDS,
        f"finding the tokens that may come next took {seconds:.1f} s, more than the "
        f"{MAX_MASK_SECONDS} s that are allowed; a simpler grammar is needed",
    )


def describe_failure(error: BaseException, request: Request) -> str:
    params = request.params.structured_outputs
    assert params is not None
    if not isinstance(error, ValueError):
        logger.error("a grammar has failed", exc_info=error)
    return f"{params.field}: the grammar failed after {request.num_outputs} tokens: {error}"


def clean_error(message: str) -> str:
    """llguidance's message without its dump of what it was doing, and not too long."""
    # The last of these advises to set an option that we do not take.
    for mark in ("<non-verbose/>", "<state>", "<grammar>", " Enable 'coerce_one_of'"):
        message = message.split(mark)[0]
    return message.strip()[:MAX_ERROR_LENGTH]


def clear(mask: bytes | bytearray, tokens: Iterable[int]) -> bytearray:
    """A copy of the mask without these tokens."""
    cleared = bytearray(mask)
    for token in tokens:
        cleared[token >> 3] &= ~(1 << (token & 7)) & 0xFF
    return cleared


def is_empty(mask: bytes | bytearray) -> bool:
    return mask.count(0) == len(mask)
