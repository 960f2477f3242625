"""The checkpoint's tokenizer: how it is loaded, and text to token ids with the BOS and EOS that the
checkpoint asks for. The way back is `detokenizer.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidcp.config import require
from minidcp.model_config import has_tokenizer

if TYPE_CHECKING:  # takes seconds to import, and ranks never need it
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# Where the configuration does not say what to add, these classes add BOS and no EOS.
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, or None if it has none: prompts are then token ids.

    Raises ValueError if there is one that cannot be read.
    """
    if not has_tokenizer(path):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json is the whole tokenizer. The class that DeepSeek's files name beside it,
    # LlamaTokenizerFast, builds another one in some versions of transformers 5, which loses spaces.
    loader = PreTrainedTokenizerFast if (path / TOKENIZER_FILE).exists() else AutoTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{path}: the tokenizer cannot be loaded ({error})") from error
    return tokenizer


@dataclass(frozen=True)
class TextEncoder:
    """Text to token ids. It decides about BOS and EOS itself, because transformers 5 ignores
    `add_bos_token` and `add_eos_token` of tokenizer_config.json beside a tokenizer.json."""

    tokenizer: PreTrainedTokenizerBase
    prefix: list[int]  # special tokens before a text: BOS, or none
    suffix: list[int]  # special tokens after a text: EOS, or none

    @classmethod
    def from_checkpoint(cls, tokenizer: PreTrainedTokenizerBase, path: Path) -> TextEncoder:
        """Raises ValueError if tokenizer_config.json wants a token added that it does not name."""
        prefix, suffix = find_special_tokens(tokenizer)
        config = read_config(path)

        bos = tokenizer.bos_token_id
        adds_bos = read_choice(config, path, "bos_token", bos)
        if adds_bos is False:
            prefix = [token for token in prefix if token != bos]
        elif adds_bos and bos not in prefix:
            prefix = [bos, *prefix]

        eos = tokenizer.eos_token_id
        adds_eos = read_choice(config, path, "eos_token", eos)
        if adds_eos is False:
            suffix = [token for token in suffix if token != eos]
        elif adds_eos and eos not in suffix:
            suffix = [*suffix, eos]
        return cls(tokenizer, prefix, suffix)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. What the text itself begins or ends with is not added again."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not add_special_tokens:
            return tokens
        has_prefix = tokens[: len(self.prefix)] == self.prefix
        has_suffix = tokens[max(0, len(tokens) - len(self.suffix)) :] == self.suffix
        prefix = [] if has_prefix else self.prefix
        suffix = [] if has_suffix else self.suffix
        return prefix + tokens + suffix


def find_special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer itself, by its post-processor, puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        end = start + len(bare)
        if whole[start:end] == bare:
            return whole[:start], whole[end:]
    return [], []


def read_config(path: Path) -> dict[str, Any]:
    """The checkpoint's tokenizer_config.json; empty if there is none."""
    file = path / CONFIG_FILE
    if not file.exists():
        return {}
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def read_choice(config: dict[str, Any], path: Path, name: str, token: int | None) -> bool | None:
    """Whether the token called `name` is to be added. None: as the tokenizer itself does it."""
    key = f"add_{name}"
    if key not in config and config.get("tokenizer_class") in LLAMA_CLASSES:
        return name == "bos_token" and token is not None

    choice = config.get(key)
    where = f"{path / CONFIG_FILE}: {key} {json.dumps(choice)}"
    require(choice is None or isinstance(choice, bool), f"{where}: must be true or false")
    require(
        not choice or token is not None,
        f"{where}: there is no {name}; name it, or set {key} to false",
    )
    return choice
