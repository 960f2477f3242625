"""What a user asks for and gets, and what the scheduler knows of a request in between.

Plain integers and strings; no torch. Read `batch.py` next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, StrEnum

MAX_SEED = 2**63 - 1


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or max_model_len
    ABORT = "abort"  # the client left or the engine stopped


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 are off. With a `seed` a request
    gives the same tokens whatever runs beside it. `max_tokens` None means up to the model's context length.
    `logprobs` k gives the sampled token's log-probability and the k most likely ones, as the model has
    them: before temperature, penalties and biases. Before `min_tokens` nothing stops a completion.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)  # added to these tokens' logits
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # the same for the prompt's tokens, given what stands before them
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop, ids = as_tuple(self.stop), as_tuple(self.stop_token_ids)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", ids)
        bias, repetition, longest = self.logit_bias, self.repetition_penalty, self.max_tokens or math.inf
        checks = (
            ("max_tokens", self.max_tokens is None or is_int(self.max_tokens, 1), "at least 1"),
            ("min_tokens", is_int(self.min_tokens, 0, longest), "at least 0 and at most max_tokens"),
            ("temperature", is_number(self.temperature, 0, 100), "in [0, 100]"),
            ("top_k", is_int(self.top_k, -1, MAX_SEED), "-1 or 0 (off), or at least 1"),
            ("top_p", is_number(self.top_p, 0, 1) and self.top_p > 0, "in (0, 1]"),
            ("min_p", is_number(self.min_p, 0, 1), "in [0, 1]"),
            ("presence_penalty", is_number(self.presence_penalty, -2, 2), "in [-2, 2]"),
            ("frequency_penalty", is_number(self.frequency_penalty, -2, 2), "in [-2, 2]"),
            ("repetition_penalty", is_number(repetition, 0, 10) and repetition > 0, "in (0, 10]"),
            (
                "logit_bias",
                all(is_int(t, 0) and is_number(b, -100, 100) for t, b in bias.items()),
                "biases in [-100, 100] by token id",
            ),
            ("seed", self.seed is None or is_int(self.seed, -MAX_SEED, MAX_SEED), "a 64-bit integer"),
            ("logprobs", self.logprobs is None or is_int(self.logprobs, 0), "at least 0"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or is_int(self.prompt_logprobs, 0),
                "at least 0",
            ),
            ("stop", all(isinstance(s, str) and s for s in stop), "non-empty strings"),
            ("stop_token_ids", all(is_int(t, 0) for t in ids), "token ids"),
        )
        for name, ok, what in checks:
            if not ok:
                raise ValueError(f"{name} {getattr(self, name)!r}: must be {what}")

    @property
    def is_adjusted(self) -> bool:
        """Whether single logits are shifted before a token is chosen."""
        return self.is_penalised or self.min_tokens > 0 or bool(self.logit_bias)

    @property
    def is_penalised(self) -> bool:
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return penalties != (0, 0, 1)


def as_tuple(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def is_int(value: object, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and is_number(value, least, most)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the sampled token, and of the most likely ones in order."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class CompletionOutput:
    """One completion. `logprobs` has an entry per token where they were asked for, else it is None."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass
class RequestOutput:
    """A finished request. `cached_tokens` of its prompt came from the prefix cache."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # by prompt token; None for the first


@dataclass(frozen=True)
class OutputDelta:
    """What one step added to a request. `text` may be empty: a token can end inside a character."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with the first token, if asked for


class Status(Enum):
    WAITING = 0
    RUNNING = 1
    FINISHED = 2


@dataclass(eq=False)
class Request:
    """A request as the scheduler sees it.

    Of `tokens`, positions [0, num_computed) have their latents in the cache or in a step already
    planned. `num_in_flight` sampled tokens (0 or 1) are planned and not yet known here.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    stop_ids: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    prefill_end: int = 0
    num_in_flight: int = 0
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0  # blocks that the prefix cache knows, or knows the like of
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_token_ids)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(self.tokens)

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - len(self.prompt_token_ids)

    @property
    def is_prefilling(self) -> bool:
        """Tokens known when it was admitted are not computed yet (after a preemption, sampled ones too)."""
        return self.num_computed < self.prefill_end
