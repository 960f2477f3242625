"""What a request may ask of the model. Next: `engine.py`."""

from dataclasses import dataclass

from minidcp.config import require, shorten
from minidcp.request import SamplingParams, check_token_ids


@dataclass(frozen=True)
class Limits:
    """Limits of the model and of the cache."""

    max_model_len: int
    vocab_size: int
    has_tokenizer: bool

    def require_fit(self, fits: bool, given: str) -> None:
        """Clients recognise the beginning of this message."""
        limit = f"This model's maximum context length is {self.max_model_len} tokens."
        require(fits, f"{limit} However, {given}")

    def check(self, tokens: list[int], params: SamplingParams) -> None:
        """Raises ValueError, naming the field, if the model cannot run these tokens like this."""
        require(len(tokens) > 0, "prompt: is empty; give at least one token")
        length = len(tokens)
        max_tokens = params.max_tokens or 1
        advice = "Shorten the prompt, or set a lower max_tokens."
        if params.max_tokens is None:
            advice = "Shorten the prompt."
        self.require_fit(
            length + max_tokens <= self.max_model_len,
            f"you requested {length + max_tokens} tokens ({length} in the prompt, {max_tokens} in "
            f"the completion). {advice}",
        )

        vocab_size = self.vocab_size
        check_token_ids(tokens, vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name) or 0
            require(count <= vocab_size, f"{name} {count}: the vocabulary has {vocab_size} tokens")
        for name in ("logit_bias", "stop_token_ids"):
            largest = max(getattr(params, name), default=0)
            require(
                largest < vocab_size,
                f"{name} {shorten(largest)}: the vocabulary has {vocab_size} tokens",
            )
        require(
            not params.stop or self.has_tokenizer,
            f"stop {params.stop!r}: the checkpoint has no tokenizer; use stop_token_ids",
        )
