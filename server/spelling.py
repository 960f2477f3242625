"""How log-probabilities write a token: its text, with the space that it begins with, and its bytes.
`minidcp/engine/detokenizer.py` makes the text of a whole completion."""

import re

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Byte-level vocabularies write every byte of a token as a printable character.
BYTE_OF_CHARACTER = {
    character: byte
    for byte, character in bytes_to_unicode().items()  # type: ignore[no-untyped-call]
}
# Llama's vocabularies have a token for each byte, for characters without a token of their own.
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what part of a character decodes to


def spell_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token's text, as it stands within a text: the beginning of a text may lose its space."""
    alone = decode(tokenizer, [token])
    if REPLACEMENT in alone:
        return alone
    return decode(tokenizer, [token, token])[len(alone) :]


def spell_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> list[int]:
    """A token's UTF-8 bytes. If it is only a part of a character, its text does not tell them, but
    its name in the vocabulary does."""
    text = spell_token(tokenizer, token)
    if REPLACEMENT not in text:
        return list(text.encode())

    name = str(tokenizer.convert_ids_to_tokens(token))
    byte_token = BYTE_TOKEN.fullmatch(name)
    if byte_token is not None:
        return [int(byte_token[1], 16)]
    if all(character in BYTE_OF_CHARACTER for character in name):
        return [BYTE_OF_CHARACTER[character] for character in name]
    return list(text.encode())


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
