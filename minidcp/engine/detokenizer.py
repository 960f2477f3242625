"""Tokens to text, one token at a time: never half a character, never a stop string."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from minidcp.request import SamplingParams

if TYPE_CHECKING:  # takes seconds to import, and ranks never need it
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an incomplete character decodes to
CHARACTER_BYTES = 4  # of the longest characters in UTF-8; a token has at least one byte

# How many tokens are decoded again with each new token, while no character is complete. Three
# replacement characters at the end may stand for nine bytes. Three more bytes at the beginning may
# be the rest of a character.
WINDOW = 12


class Detokenizer:
    """The text of one completion as it grows.

    Text is held back while it ends inside a character, or while its end may become a stop string.
    A token costs the same however many came before it, and whatever they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams) -> None:
        self.tokenizer = tokenizer
        self.params = params
        self.num_tokens = 0
        self.skip_special_tokens = params.skip_special_tokens
        self.skipped: frozenset[int] = frozenset()  # special tokens, if only some are skipped
        if tokenizer is not None and self.skip_special_tokens and params.shown_special_tokens:
            self.skip_special_tokens = False
            self.skipped = find_special_tokens(tokenizer).difference(params.shown_special_tokens)
        self.stopped = False  # whether a stop string has ended the completion

        # The last tokens that have a text. Of their text, the first `num_read` characters are out
        # or held back. That is the text of all but the last `num_pending` tokens, or more. The text
        # of a token can depend on the token before it, so the window begins with earlier tokens.
        self.window: list[int] = []
        self.num_pending = 0
        self.num_read = 0
        self.held_back = ""

        self.stops_by_first: dict[str, list[str]] = {}  # the stop strings, by first character
        for stop in params.stop:
            self.stops_by_first.setdefault(stop[0], []).append(stop)

    def append(self, token: int) -> str:
        """Add a token. Returns the text that is now certain, up to a stop string if there is."""
        self.num_tokens += 1
        if self.tokenizer is None or self.stopped or token in self.skipped:
            return ""
        self.window.append(token)
        self.num_pending += 1
        return self.cut_at_stop(self.read_settled_text(), is_last=False)

    def flush(self) -> str:
        """The text that was held back; to be called after the last token."""
        if self.tokenizer is None or self.stopped:
            return ""
        return self.cut_at_stop(self.decode(self.window)[self.num_read :], is_last=True)

    def read_settled_text(self) -> str:
        """The text of the window that has not been read and that later tokens cannot change."""
        text = self.decode(self.window)
        num_settled = count_settled(text)

        if num_settled == len(text) > self.num_read:  # it ends with a whole character
            new = text[self.num_read :]
            self.move_window(self.num_pending)
            self.num_pending = 0
            return new

        last = self.window[-1]
        if not self.decode([last, last]):  # alone, a token may lose the space that it begins with
            self.window.pop()  # a special token that is skipped, or unknown to the tokenizer
            self.num_pending -= 1
        if self.num_pending <= CHARACTER_BYTES:
            return ""

        # No single character has so many tokens. What is wrong before the end will stay wrong.
        new = text[self.num_read : num_settled]
        self.num_read = max(self.num_read, num_settled)
        if len(self.window) >= 2 * WINDOW:
            self.move_window(WINDOW)
        return new

    def move_window(self, num_tokens: int) -> None:
        """Keep only the last tokens of the window, whose settled text has been read."""
        self.window = self.window[-num_tokens:]
        self.num_read = count_settled(self.decode(self.window))

    def cut_at_stop(self, new: str, is_last: bool) -> str:
        """The text before the first stop string, or before what may become one.

        What was held back has been searched before, so a stop string must end in the new text.
        """
        if not new and not is_last:
            return ""
        text = self.held_back + new
        stops: list[str] = []
        if self.params.may_stop_after(self.num_tokens):
            for character, stops_with_it in self.stops_by_first.items():
                if character in text:
                    stops += stops_with_it

        searched = len(self.held_back)
        starts = [text.find(stop, max(0, searched + 1 - len(stop))) for stop in stops]
        found = [start for start in starts if start >= 0]

        if found:
            self.stopped = True
            end = min(found)
        elif is_last:
            end = len(text)
        else:
            end = len(text) - max((count_overlap(text, stop) for stop in stops), default=0)

        self.held_back = text[end:]
        return text[:end]

    def decode(self, ids: list[int]) -> str:
        assert self.tokenizer is not None
        text = self.tokenizer.decode(
            ids,
            skip_special_tokens=self.skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return str(text)


@lru_cache(maxsize=1)
def find_special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that `skip_special_tokens` skips."""
    added = tokenizer.added_tokens_decoder
    return frozenset(token for token, description in added.items() if description.special)


def count_settled(text: str) -> int:
    """How many characters of a text stay, whatever bytes follow.

    A character that is not complete decodes to one replacement character, or with some tokenizers
    to one for each of its bytes, of which there are at most three.
    """
    end = text[1 - CHARACTER_BYTES :]
    return len(text) - len(end) + len(end.rstrip(REPLACEMENT))


def count_overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, at most."""
    start = text.find(stop[0], max(0, len(text) + 1 - len(stop)))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
