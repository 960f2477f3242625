"""What crosses the wire: requests as clients send them, and how they map to SamplingParams. Every
optional field takes null. Unknown fields are ignored; known ones that would have no effect are
refused. Answers are plain dicts (`generation.py`); their schemas are those of OpenAI's client."""

from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Literal, Self, get_type_hints

from openai import types
from openai.types import completion_choice
from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)

from minidcp.config import require, shorten
from minidcp.request import MAX_SEED, SamplingParams

from .json_body import IntList, is_long
from .structured_outputs import StructuredOutputFields
from .tools import ToolFields
from .unsupported import is_refused

# Every token is looked up in these, for as long as a request runs. docs/operations.md says so too.
MAX_STOPS = 64
MAX_STOP_LENGTH = 1000
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 4096
MAX_MESSAGES = 4096
MAX_PROMPTS = 4096
MAX_CHECKED_IDS = 1000


def at_most(limit: int) -> BeforeValidator:
    """Refuses longer lists and objects before their items are looked at."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list | dict) and len(value) > limit:
            raise ValueError(f"{info.field_name}: has {len(value)} items; at most {limit} may be")
        return value

    return BeforeValidator(check)


def pass_ints(value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """Only short lists are checked item by item, because that is done in the event loop. Of a long
    one the parser has said whether it has integers only."""
    if isinstance(value, IntList):
        return value
    if isinstance(value, list) and is_long(value):
        check(value[:MAX_CHECKED_IDS])  # names the item that is wrong, where it is one of these
        raise ValueError(f"{info.field_name}: an item is not an integer")
    return check(value)


# fail_fast: the first wrong item ends the check. An error for each of a million takes gigabytes.
TokenIds = Annotated[list[int], Field(fail_fast=True), WrapValidator(pass_ints)]


def find_prompt_form(prompt: Any) -> str:
    """Which form a prompt has, by its first item: one form is checked, not all that there are."""
    if not isinstance(prompt, list):
        return "text"
    if prompt and isinstance(prompt[0], list):
        return "token id lists"
    if prompt and isinstance(prompt[0], int | float):
        return "token ids"
    return "texts"


def check_num_prompts(prompt: Any) -> Any:
    has_several = find_prompt_form(prompt) in ("texts", "token id lists")
    if has_several and len(prompt) > MAX_PROMPTS:
        raise ValueError(f"prompt: has {len(prompt)} items; at most {MAX_PROMPTS} may be")
    return prompt


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(fail_fast=True), Tag("texts")]
    | Annotated[TokenIds, Tag("token ids")]
    | Annotated[list[TokenIds], Field(fail_fast=True), Tag("token id lists")],
    Discriminator(find_prompt_form),
    BeforeValidator(check_num_prompts),
]
Stop = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
Stops = Annotated[
    Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)] | None,
    at_most(MAX_STOPS),
]
StopTokenIds = Annotated[
    Annotated[list[int], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None,
    at_most(MAX_STOP_TOKEN_IDS),
]
LogitBias = Annotated[
    Annotated[dict[int, float], Field(max_length=MAX_LOGIT_BIASES)] | None,
    at_most(MAX_LOGIT_BIASES),
]


class Body(BaseModel, extra="allow"):
    """What every POST takes."""

    model: str | None = None

    @model_validator(mode="after")
    def refuse_unsupported(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if is_refused(name, value):
                raise ValueError(f"{name} {shorten(value)} is not supported; leave it out")
        return self


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


# Most fields of SamplingParams are fields of a request as they are; these have another form there.
RESHAPED_FIELDS = {
    "max_tokens",
    "logprobs",
    "prompt_logprobs",
    "structured_outputs",
    "shown_special_tokens",
}
SAMPLING_TYPES = {
    name: field_type
    for name, field_type in get_type_hints(SamplingParams).items()
    if name not in RESHAPED_FIELDS
}
SAMPLING_FIELDS: Any = {
    name: (field_type | None, None) for name, field_type in SAMPLING_TYPES.items()
}
SAMPLING_FIELDS |= {
    "stop": (Stops, None),
    "stop_token_ids": (StopTokenIds, None),
    "logit_bias": (LogitBias, None),
}
Sampling = create_model("Sampling", __base__=Body, **SAMPLING_FIELDS)


class GenerationRequest(Sampling, StructuredOutputFields):  # type: ignore[misc, valid-type]
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

    def make_sampling_params(self, defaults: Mapping[str, Any]) -> list[SamplingParams]:
        """One SamplingParams for each of a prompt's n choices. `defaults` are for fields that were
        not sent. Raises ValueError, naming the field that is wrong."""
        require(
            self.stream_options is None or self.stream,
            "stream_options is allowed only with stream true",
        )
        fields: dict[str, Any] = {name: getattr(self, name) for name in SAMPLING_TYPES}
        fields.update(self.choose_logprobs())
        fields["structured_outputs"] = self.choose_structured_outputs()
        given = {name: value for name, value in fields.items() if value is not None}

        params = SamplingParams(max_tokens=self.choose_max_tokens(), **{**defaults, **given})
        num_samples = self.n or 1
        return [params.with_seed(derive_seed(params.seed, sample)) for sample in range(num_samples)]

    @property
    def only_scores_prompt(self) -> bool:
        """Whether the answer is the prompt, with its log-probabilities, and nothing else."""
        return False

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

    prompt: Prompt
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = Field(
        None, description="begin with the prompt; with max_tokens 0, nothing follows it"
    )
    best_of: int | None = Field(None, description="must equal n")

    @model_validator(mode="after")
    def check_best_of(self) -> Self:
        n = self.n or 1
        require(
            self.best_of in (None, n),
            f"best_of {self.best_of}: must be n, {n}; choices are not ranked here",
        )
        return self

    @property
    def only_scores_prompt(self) -> bool:
        return bool(self.echo) and super().choose_max_tokens() == 0

    def choose_max_tokens(self) -> int | None:
        # The step that computes the last of the prompt samples a token, which is left out later.
        return 1 if self.only_scores_prompt else super().choose_max_tokens()

    def choose_logprobs(self) -> dict[str, int | None]:
        return {
            "logprobs": self.logprobs,
            "prompt_logprobs": self.logprobs if self.echo else None,
        }

    def list_prompts(self) -> list[str | list[int]]:
        """The prompt in any of its four shapes, as a list of texts or token id lists."""
        require(self.prompt != [], "prompt: is empty; give at least one")
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts: list[Any] = [self.prompt] if is_single else list(self.prompt)
        return prompts


class ChatMessage(BaseModel, extra="allow"):
    """Fields other than these two reach the chat template unchanged."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None

    def to_template(self) -> dict[str, Any]:
        """The message as chat templates take it. Raises ValueError if it has other content than
        text."""
        message = dict(self.model_extra or {})
        message["role"] = self.role
        message["content"] = self.content
        if self.role == "assistant" and self.content is None and not message.get("tool_calls"):
            message["content"] = ""  # templates would write None, or fail
        if isinstance(self.content, list):
            message["content"] = join_parts(self.content)
        return message


def join_parts(parts: list[dict[str, Any]]) -> str:
    """The text of a message whose content is a list of parts."""
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"messages: a content part of type {shorten(part.get('type'))} is not supported; "
                "only type 'text', with a text"
            )
    return "\n".join(part["text"] for part in parts)  # as vLLM joins them


Messages = Annotated[
    list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
]


class ChatRequest(GenerationRequest, ToolFields):
    """Body of POST /v1/chat/completions."""

    DEFAULT_MAX_TOKENS: ClassVar[int | None] = None

    messages: Annotated[Messages, at_most(MAX_MESSAGES)]
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


class TokenizeRequest(Body, ToolFields):
    """Body of POST /tokenize: a prompt, or messages for the chat template."""

    prompt: str | None = None
    messages: Annotated[Messages | None, at_most(MAX_MESSAGES)] = None
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

    tokens: TokenIds = Field(description="at most max_model_len")


class Logprobs(completion_choice.Logprobs):
    """As OpenAI's, except that a prompt's first token has no log-probability."""

    token_logprobs: list[float | None] | None = None  # type: ignore[assignment]
    top_logprobs: list[dict[str, float] | None] | None = None  # type: ignore[assignment]


class CompletionChoice(completion_choice.CompletionChoice):
    logprobs: Logprobs | None = None


class Completion(types.Completion):
    """The answer of POST /v1/completions."""

    choices: list[CompletionChoice]  # type: ignore[assignment]
