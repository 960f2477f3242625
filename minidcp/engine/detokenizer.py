"""Tokens to text, one token at a time: never half a character, never a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minidcp.request import SamplingParams

if TYPE_CHECKING:  # takes seconds to import, and ranks never need it
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an incomplete character decodes to


class Detokenizer:
    """The text of one completion as it grows.

    Text is held back while it ends inside a character, or while its end may become a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams) -> None:
        self.tokenizer = tokenizer
        self.params = params
        self.ids: list[int] = []
        self.stopped = False  # whether a stop string has ended the completion

        # The text of tokens [0, num_decoded) is out or held back. The text of a token can depend on
        # the token before it, so decoding starts at an earlier token.
        self.decode_start = 0
        self.num_decoded = 0
        self.held_back = ""

    def append(self, token: int) -> str:
        """Add a token. Returns the text that is now certain, up to a stop string if there is."""
        self.ids.append(token)
        return self.release_text(is_last=False)

    def flush(self) -> str:
        """The text that was held back; to be called after the last token."""
        return self.release_text(is_last=True)

    def release_text(self, is_last: bool) -> str:
        if self.tokenizer is None or self.stopped:
            return ""
        known = self.decode(self.decode_start, self.num_decoded)
        text = self.decode(self.decode_start, len(self.ids))

        is_inside_character = text.endswith(REPLACEMENT) or len(text) <= len(known)
        if is_inside_character and not is_last:
            return ""

        self.decode_start = self.num_decoded
        self.num_decoded = len(self.ids)
        return self.cut_at_stop(self.held_back + text[len(known) :], is_last)

    def cut_at_stop(self, text: str, is_last: bool) -> str:
        """The text before the first stop string, or before what may become one."""
        stops: Sequence[str] = ()
        if self.params.may_stop_after(len(self.ids)):
            stops = self.params.stop
        found = [text.find(stop) for stop in stops if stop in text]

        if found:
            self.stopped = True
            end = min(found)
        elif is_last:
            end = len(text)
        else:
            end = len(text) - max((count_overlap(text, stop) for stop in stops), default=0)

        self.held_back = text[end:]
        return text[:end]

    def decode(self, start: int, end: int) -> str:
        assert self.tokenizer is not None
        text = self.tokenizer.decode(
            self.ids[start:end],
            skip_special_tokens=self.params.skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return str(text)


def count_overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, at most."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
