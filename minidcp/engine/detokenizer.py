"""Tokens to text, one at a time: never half a character, never a stop string."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # takes seconds to import, and ranks never need it
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an incomplete character decodes to


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, or None if it has none (then prompts are token ids).

    Raises:
        ValueError: there are tokenizer files, but they cannot be read.
    """
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{path}: the tokenizer cannot be loaded ({error})") from error
    return tokenizer


class Detokenizer:
    """The text of one completion as it grows.

    Text is held back while it ends inside a character, or in what may become a stop string.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        stop: tuple[str, ...],
        skip_special_tokens: bool,
        min_tokens: int = 0,  # before which stop strings do not stop
    ) -> None:
        self.tokenizer, self.stop, self.skip_special_tokens = tokenizer, stop, skip_special_tokens
        self.min_tokens = min_tokens
        self.ids: list[int] = []
        # Text up to token `read` is out; decoding starts at `prefix` because a token's text can depend on
        # the one before it.
        self.prefix = self.read = 0
        self.pending = ""
        self.stopped = False

    def append(self, token: int) -> str:
        """Add a token; returns the text that is now certain. A stop string is cut and sets `stopped`."""
        if self.tokenizer is None or self.stopped:
            return ""
        self.ids.append(token)
        before, after = self.decode(self.prefix, self.read), self.decode(self.prefix, len(self.ids))
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return ""
        self.prefix, self.read = self.read, len(self.ids)
        return self.release(after[len(before) :])

    def flush(self) -> str:
        """What was held back, once no token follows."""
        if self.tokenizer is None or self.stopped:
            return ""
        before, after = self.decode(self.prefix, self.read), self.decode(self.prefix, len(self.ids))
        self.prefix, self.read = self.read, len(self.ids)
        text = self.release(after[len(before) :])
        if not self.stopped:
            text, self.pending = text + self.pending, ""
        return text

    def decode(self, start: int, end: int) -> str:
        assert self.tokenizer is not None
        text = self.tokenizer.decode(
            self.ids[start:end],
            skip_special_tokens=self.skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    def release(self, new: str) -> str:
        """Pass `new` text on, up to a stop string or the beginning of one."""
        text = self.pending + new
        if len(self.ids) <= self.min_tokens:
            self.pending = ""
            return text
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.stopped, self.pending = True, ""
            return text[: min(found)]
        held = max((overlap(text, stop) for stop in self.stop), default=0)
        self.pending = text[len(text) - held :]
        return text[: len(text) - held]


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
