"""Tokens to text, one at a time: never half a character, never a stop string."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minidcp.request import SamplingParams

if TYPE_CHECKING:  # takes seconds to import, and ranks never need it
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an incomplete character decodes to


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, or None if it has none: prompts are then token ids. ValueError: it cannot be read."""
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{path}: the tokenizer cannot be loaded ({error})") from error
    return tokenizer


class Detokenizer:
    """The text of one completion as it grows. It is held back while it ends inside a character, or in what may become a
    stop string; before `min_tokens` these do not stop."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams) -> None:
        self.tokenizer, self.params = tokenizer, params
        self.ids: list[int] = []
        # Text up to token `read` is out; decoding starts at `prefix` as a token's text can depend on the one before it.
        self.prefix = self.read = 0
        self.pending = ""
        self.stopped = False

    def append(self, token: int) -> str:
        """Add a token; returns the text that is now certain. A stop string is cut and sets `stopped`."""
        self.ids.append(token)
        return self.flush(is_last=False)

    def flush(self, is_last: bool = True) -> str:
        """What was held back and is certain now: up to a stop string or, if more may follow, to one's beginning."""
        if self.tokenizer is None or self.stopped:
            return ""
        before, after = self.decode(self.prefix, self.read), self.decode(self.prefix, len(self.ids))
        if not is_last and (after.endswith(REPLACEMENT) or len(after) <= len(before)):
            return ""  # inside a character
        self.prefix, self.read = self.read, len(self.ids)
        text = self.pending + after[len(before) :]
        stops = self.params.stop if len(self.ids) > self.params.min_tokens else ()
        found = [at for at in map(text.find, stops) if at >= 0]
        self.stopped = bool(found)
        held = 0 if is_last else max((overlap(text, stop) for stop in stops), default=0)
        end = min(found, default=len(text) - held)
        self.pending = text[end:]
        return text[:end]

    def decode(self, start: int, end: int) -> str:
        assert self.tokenizer is not None
        options = dict(skip_special_tokens=self.params.skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(self.tokenizer.decode(self.ids[start:end], **options))


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
