"""Tokenizer files as the repositories of DeepSeek's models have them, with small vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEXT = "Once upon a time there were 1024 tokens, and naïve 日本 text. It's what it is.\n" * 4


def make_v2() -> Tokenizer:
    """Byte-level BPE that splits off every digit. Its post-processor, ByteLevel, adds nothing."""
    words = Regex(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+")
    return train_byte_level(
        pre_tokenizers.Split(Regex("[\r\n]"), "isolated"),
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.Split(Regex(r"\s+$"), "isolated"),
        pre_tokenizers.Split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
    )


def make_v3() -> Tokenizer:
    """Byte-level BPE that splits off up to three digits, with ByteLevel as its post-processor."""
    words = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return train_byte_level(
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
        pre_tokenizers.Split(Regex(words), "isolated"),
    )


def train_byte_level(*splits: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def make_llama() -> Tokenizer:
    """BPE of Llama's kind: "▁" for a space, a byte of a character without a token is `<0xE6>`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", BOS, EOS, *byte_tokens], show_progress=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator([TEXT.replace("日本", "")], trainer)
    # The trainer made the byte tokens added tokens, and learned words by a pre-tokenizer.
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = content["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    strip = decoders.Strip(" ", left=1)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return tokenizer


def add_template(tokenizer: Tokenizer, single: str) -> Tokenizer:
    """The tokenizer with a template as its post-processor."""
    names = [(name, tokenizer.token_to_id(name)) for name in (BOS, EOS) if name in single]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=names)
    return tokenizer


def write_tokenizer(directory: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json as on the hub. `...` leaves a key out."""
    whole = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": describe_token(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": describe_token(EOS),
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": describe_token(EOS),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
    } | config
    kept = {key: value for key, value in whole.items() if value is not ...}
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(kept))
    return directory


def describe_token(content: str) -> dict[str, Any]:
    return {
        "__type": "AddedToken",
        "content": content,
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }
