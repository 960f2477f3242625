"""What crosses the wire: requests as clients send them, and how they map to the engine's parameters. Every optional
field takes null; unknown fields are ignored, known ones that would have no effect refused. Answers are dicts made in
`generation.py`; their schema is that of OpenAI's own client."""

from dataclasses import replace
from hashlib import sha256
from typing import Any, ClassVar, Literal, Self, get_type_hints

from openai import types
from openai.types import completion_choice
from pydantic import BaseModel, Field, create_model, model_validator
from starlette.responses import JSONResponse

from minidcp.config import require
from minidcp.llm import as_batch
from minidcp.request import MAX_SEED, SamplingParams

# Known fields that would have no effect: refused unless their value asks for nothing.
UNSUPPORTED = {
    *("suffix", "response_format", "structured_outputs", "tools", "tool_choice", "functions", "function_call"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend"),
    *("continue_final_message", "chat_template", "chat_template_kwargs", "include_stop_str_in_output"),
    *("prompt_logprobs", "truncate_prompt_tokens", "allowed_token_ids", "bad_words", "use_beam_search"),
}
NEUTRAL: tuple[Any, ...] = ("", False, [], {}, "none", "auto", {"type": "text"}, None)


class Body(BaseModel, extra="allow"):
    """What every POST takes."""

    model: str | None = None

    @model_validator(mode="after")
    def refuse_unsupported(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value not in NEUTRAL:
                raise ValueError(f"{name} {value!r} is not supported; leave it out")
        return self


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


OWN = {"max_tokens", "logprobs", "prompt_logprobs"}  # fields of SamplingParams that clients spell otherwise
SAMPLING = {name: hint for name, hint in get_type_hints(SamplingParams).items() if name not in OWN}
SAMPLING_FIELDS: Any = {name: (hint | None, None) for name, hint in SAMPLING.items()}
Sampling = create_model("Sampling", __base__=Body, **SAMPLING_FIELDS)


class GenerationRequest(Sampling):  # type: ignore[misc, valid-type]
    """What completions and chats have in common; the fields of SamplingParams are fields here."""

    DEFAULT_MAX_TOKENS: ClassVar[int | None] = SamplingParams.max_tokens

    max_tokens: int | None = Field(None, description="default 16, in chats the room in the context")
    max_completion_tokens: int | None = Field(None, description="the same")
    n: int | None = Field(None, ge=1, le=128)
    add_special_tokens: bool | None = Field(None, description="default true for prompts, false for chats")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def samples(self) -> list[SamplingParams]:
        """For each of a prompt's n choices. Raises ValueError, naming the field that is wrong."""
        require(self.stream_options is None or self.stream, "stream_options is allowed only with stream true")
        limits = (self.max_completion_tokens, self.max_tokens, self.DEFAULT_MAX_TOKENS)
        limit = next((limit for limit in limits if limit is not None), None)
        given = {name: getattr(self, name) for name in SAMPLING} | self.count_logprobs()
        known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        params = SamplingParams(max_tokens=limit, **known)
        return [replace(params, seed=derive_seed(params.seed, j)) for j in range(self.n or 1)]


def derive_seed(seed: int | None, sample: int) -> int | None:
    """Sample 0 has the seed itself, whatever n is; the others have hashes, so that neighbouring seeds share none."""
    if seed is None or sample == 0:
        return seed
    return int.from_bytes(sha256(f"{seed} {sample}".encode()).digest()[:8], "big") & MAX_SEED


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, description="only what n is")

    @model_validator(mode="after")
    def check_best_of(self) -> Self:
        n = self.n or 1
        require(self.best_of in (None, n), f"best_of {self.best_of}: must be n, {n}; choices are not ranked here")
        return self

    def count_logprobs(self) -> dict[str, int | None]:
        """SamplingParams' fields that ask for log-probabilities."""
        return {"logprobs": self.logprobs, "prompt_logprobs": self.logprobs if self.echo else None}

    def prompts(self) -> list[str | list[int]]:
        """The prompt in any of its four shapes, as a list of texts or token id lists."""
        prompts = as_batch(self.prompt)
        require(prompts, "prompt: is empty; give at least one")
        return prompts


class ChatMessage(BaseModel, extra="allow"):
    """Other fields than these two reach the template as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None

    def for_template(self) -> dict[str, Any]:
        """Raises ValueError if there is content other than text."""
        content = self.content
        if isinstance(content, list):
            for part in content:
                what = f"a content part of type {part.get('type')!r} is not supported; only type 'text', with a text"
                require(part.get("type") == "text" and isinstance(part.get("text"), str), f"messages: {what}")
            content = "\n".join(part["text"] for part in content)  # as vLLM does
        return (self.model_extra or {}) | {"role": self.role, "content": content}


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    DEFAULT_MAX_TOKENS: ClassVar[int | None] = None

    messages: list[ChatMessage] = Field(min_length=1)
    add_generation_prompt: bool | None = Field(None, description="default true: ready for an answer")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="only with logprobs")

    def count_logprobs(self) -> dict[str, int | None]:
        require(self.logprobs or not self.top_logprobs, f"top_logprobs {self.top_logprobs}: only with logprobs true")
        return {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}

    def prompts(self) -> list[Self]:
        return [self]  # which a template makes a prompt of


class TokenizeRequest(Body):
    """Body of POST /tokenize: a prompt, or messages for the chat template."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = Field(None, description="default true; false for messages")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def check_prompt(self) -> Self:
        require((self.prompt is None) != (self.messages is None), "prompt: give either prompt or messages")
        return self


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    tokens: list[int]


class Logprobs(completion_choice.Logprobs):
    """As OpenAI's, but for a prompt's first token, which has none."""

    token_logprobs: list[float | None] | None = None  # type: ignore[assignment]
    top_logprobs: list[dict[str, float] | None] | None = None  # type: ignore[assignment]


class CompletionChoice(completion_choice.CompletionChoice):
    logprobs: Logprobs | None = None


class Completion(types.Completion):
    """The answer of POST /v1/completions."""

    choices: list[CompletionChoice]  # type: ignore[assignment]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: int | None = None


class ErrorResponse(BaseModel):
    """Every error, whatever its status."""

    error: ErrorDetail

    @classmethod
    def of(cls, status: int, message: str, param: str | None = None) -> Self:
        kinds = {401: "authentication_error", 404: "not_found_error", 503: "service_unavailable_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "internal_server_error")
        message = message.encode(errors="backslashreplace").decode()  # templates quote halves of characters
        return cls(error=ErrorDetail(message=message, type=kind, param=param, code=status))


# What a message may begin with and an error's `param` name.
BODIES = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
FIELDS = {*UNSUPPORTED, *(name for body in BODIES for name in body.model_fields)}


def error_response(status: int, message: str, param: str | None = None, headers: Any = None) -> JSONResponse:
    return JSONResponse(ErrorResponse.of(status, message, param).model_dump(), status, headers)
