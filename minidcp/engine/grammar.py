"""Grammars of requests: compiled once, then followed token by token in threads beside the engine's.
What comes out for each step is a mask: the tokens that may be next. Only here is llguidance
imported. `structured_outputs.py` has what users ask for. Next: `engine.py`."""

from __future__ import annotations

import json
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
from typing import TYPE_CHECKING, Any

from minidcp.config import require
from minidcp.engine.schema_faults import find_fault, find_uncountable
from minidcp.request import Request
from minidcp.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:  # an optional package; transformers takes seconds to import
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("minidcp")

PACKAGE = "llguidance>=1.9,<2"
# Between the parts of JSON, if the request says nothing else. Every usual writer's JSON fits: one
# space, or a line end and an indentation. With more freedom, models sometimes write nothing else.
WHITESPACE = r"[\x20\x09]|\x0D?\x0A[\x20\x09]{0,32}"
NOTHING_FITS = "nothing fits it, or only an empty text"
MAX_ERROR_LENGTH = 500  # llguidance quotes whole lines

# llguidance's own bounds, about half of its defaults. Each is counted in steps of its algorithm. On
# the core where they were chosen, compiling took up to 0.6 s with them, mostly 1 ms.
LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}
MAX_MASK_SECONDS = 0.5  # of a core's time for one mask, mostly 20 µs; some cost is not in LIMITS
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
    takes long delays only requests that have grammars. `compile` and `compile_later` may be called
    by any thread, everything else only by the engine's.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, eos_ids: Iterable[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.num_bytes = -(-vocab_size // 8)  # of a mask
        self.eos_ids = list(eos_ids)

        self.lock = threading.Lock()  # of the three below
        self.ll_tokenizer: LLTokenizer | None = None
        self.recent: OrderedDict[object, CompiledGrammar] = OrderedDict()
        # All that somebody still holds. Who compiles a grammar, and holds it until its request is
        # opened, can be sure that it is not compiled again in the engine's thread.
        self.alive: weakref.WeakValueDictionary[object, CompiledGrammar] = (
            weakref.WeakValueDictionary()
        )

        self.places: dict[str, Place] = {}  # by request id
        self.num_pending = 0
        self.outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.compilers = ThreadPoolExecutor(1, "grammar compiler")
        self.maskers = ThreadPoolExecutor(NUM_THREADS, "grammar")

    # Compiling, in any thread.

    def compile_later(self, params: StructuredOutputsParams) -> Future[CompiledGrammar]:
        return self.compilers.submit(self.compile, params)

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """Raises ValueError, beginning with `params.field`, if it is wrong or not supported."""
        kind, text = params.content
        key = (kind, text, params.disable_any_whitespace, params.whitespace_pattern)
        with self.lock:
            compiled = self.alive.get(key)
        if compiled is None:
            try:
                compiled = self.compile_anew(params)
            except ValueError as error:
                raise ValueError(f"{params.field}: {clean_error(str(error))}") from None

        with self.lock:
            self.alive[key] = compiled
            self.recent[key] = compiled
            self.recent.move_to_end(key)
            if len(self.recent) > MAX_COMPILED:
                self.recent.popitem(last=False)
        return compiled

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
        compiled = self.compile(params)
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
        self.compilers.shutdown(cancel_futures=True)
        self.maskers.shutdown(cancel_futures=True)

    # In a thread of `maskers`.

    def work(self, place: Place, token: int, num_outputs: int) -> None:
        request = place.request
        try:
            mask = self.find_next(place, token, num_outputs)
            self.outcomes.put(Outcome(request, mask))
        except BaseException as error:  # a panic of Rust code is no Exception
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
        # At the others the engine does not stop: with ignore_eos, the text goes on while it can.
        ignored = [token for token in eos_tokens if token not in request.stop_ids]
        allowed = clear(mask, ignored)
        if not request.params.may_stop_after(num_outputs + 1):
            longer = clear(allowed, request.stop_ids)
            allowed = clear(mask, eos_tokens) if is_empty(longer) else longer
        return bytes(allowed[: self.num_bytes])


def write_grammar(params: StructuredOutputsParams) -> str:
    """The grammar as llguidance takes it. Raises ValueError if it cannot be read at all."""
    from llguidance import LLMatcher, grammar_from

    kind, text = params.content
    if kind == "json":
        return write_json_grammar(read_json(text), params)
    if kind == "choice":
        # One terminal of all texts. As rules, each would cost as much as the whole terminal.
        choices = [json.dumps(choice, ensure_ascii=False) for choice in json.loads(text)]
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(choices))
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    return grammar_from("grammar", text)


def write_json_grammar(schema: Any, params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    if isinstance(schema, bool):
        require(schema, NOTHING_FITS)
        schema = {}
    require(isinstance(schema, dict), "a JSON Schema is an object")
    uncountable = find_uncountable(schema)
    require(
        uncountable is None,
        f"at {uncountable}: is more than one above the number of required properties, which cannot "
        "be enforced",
    )
    # These go before what the schema has as "x-guidance", which would let it switch checks off.
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema),
        overrides={
            "whitespace_flexible": not params.disable_any_whitespace,
            "whitespace_pattern": choose_whitespace(params),
            "item_separator": ",",
            "key_separator": ":",
            "lenient": False,
            "coerce_one_of": False,
        },
    )


def choose_whitespace(params: StructuredOutputsParams) -> str | None:
    if params.disable_any_whitespace:
        return None
    return params.whitespace_pattern or WHITESPACE


def read_json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("the JSON Schema is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the JSON Schema is not valid JSON: {error}") from None


def refuse_constant(name: str) -> None:
    """Called for NaN, Infinity and -Infinity, which Python's JSON has and JSON has not."""
    raise ValueError(f"{name} is no number")


def locate(params: StructuredOutputsParams) -> str:
    """A pointer to the part of the schema that is wrong."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(**LIMITS)  # type: ignore[arg-type]

    def explain(schema: Any) -> str:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        return LLMatcher.validate_grammar(grammar, limits=limits)

    return find_fault(read_json(params.content[1]), explain)


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
