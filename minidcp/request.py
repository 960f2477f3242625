"""What a user asks for and gets, and what the scheduler knows of it in between; no torch. Next: `batch.py`."""

import math
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from minidcp.config import require

MAX_SEED = 2**63 - 1
ABOVE_ZERO = math.ulp(0.0)  # the least number that is


def number(default: float | None, least: float, most: float, what: str) -> Any:
    """A field of SamplingParams: a number in [least, most], `what` in words."""
    return field(default=default, metadata={"range": (least, most), "what": what})


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or max_model_len
    ABORT = "abort"  # the client left or the engine stopped


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 are
    off. With a `seed` a request gives the same tokens whatever runs beside it. `max_tokens` None means up to the
    model's context length. `logprobs` k gives the sampled token's log-probability and the k most likely ones, as the
    model has them: before temperature, penalties and biases. Before `min_tokens` nothing stops a completion. Raises
    ValueError, naming the value, if one is out of range."""

    max_tokens: int | None = number(16, 1, math.inf, "at least 1")
    min_tokens: int = number(0, 0, math.inf, "at least 0 and at most max_tokens")
    temperature: float = number(1.0, 0, 100, "in [0, 100]")
    top_k: int = number(0, -1, MAX_SEED, "-1 or 0 (off), or at least 1")
    top_p: float = number(1.0, ABOVE_ZERO, 1, "in (0, 1]")
    min_p: float = number(0.0, 0, 1, "in [0, 1]")
    presence_penalty: float = number(0.0, -2, 2, "in [-2, 2]")
    frequency_penalty: float = number(0.0, -2, 2, "in [-2, 2]")
    repetition_penalty: float = number(1.0, ABOVE_ZERO, 10, "in (0, 10]")
    logit_bias: dict[int, float] = field(default_factory=dict)  # added to these tokens' logits
    seed: int | None = number(None, -MAX_SEED, MAX_SEED, "a 64-bit integer")
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = number(None, 0, math.inf, "at least 0")
    # The same for the prompt's tokens, given what stands before them.
    prompt_logprobs: int | None = number(None, 0, math.inf, "at least 0")
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            given = getattr(self, name)
            object.__setattr__(self, name, tuple(given) if isinstance(given, tuple | list) else (given,))
        for f in fields(self):
            if f.metadata:
                self.check(f.name, fits(getattr(self, f.name), f.type, *f.metadata["range"]), f.metadata["what"])
        self.check("min_tokens", self.min_tokens <= (self.max_tokens or math.inf), "at least 0 and at most max_tokens")
        fit = all(fits(token, int, 0) and fits(bias, float, -100, 100) for token, bias in self.logit_bias.items())
        self.check("logit_bias", fit, "biases in [-100, 100] by token id")
        self.check("stop", all(isinstance(text, str) and text for text in self.stop), "non-empty strings")
        self.check("stop_token_ids", all(fits(token, int, 0) for token in self.stop_token_ids), "token ids")

    def check(self, name: str, ok: bool, what: str) -> None:
        require(ok, f"{name} {getattr(self, name)!r}: must be {what}")

    @property
    def is_adjusted(self) -> bool:
        """Whether single logits are shifted before a token is chosen."""
        return self.is_penalised or self.min_tokens > 0 or bool(self.logit_bias)

    @property
    def is_penalised(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


def fits(value: Any, kind: Any, least: float, most: float = math.inf) -> bool:
    """Whether it is of that type, where an int does for a float and a bool for neither, and in [least, most]."""
    of_kind = isinstance(value, (kind, int)) and not isinstance(value, bool)
    return of_kind and (value is None or least <= value <= most)


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


@dataclass(eq=False)
class Request:
    """A request as the scheduler sees it. Of `tokens`, positions [0, num_computed) have their latents in the cache or
    in a step already planned. `num_in_flight` sampled tokens (0 or 1) are planned and not yet known here."""

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
    slot: int = -1  # from 0 on while it is running
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0  # blocks that the prefix cache knows, or knows the like of
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)  # if asked for
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
