"""Log-probabilities as answers have them: lists with an item for each token. Completions and chats
each have a form of their own."""

import codecs
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from typing import Any, NamedTuple

from minidcp.request import TokenLogprobs

from .tokenization import TokenizerService

logger = logging.getLogger("minidcp")

Columns = dict[str, list[Any]]  # the lists of an answer, by their names

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what part of a character decodes to

# OpenAI's API has this value for what is very unlikely, and vLLM has it for -inf. JSON has neither
# -inf nor NaN.
LEAST_LOGPROB = -9999.0


class Position(NamedTuple):
    """A token of an answer, echoed or sampled."""

    token: int
    text_offset: int  # where its text begins in the answer's text
    logprobs: TokenLogprobs | None  # None for an echoed prompt's first token


class LogprobsFormatter:
    """One for the whole server. It keeps the text and the bytes of all tokens that it has met,
    because the tokenizer takes 20 µs and more for each."""

    def __init__(self, tokenizer_service: TokenizerService) -> None:
        self.tokenizer_service = tokenizer_service
        self.get_text: Callable[[int], str] = cache(tokenizer_service.token_text)
        self.get_bytes: Callable[[int], list[int]] = cache(tokenizer_service.token_bytes)
        self.has_met_nan = False

    def format_completion(self, positions: Iterable[Position]) -> Columns:
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        text_offsets: list[int] = []
        for position in positions:
            text = self.get_text(position.token)
            tokens.append(text)
            text_offsets.append(position.text_offset)
            if position.logprobs is None:
                token_logprobs.append(None)
                top_logprobs.append(None)
            else:
                token_logprobs.append(self.to_finite(position.logprobs.logprob))
                top_logprobs.append(self.format_top(text, position.logprobs))
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offsets,
        }

    def format_top(self, text: str, entry: TokenLogprobs) -> dict[str, float]:
        """Log-probabilities of the likeliest tokens and the one with this text, by text. Where two
        tokens have the same text, the likelier one counts."""
        top: dict[str, float] = {}
        for candidate, logprob in entry.top:
            top.setdefault(self.get_text(candidate), self.to_finite(logprob))
        top.setdefault(text, self.to_finite(entry.logprob))
        return top

    def format_chat(self, positions: Iterable[Position]) -> Columns:
        content = []
        for position in positions:
            entry = position.logprobs
            if entry is None:
                continue
            item = self.format_token(entry.token_id, entry.logprob)
            item["top_logprobs"] = [self.format_token(token, value) for token, value in entry.top]
            content.append(item)
        return {"content": content}

    def format_token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.get_text(token),
            "logprob": self.to_finite(logprob),
            "bytes": self.get_bytes(token),
        }

    def to_finite(self, logprob: float) -> float:
        """The log-probability, or LEAST_LOGPROB for -inf and NaN."""
        if logprob > LEAST_LOGPROB:  # false for NaN
            return logprob
        if logprob != logprob and not self.has_met_nan:
            self.has_met_nan = True
            logger.error(
                "log-probabilities are NaN: the model's logits are not finite, and its answers "
                "mean nothing. Clients get %s. This is logged once",
                LEAST_LOGPROB,
            )
        return LEAST_LOGPROB

    def locate_tokens(self, tokens: list[int], text: str) -> Iterator[int]:
        """Where each token of a text begins in it. All tokens of one character begin where the
        character does. Special tokens that the text does not show take no room."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offset = 0
        for token in tokens:
            yield min(offset, len(text))  # a tokenizer may have changed the text, and its length
            spelled = self.get_text(token)
            if token in self.special_ids and not text.startswith(spelled, offset):
                continue
            shown = decoder.decode(bytes(self.get_bytes(token)))
            if offset == 0 and shown.startswith(" ") and not text.startswith(" "):
                shown = shown[1:]  # vocabularies like Llama's begin a text with a space
            offset += len(shown)

    def locate_last(self, token: int, start: int, end: int) -> int:
        """Where a token begins in a text that ended at `start` before it, and ends at `end` with
        it. Earlier tokens that are no character have their text only now."""
        text = self.get_text(token)
        if REPLACEMENT in text:  # it is part of a character
            return start
        return max(start, end - len(text))

    @cached_property
    def special_ids(self) -> set[int]:
        """The tokens that `skip_special_tokens` leaves out."""
        tokenizer = self.tokenizer_service.require_tokenizer("echo")
        added = tokenizer.added_tokens_decoder.items()
        return {token for token, description in added if description.special}
