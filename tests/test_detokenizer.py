"""Text that cannot settle comes out all the same, and a token costs the same at any length.

Tokens are any bytes here. What they decode to is compared with Python's own decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_demo_checkpoint import EOS, make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minidcp import SamplingParams
from minidcp.engine.detokenizer import Detokenizer

# Bytes that begin characters of one to four bytes, that continue them, and that are never right.
BYTES = b"a \x7f\x80\x97\xa5\xbf\xc3\xce\xe0\xe6\xed\xef\xf0\x9f\x98\xf4\xf5\xff\xbd"
CHUNKS = [bytes([x]) for x in BYTES]
CHUNKS += [bytes([x, y]) for x in BYTES for y in BYTES]
CHUNKS += ["日本".encode()[i : i + 3] for i in range(3)] + ["日".encode(), "😀".encode()]
CHUNKS = list(dict.fromkeys(CHUNKS))


def byte_alphabet() -> dict[int, str]:
    """How ByteLevel tokenizers write each byte, found by asking one."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet: dict[int, str] = {}
    for character in map(chr, range(0x250)):
        ((spelled, _),) = level.pre_tokenize_str(character)
        alphabet.update(zip(character.encode(), spelled, strict=True))
    rest = set(pre_tokenizers.ByteLevel.alphabet()) - set(alphabet.values())
    missing = sorted(set(range(256)) - set(alphabet))  # the bytes that UTF-8 never uses, and others
    alphabet.update(zip(missing, sorted(rest), strict=True))
    return alphabet


def make_byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer with any bytes as tokens, whole characters or not, and one that is skipped."""
    alphabet = byte_alphabet()
    vocab = {"".join(alphabet[x] for x in chunk): i for i, chunk in enumerate(CHUNKS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def make_byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama's: ▁ for spaces, <0xE6> for bytes of characters that it lacks."""
    vocab = {f"<0x{x:02X}>": x for x in range(256)}
    for token in (*"▁abcé", "▁a", "▁bc", "▁▁"):
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=None, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


BYTE_LEVEL = make_byte_level()
BYTE_FALLBACK = make_byte_fallback()
DEMO = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), eos_token=EOS)
BEYOND = 100_000  # an id that no tokenizer here has


def test_the_tokens_are_the_bytes() -> None:
    for i, chunk in enumerate(CHUNKS):
        assert BYTE_LEVEL.decode([i]) == chunk.decode(errors="replace")


# Sequences of tokens, with runs of one or two that repeat.
chunk_ids = st.integers(0, len(CHUNKS) - 1)
runs = st.builds(
    lambda ids, n: ids * n, st.lists(chunk_ids, min_size=1, max_size=3), st.integers(1, 40)
)
sequences = st.lists(runs, min_size=1, max_size=4).map(
    lambda parts: [i for part in parts for i in part]
)


@settings(max_examples=300, deadline=None)
@given(sequences, st.sampled_from((None, BYTE_LEVEL.eos_token_id, BEYOND)))
def test_any_bytes_come_out_as_python_decodes_them(ids: list[int], silent: int | None) -> None:
    """Also with a token in between that has no text."""
    expected = b"".join(CHUNKS[i] for i in ids).decode(errors="replace")
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams())
    out = ""
    for position, token in enumerate(ids, start=1):
        out += detokenizer.append(token)
        if silent is not None:
            out += detokenizer.append(silent)
        # All is out that later bytes cannot change, but for the last four tokens.
        given = b"".join(CHUNKS[i] for i in ids[: max(0, position - 4)]).decode(errors="replace")
        assert expected.startswith(out) and len(out) >= len(
            given.rstrip("\N{REPLACEMENT CHARACTER}")
        )
        assert len(out) >= len(given) - 3
    assert out + detokenizer.flush() == expected


words = st.sampled_from(("▁", "▁▁", "▁a", "▁bc", "a", "b", "é", *"日本😀ñ"))


@settings(deadline=None)
@given(st.lists(words, max_size=30), st.booleans())
def test_byte_fallback_gives_what_decoding_at_once_gives(words: list[str], silent: bool) -> None:
    ids: list[int] = []
    vocab = BYTE_FALLBACK.get_vocab()
    for word in words:
        ids += [vocab[word]] if word in vocab else list(word.encode())
    detokenizer = Detokenizer(BYTE_FALLBACK, SamplingParams())
    out = ""
    for token in ids:
        out += detokenizer.append(token)
        if silent:
            for other in (BYTE_FALLBACK.eos_token_id, BEYOND):
                out += detokenizer.append(other)
    assert out + detokenizer.flush() == BYTE_FALLBACK.decode(ids, skip_special_tokens=True)


@dataclass
class Counter:
    """Stands for a tokenizer and counts the tokens that it decodes."""

    tokenizer: PreTrainedTokenizerFast
    decoded: int = 0
    longest: int = 0

    def decode(self, ids: list[int], **options: bool) -> str:
        self.decoded += len(ids)
        self.longest = max(self.longest, len(ids))
        return self.tokenizer.decode(ids, **options)


BAD_BYTE = CHUNKS.index(b"\xff")


@pytest.mark.parametrize(
    ("tokenizer", "ids", "num_characters"),
    [
        (BYTE_LEVEL, [BAD_BYTE], 2000),
        (BYTE_LEVEL, [CHUNKS.index(b"\xe6")], 2000),
        (BYTE_LEVEL, [CHUNKS.index(b"\xe6\x97")], 2000),
        (BYTE_LEVEL, [BYTE_LEVEL.eos_token_id], 0),
        (BYTE_LEVEL, [BEYOND], 0),
        (BYTE_LEVEL, [BAD_BYTE, BEYOND], 1000),
        (BYTE_LEVEL, [CHUNKS.index(b"a"), BYTE_LEVEL.eos_token_id], 1000),
        (BYTE_FALLBACK, [0xFF], 2000),
        (BYTE_FALLBACK, [0xE6], 2000),
        (BYTE_FALLBACK, [BYTE_FALLBACK.eos_token_id], 0),
        (BYTE_FALLBACK, [256], 1999),  # spaces, of which the first is stripped
        (DEMO, [DEMO.eos_token_id], 0),
        (DEMO, [DEMO.eos_token_id, 41], 1000),
    ],
)
def test_a_token_costs_the_same_whatever_came_before(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], num_characters: int
) -> None:
    counter = Counter(tokenizer)
    detokenizer = Detokenizer(counter, SamplingParams())
    ids = (ids * 2000)[:2000]
    out = "".join(map(detokenizer.append, ids))
    assert counter.longest <= 24
    assert counter.decoded <= 60 * len(ids)
    assert len(out) >= num_characters * 0.99 - 4
    whole = out + detokenizer.flush()
    if tokenizer is not DEMO:
        assert whole == tokenizer.decode(ids, skip_special_tokens=True)
        assert len(whole) == num_characters


def brute_force(text: str, stops: list[str]) -> str:
    """The text before the stop string that ends first, and of those the one that begins first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


letters = [CHUNKS.index(bytes([x])) for x in b"a \x7f"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(letters), max_size=40),
    st.lists(st.text("a \x7f", min_size=1, max_size=8), min_size=1, max_size=5),
    st.integers(0, 3),
)
def test_stop_strings_against_brute_force(ids: list[int], stops: list[str], earliest: int) -> None:
    """Tokens of one character each, so it is clear which stop string ends first."""
    text = BYTE_LEVEL.decode(ids)
    # Up to `min_tokens` tokens are not searched at all.
    expected = text[:earliest] + brute_force(text[earliest:], stops)
    params = SamplingParams(stop=stops, min_tokens=earliest, max_tokens=None)
    detokenizer = Detokenizer(BYTE_LEVEL, params)
    out = ""
    for token in ids:
        out += detokenizer.append(token)
        assert expected.startswith(out)
        if detokenizer.stopped:
            break
    assert out + detokenizer.flush() == expected
    assert detokenizer.stopped == (len(expected) < len(text))


class Text(str):
    """A text that notes how much of it is searched for each string of several characters."""

    searched: ClassVar[list[tuple[str, int]]] = []

    def find(self, stop: str, start: int = 0) -> int:  # type: ignore[override]
        if len(stop) > 1:
            self.searched.append((stop, len(self) - start))
        return super().find(stop, start)

    def __add__(self, other: str) -> Text:
        return Text(super().__add__(other))

    def __getitem__(self, index: slice) -> Text:  # type: ignore[override]
        return Text(super().__getitem__(index))


def test_only_new_text_is_searched() -> None:
    """With a long stop string that always almost matches, all of the text is held back."""
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams(stop=["aab", "ab", "a" * 5000 + "b"]))
    detokenizer.held_back = Text()
    for _ in range(1000):
        assert detokenizer.append(letters[0]) == ""
    assert detokenizer.held_back == "a" * 1000
    assert len(Text.searched) == 3000
    for stop, num_characters in Text.searched:
        assert num_characters <= len(stop)  # the last of them is new
