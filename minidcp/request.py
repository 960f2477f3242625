"""A request: what the user asks for, what the scheduler keeps track of, and what comes back. Plain
Python, without torch. Next: `resolve.py`."""

import copy
import math
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, NamedTuple, Self

from minidcp.config import require, shorten
from minidcp.structured_outputs import StructuredOutputsParams

MAX_SEED = 2**63 - 1
MAX_SALT_LENGTH = 1024
SMALLEST_POSITIVE = math.ulp(0.0)  # the smallest float above 0


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence token, a stop token, a stop string, or a grammar's end
    LENGTH = "length"  # max_tokens or max_model_len
    ABORT = "abort"  # the client left or the engine stopped
    ERROR = "error"  # its grammar could not be followed any further


def number(default: float | None, minimum: float, maximum: float, allowed: str) -> Any:
    """A numeric field of SamplingParams. `allowed` says in error messages what its range is."""
    return field(default=default, metadata={"range": (minimum, maximum), "allowed": allowed})


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a completion ends.

    A `seed` fixes the random numbers: they depend on it, on the position and on the token id, never
    on what runs beside the request. So the tokens are the same where the logits are. In float32
    other requests, cached prefixes, chunks and preemption change logits in their last digits only,
    and tokens practically never. In bfloat16 they change more, and a token may differ now and then,
    and with it all that follow (docs/operations.md, "Repeatable outputs").
    Log-probabilities are the model's own: before temperature, penalties and biases. With
    structured_outputs they are those among the tokens that may follow, as in vLLM.
    Raises ValueError, which names the field and its value, if a value is out of range.
    """

    # None: up to the model's context length
    max_tokens: int | None = number(16, 1, math.inf, "at least 1")
    # neither stop tokens nor stop strings end a completion until it is longer than this
    min_tokens: int = number(0, 0, math.inf, "at least 0 and at most max_tokens")

    # 0 always takes the most likely token
    temperature: float = number(1.0, 0, 100, "in [0, 100]")
    top_k: int = number(0, -1, MAX_SEED, "-1 or 0 (off), or at least 1")
    # 1 is off
    top_p: float = number(1.0, SMALLEST_POSITIVE, 1, "in (0, 1]")
    # 0 is off
    min_p: float = number(0.0, 0, 1, "in [0, 1]")
    presence_penalty: float = number(0.0, -2, 2, "in [-2, 2]")
    frequency_penalty: float = number(0.0, -2, 2, "in [-2, 2]")
    repetition_penalty: float = number(1.0, SMALLEST_POSITIVE, 10, "in (0, 10]")
    # what is added to the logits of these token ids
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = number(None, -MAX_SEED, MAX_SEED, "a 64-bit integer")

    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False

    # k: the log-probability of each sampled token, and of the k most likely tokens in its place
    logprobs: int | None = number(None, 0, math.inf, "at least 0")
    # the same for every prompt token but the first
    prompt_logprobs: int | None = number(None, 0, math.inf, "at least 0")
    skip_special_tokens: bool = True
    # Special tokens that are not skipped: markers that a parser of the text looks for.
    shown_special_tokens: tuple[int, ...] = ()

    # What the text must be like. It goes before everything else here that bans or ends: a stop
    # token is allowed before min_tokens, and the text ends before them, where nothing else fits.
    structured_outputs: StructuredOutputsParams | None = None

    # Only requests with equal salts, or both without one, share blocks of the prefix cache. Results
    # do not depend on it. It may be a secret, so it is not shown.
    cache_salt: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", as_tuple(self.stop))
        stop_token_ids = map(as_plain, as_tuple(as_plain(self.stop_token_ids)))
        object.__setattr__(self, "stop_token_ids", tuple(stop_token_ids))
        logit_bias = {as_plain(token): as_plain(bias) for token, bias in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", logit_bias)

        for f in fields(self):
            if "range" in f.metadata:
                object.__setattr__(self, f.name, as_plain(getattr(self, f.name)))
                minimum, maximum = f.metadata["range"]
                is_valid = is_number(getattr(self, f.name), f.type, minimum, maximum)
                self.check(f.name, is_valid, f.metadata["allowed"])

        min_fits_max = self.max_tokens is None or self.min_tokens <= self.max_tokens
        self.check("min_tokens", min_fits_max, "at least 0 and at most max_tokens")

        biases_are_valid = all(
            is_number(token, int, 0) and is_number(bias, float, -100, 100)
            for token, bias in self.logit_bias.items()
        )
        self.check("logit_bias", biases_are_valid, "biases in [-100, 100] by token id")

        stops_are_valid = all(isinstance(text, str) and text for text in self.stop)
        self.check("stop", stops_are_valid, "non-empty strings")

        ids_are_valid = all(is_number(token, int, 0) for token in self.stop_token_ids)
        self.check("stop_token_ids", ids_are_valid, "token ids")

        self.check_cache_salt()

        grammar = self.structured_outputs
        is_grammar = grammar is None or isinstance(grammar, StructuredOutputsParams)
        self.check("structured_outputs", is_grammar, "StructuredOutputsParams")

    def check(self, name: str, is_valid: bool, allowed: str) -> None:
        if not is_valid:
            raise ValueError(f"{name} {shorten(getattr(self, name))}: must be {allowed}")

    def with_seed(self, seed: int | None) -> Self:
        """A copy with another seed. Nothing is checked again: these may be large, and requests
        with n choices need n copies."""
        copied = copy.copy(self)
        object.__setattr__(copied, "seed", seed)
        return copied

    def with_tools(
        self,
        structured_outputs: StructuredOutputsParams | None,
        shown_special_tokens: tuple[int, ...],
        banned_token: int | None,
    ) -> Self:
        """A copy for a model that may, must or must not call functions."""
        copied = copy.copy(self)
        object.__setattr__(copied, "structured_outputs", structured_outputs)
        object.__setattr__(copied, "shown_special_tokens", shown_special_tokens)
        if banned_token is not None:
            object.__setattr__(copied, "logit_bias", {banned_token: -100.0, **self.logit_bias})
        return copied

    def without_grammar(self) -> Self:
        """A copy for the ranks, which get masks. A grammar may be large."""
        copied = copy.copy(self)
        object.__setattr__(copied, "structured_outputs", None)
        return copied

    def check_cache_salt(self) -> None:
        salt = self.cache_salt
        if salt is None:
            return
        require(isinstance(salt, str), f"cache_salt of type {type(salt).__name__}: must be a text")
        require(
            0 < len(salt) <= MAX_SALT_LENGTH,
            f"cache_salt of {len(salt)} characters: must have 1 to {MAX_SALT_LENGTH} characters",
        )

    def may_stop_after(self, num_outputs: int) -> bool:
        """The rule of min_tokens: whether a completion may end with its `num_outputs`-th token."""
        return num_outputs > self.min_tokens

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    @property
    def rules_out_tokens(self) -> bool:
        """Whether unlikely tokens are never sampled."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def adjusts_logits(self) -> bool:
        """Whether the logits of single tokens are changed before one is chosen."""
        return self.has_penalties or self.min_tokens > 0 or bool(self.logit_bias)


def as_plain(value: Any) -> Any:
    """Python's number or list for one of NumPy's or torch's, which is no `int`; else the value."""
    return value.tolist() if hasattr(value, "tolist") else value


def as_tuple(value: Any) -> tuple[Any, ...]:
    if isinstance(value, tuple | list):
        return tuple(value)
    return (value,)


def is_number(value: Any, kind: Any, minimum: float, maximum: float = math.inf) -> bool:
    """Whether the value has the type `kind` and lies in [minimum, maximum].

    An int passes for a float, a bool does not pass for either. None is in every range.
    """
    if isinstance(value, bool) or not isinstance(value, (kind, int)):
        return False
    return value is None or minimum <= value <= maximum


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the token there, and of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), the most likely first


@dataclass
class CompletionOutput:
    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None  # an entry per token; None if not asked for
    error: str | None = None  # what went wrong, if finish_reason is "error"


@dataclass
class RequestOutput:
    """A finished request."""

    request_id: str
    prompt: str | None  # None if it was given as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    # an entry per prompt token, None for the first; None if not asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(frozen=True)
class OutputDelta:
    """What one step added to a request."""

    request_id: str
    text: str  # may be empty: a token can end inside a character
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None  # None: it goes on
    logprobs: TokenLogprobs | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with the first token, if asked for
    # characters that are decoded, and not in any text yet, because they may begin a stop string
    num_held_back: int = 0
    error: str | None = None  # if finish_reason is ERROR


@dataclass(eq=False)
class Request:
    """A request as the scheduler sees it: waiting, running or finished."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    stop_ids: tuple[int, ...] = ()  # tokens that end it: stop tokens and end-of-sequence tokens
    group: str = ""  # the same for requests that one client sent at once; groups take turns

    # The prompt and the output tokens known so far. Positions [0, num_computed) have their latents
    # in the cache, or in a step that is already scheduled.
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    # How many tokens were known when it was admitted. It is prefilling until these are computed.
    prefill_end: int = 0
    # Tokens that scheduled steps will sample and that are not in `tokens` yet: 0 or 1.
    num_in_flight: int = 0
    # Which tokens may come next, a bit for each, if it has a grammar. None while that is not known:
    # while a step samples a token, and until `engine/grammar.py` has looked at that token.
    mask: bytes | None = None

    # The request slot: this request's row in the workers' tables while it runs, else -1.
    # Not to be confused with a slot of the KV cache, which holds one token.
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks, in order
    # How many of its blocks have been offered to the prefix cache. The cache knows their content,
    # either from these very blocks or from equal ones that another request published before.
    num_published: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache when it was first admitted

    # An entry per prompt token if they were asked for, else empty.
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_token_ids)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(self.tokens)

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - len(self.prompt_token_ids)

    @property
    def lacks_mask(self) -> bool:
        """Whether no token may be sampled yet, because it is not known which ones are allowed."""
        return self.params.structured_outputs is not None and self.mask is None

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens known at its admission are not computed yet.

        After a preemption these include tokens that were sampled before it.
        """
        return self.num_computed < self.prefill_end


class NewTokens(NamedTuple):
    """What one row of a step gave its request: sampled tokens [first, end)."""

    request: Request
    first: int
    end: int
    num_drafts: int


def check_token_ids(tokens: list[int], vocab_size: int) -> None:
    """Raises ValueError if one of them is not in the vocabulary.

    It first looks at all of them at once, because a prompt may have a million.
    """
    if set(map(type, tokens)) == {int} and min(tokens) >= 0 and max(tokens) < vocab_size:
        return
    for token in tokens:
        is_id = isinstance(token, int) and not isinstance(token, bool)
        if not is_id or not 0 <= token < vocab_size:
            raise ValueError(
                f"prompt: token id {shorten(token)} is out of range; "
                f"the vocabulary has {vocab_size} tokens"
            )
