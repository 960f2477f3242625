"""Text to token ids with tokenizer files as repositories have them. The expectations are what
transformers 4.57 gives: the tokens of tokenizer.json, BOS and EOS as tokenizer_config.json says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import (
    BOS,
    EOS,
    add_template,
    make_llama,
    make_v2,
    make_v3,
    write_tokenizer,
)
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from minidcp import LLM, SamplingParams
from minidcp.engine.tokenizer import TextEncoder, load_tokenizer
from minidcp_server.spelling import spell_bytes, spell_token

pytest_plugins = ["servers"]
TEXTS = ["Once upon a 2048 time", "", " naïve 日本\n", "x" * 50]
GENERIC = dict(tokenizer_class="PreTrainedTokenizerFast")
SILENT = dict(add_bos_token=..., add_eos_token=...)


def load_encoder(path: Path) -> TextEncoder:
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    return TextEncoder.from_checkpoint(tokenizer, path)


@pytest.mark.parametrize(
    ("make", "template", "config", "added"),
    [
        (make_v2, None, {}, "BOS"),
        (make_v3, None, {}, "BOS"),
        (make_v3, None, dict(add_eos_token=True), "BOS EOS"),
        (make_v3, None, dict(add_bos_token=False, add_eos_token=True), "EOS"),
        (make_v3, None, dict(add_bos_token=False), ""),
        (make_v3, None, SILENT, "BOS"),  # the class's own default
        (make_v3, None, SILENT | dict(bos_token=None), ""),
        (make_v3, None, dict(add_bos_token=None), ""),
        (make_v3, None, GENERIC, "BOS"),
        (make_v3, None, GENERIC | SILENT, ""),
        (make_v3, f"{BOS} $A", {}, "BOS"),
        (make_v3, f"{BOS} $A", GENERIC | SILENT, "BOS"),
        (make_v3, f"{BOS} $A", dict(add_bos_token=False), ""),
        (make_v3, f"{BOS} $A", GENERIC | dict(add_bos_token=False), ""),
        (make_v3, f"{BOS} $A {EOS}", {}, "BOS"),
        (make_v3, f"{BOS} $A {EOS}", GENERIC | SILENT, "BOS EOS"),
        (make_v3, f"$A {EOS}", dict(add_eos_token=...) | GENERIC, "BOS EOS"),
        (make_llama, None, {}, "BOS"),
        (make_llama, f"{BOS} $A", SILENT, "BOS"),
    ],
)
def test_bos_and_eos_are_added_as_the_files_say(
    tmp_path: Path,
    make: Callable[[], Tokenizer],
    template: str | None,
    config: dict[str, Any],
    added: str,
) -> None:
    tokenizer = make()
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    prefix = [bos] if "BOS" in added else []
    suffix = [eos] if "EOS" in added else []
    if template is not None:
        add_template(tokenizer, template)
    encoder = load_encoder(write_tokenizer(tmp_path, tokenizer, **config))
    for text in TEXTS:
        bare = tokenizer.encode(text, add_special_tokens=False).ids
        assert encoder.encode(text) == [*prefix, *bare, *suffix]
        assert encoder.encode(text, add_special_tokens=False) == bare

    # Never twice: a text may have them already, as what a chat template writes does.
    for text in (BOS, f"{BOS}Once upon", f"{BOS}Once upon{EOS}", EOS):
        bare = tokenizer.encode(text, add_special_tokens=False).ids
        tokens = encoder.encode(text)
        assert tokens.count(bos) == (1 if prefix or BOS in text else 0)
        assert tokens.count(eos) == (1 if suffix or EOS in text else 0)
        assert encoder.encode(text, add_special_tokens=False) == bare


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(bos_token=None), "add_bos_token true: there is no bos_token; name it, or set"),
        (dict(eos_token=None, add_eos_token=True), "add_eos_token true: there is no eos_token"),
        (dict(add_bos_token="yes"), 'add_bos_token "yes": must be true or false'),
        (dict(add_eos_token=1), "add_eos_token 1: must be true or false"),
    ],
    ids=str,
)
def test_a_wish_that_cannot_be_obeyed_is_refused(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError) as error:
        load_encoder(write_tokenizer(tmp_path, make_v3(), **config))
    assert words in str(error.value)
    assert "tokenizer_config.json" in str(error.value)


def test_tokenizer_json_alone_is_taken_as_it_is(tmp_path: Path) -> None:
    tokenizer = add_template(make_v2(), f"{BOS} $A")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_encoder(tmp_path).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0]).ids


def test_a_prompt_begins_with_bos_with_files_as_on_the_hub(demo: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "hub"
    shutil.copytree(demo, checkpoint)
    file = checkpoint / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    file.write_text(json.dumps(content))
    write_tokenizer(checkpoint, Tokenizer.from_file(str(file)))

    expected = Tokenizer.from_file(str(demo / "tokenizer.json")).encode(TEXTS[0]).ids
    params = SamplingParams(max_tokens=1)
    with LLM(checkpoint, device="cpu", ranks="threads") as llm:
        tokens = [llm.generate(text, params)[0].prompt_token_ids for text in (TEXTS[0], BOS)]
        assert tokens == [expected, expected[:1]]
        assert llm.engine.tokenize(TEXTS[0]) == expected
        assert llm.engine.tokenize(TEXTS[0], special_tokens=False) == expected[1:]


def test_spelling_in_a_vocabulary_of_llamas_kind(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, make_llama(), unk_token="<unk>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    vocabulary = tokenizer.get_vocab()

    for name, token in vocabulary.items():
        if not name.startswith("<"):
            text = name.replace("▁", " ")
            assert spell_token(tokenizer, token) == text
            assert spell_bytes(tokenizer, token) == list(text.encode())
    assert {"▁", "▁time"} <= set(vocabulary)
    assert spell_token(tokenizer, vocabulary["<0x41>"]) == "A"

    for byte in range(256):
        assert spell_bytes(tokenizer, vocabulary[f"<0x{byte:02X}>"]) == [byte]
    text = "Once upon a naïve 日本 time😀"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    spelt = bytes(byte for token in tokens for byte in spell_bytes(tokenizer, token))
    assert spelt.decode() == f" {text}"  # the first token is "▁Once"


@pytest.mark.parametrize("make", [make_v2, make_v3])
def test_spelling_in_a_byte_level_vocabulary(make: Callable[[], Tokenizer]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make())
    for token in range(len(tokenizer)):
        assert spell_token(tokenizer, token) == tokenizer.decode([token])
    text = f"{BOS}Once upon a naïve 日本 time😀<0xE6> \ufffd"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    spelt = bytes(byte for token in tokens for byte in spell_bytes(tokenizer, token))
    assert spelt.decode() == text
