"""What crosses the wire: requests as clients send them, and how they map to SamplingParams. Every
optional field takes null. Unknown fields are ignored; known ones that would have no effect are
refused. Answers are plain dicts (`generation.py`); their schemas are those of OpenAI's client."""

from dataclasses import replace
from hashlib import sha256
from typing import Any, ClassVar, Literal, Self, get_type_hints

from openai import types
from openai.types import completion_choice
from pydantic import BaseModel, Field, create_model, model_validator

from minidcp.config import require
from minidcp.llm import as_batch
from minidcp.request import MAX_SEED, SamplingParams

# Known fields that would have no effect here. They are refused unless their value is neutral.
UNSUPPORTED_FIELDS = {
    "suffix",
    "response_format",
    "structured_outputs",
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "include_stop_str_in_output",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "allowed_token_ids",
    "bad_words",
    "use_beam_search",
}
NEUTRAL_VALUES: tuple[Any, ...] = ("", False, [], {}, "none", "auto", {"type": "text"}, None)


class Body(BaseModel, extra="allow"):
    """What every POST takes."""

    model: str | None = None

    @model_validator(mode="after")
    def refuse_unsupported(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED_FIELDS and value not in NEUTRAL_VALUES:
                raise ValueError(f"{name} {value!r} is not supported; leave it out")
        return self


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


# Most fields of SamplingParams are fields of a request as they are; these have another form there.
RESHAPED_FIELDS = {"max_tokens", "logprobs", "prompt_logprobs"}
SAMPLING_TYPES = {
    name: field_type
    for name, field_type in get_type_hints(SamplingParams).items()
    if name not in RESHAPED_FIELDS
}
SAMPLING_FIELDS: Any = {
    name: (field_type | None, None) for name, field_type in SAMPLING_TYPES.items()
}
Sampling = create_model("Sampling", __base__=Body, **SAMPLING_FIELDS)


class GenerationRequest(Sampling):  # type: ignore[misc, valid-type]
    """What completions and chats have in common; the fields of SamplingParams are fields here."""

    DEFAULT_MAX_TOKENS: ClassVar[int | None] = SamplingParams.max_tokens

    max_tokens: int | None = Field(
        None, description="default: 16 in completions, what fits the context in chats"
    )
    max_completion_tokens: int | None = Field(None, description="another name for max_tokens")
    seed: int | None = Field(
        None,
        description="fixes the random numbers; tokens are then repeatable in float32, and in "
        "bfloat16 as far as other requests and cached prefixes do not change the rounding",
    )
    n: int | None = Field(None, ge=1, le=128)
    add_special_tokens: bool | None = Field(
        None, description="default: true for prompts, false for chats"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def make_sampling_params(self) -> list[SamplingParams]:
        """One SamplingParams for each of a prompt's n choices. Raises ValueError, naming the field
        that is wrong."""
        require(
            self.stream_options is None or self.stream,
            "stream_options is allowed only with stream true",
        )
        fields: dict[str, Any] = {name: getattr(self, name) for name in SAMPLING_TYPES}
        fields.update(self.choose_logprobs())
        given = {name: value for name, value in fields.items() if value is not None}

        params = SamplingParams(max_tokens=self.choose_max_tokens(), **given)
        num_samples = self.n or 1
        return [
            replace(params, seed=derive_seed(params.seed, sample)) for sample in range(num_samples)
        ]

    def choose_max_tokens(self) -> int | None:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        if self.max_tokens is not None:
            return self.max_tokens
        return self.DEFAULT_MAX_TOKENS

    def choose_logprobs(self) -> dict[str, int | None]:
        """The fields of SamplingParams that ask for log-probabilities."""
        raise NotImplementedError


def derive_seed(seed: int | None, sample: int) -> int | None:
    """Sample 0 has the seed itself, whatever n is. The other samples have hashes of it, so that
    requests with neighbouring seeds share no sample."""
    if seed is None or sample == 0:
        return seed
    digest = sha256(f"{seed} {sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & MAX_SEED


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, description="must equal n")

    @model_validator(mode="after")
    def check_best_of(self) -> Self:
        n = self.n or 1
        require(
            self.best_of in (None, n),
            f"best_of {self.best_of}: must be n, {n}; choices are not ranked here",
        )
        return self

    def choose_logprobs(self) -> dict[str, int | None]:
        return {
            "logprobs": self.logprobs,
            "prompt_logprobs": self.logprobs if self.echo else None,
        }

    def list_prompts(self) -> list[str | list[int]]:
        """The prompt in any of its four shapes, as a list of texts or token id lists."""
        prompts = as_batch(self.prompt)
        require(prompts, "prompt: is empty; give at least one")
        return prompts


class ChatMessage(BaseModel, extra="allow"):
    """Fields other than these two reach the chat template unchanged."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None

    def to_template(self) -> dict[str, Any]:
        """The message as chat templates take it. Raises ValueError if it has other content than
        text."""
        message = dict(self.model_extra or {})
        message["role"] = self.role
        message["content"] = self.content
        if isinstance(self.content, list):
            message["content"] = join_parts(self.content)
        return message


def join_parts(parts: list[dict[str, Any]]) -> str:
    """The text of a message whose content is a list of parts."""
    for part in parts:
        part_type = part.get("type")
        require(
            part_type == "text" and isinstance(part.get("text"), str),
            f"messages: a content part of type {part_type!r} is not supported; "
            "only type 'text', with a text",
        )
    return "\n".join(part["text"] for part in parts)  # as vLLM joins them


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    DEFAULT_MAX_TOKENS: ClassVar[int | None] = None

    messages: list[ChatMessage] = Field(min_length=1)
    add_generation_prompt: bool | None = Field(
        None, description="default: true, the model is to answer"
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="only with logprobs")

    def choose_logprobs(self) -> dict[str, int | None]:
        if self.logprobs:
            return {"logprobs": self.top_logprobs or 0}
        require(not self.top_logprobs, f"top_logprobs {self.top_logprobs}: only with logprobs true")
        return {"logprobs": None}


class TokenizeRequest(Body):
    """Body of POST /tokenize: a prompt, or messages for the chat template."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = Field(
        None, description="default: true for a prompt, false for messages"
    )
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def check_prompt(self) -> Self:
        require(
            (self.prompt is None) != (self.messages is None),
            "prompt: give either prompt or messages",
        )
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
    """As OpenAI's, except that a prompt's first token has no log-probability."""

    token_logprobs: list[float | None] | None = None  # type: ignore[assignment]
    top_logprobs: list[dict[str, float] | None] | None = None  # type: ignore[assignment]


class CompletionChoice(completion_choice.CompletionChoice):
    logprobs: Logprobs | None = None


class Completion(types.Completion):
    """The answer of POST /v1/completions."""

    choices: list[CompletionChoice]  # type: ignore[assignment]
