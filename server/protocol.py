"""What crosses the wire: OpenAI's request and response shapes, and how they map to the engine's.

Every optional field takes null; unknown fields are ignored, known ones that do nothing are refused.
"""

from __future__ import annotations

import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from minidcp.request import MAX_SEED, SamplingParams, TokenLogprobs

# Known fields without effect here: refused unless they hold the value that asks for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "min_p": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
}


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class CompletionRequest(BaseModel):
    """Body of POST /v1/completions."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, description="default 16; alias max_completion_tokens")
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, le=MAX_SEED)
    seed: int | None = Field(None, ge=-MAX_SEED, le=MAX_SEED)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def refuse_unsupported(self) -> CompletionRequest:
        for name, neutral in UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in neutral:
                raise ValueError(f"{name} {value!r} is not supported; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream true")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompt in any of its four shapes, as a list of texts or token id lists."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[t for t in self.prompt if isinstance(t, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]

    def sampling_params(self) -> SamplingParams:
        """Raises ValueError, naming the field, where a value is out of range."""
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        given: dict[str, Any] = {
            "max_tokens": limit,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
            "logprobs": self.logprobs,
        }
        return SamplingParams(**{k: v for k, v in given.items() if v is not None})


class Logprobs(BaseModel):
    """The completions API's columns, one entry per generated token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []

    def add(self, entry: TokenLogprobs, names: dict[int, str]) -> None:
        """`names` gives the text of every token id in the entry."""
        self.text_offset.append(self.text_offset[-1] + len(self.tokens[-1]) if self.tokens else 0)
        self.tokens.append(names[entry.token_id])
        self.token_logprobs.append(entry.logprob)
        top: dict[str, float] = {}
        for token, logprob in entry.top:
            top.setdefault(names[token], logprob)  # two ids can share a text; the likelier one counts
        top.setdefault(names[entry.token_id], entry.logprob)
        self.top_logprobs.append(top)


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


class CompletionResponse(BaseModel):
    """Body of the answer, and of every event of a stream."""

    id: str
    object: str = "text_completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: str = "model"
    created: int = Field(default_factory=lambda: int(time.time()))
    owned_by: str = "minidcp"
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: int | None = None


class ErrorResponse(BaseModel):
    """Every error, whatever its status."""

    error: ErrorDetail

    @classmethod
    def of(cls, status: int, message: str, param: str | None = None) -> ErrorResponse:
        kinds = {400: "invalid_request_error", 404: "not_found_error", 503: "service_unavailable_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "internal_server_error")
        return cls(error=ErrorDetail(message=message, type=kind, param=param, code=status))
