"""Text to token ids and back, chat templates included. Slow work: off the event loop, in one thread."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from .async_engine import AsyncEngine
from .protocol import (
    ChatMessage,
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)

# A byte-level vocabulary spells printable bytes as themselves, and the others as characters from 256 on.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = {chr(b): b for b in PRINTABLE}
BYTES |= {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}


class Tokenization:
    """The checkpoint's tokenizer as endpoints use it. Errors of users are ValueErrors."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.engine.engine.tokenizer

    def require_tokenizer(self, field: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(f"{field}: the checkpoint has no tokenizer; only completions of token ids work")
        return self.tokenizer

    async def encode_prompt(self, prompt: str | list[int]) -> list[int]:
        """A completion's prompt; text gets the special tokens that the tokenizer adds (BOS)."""
        if isinstance(prompt, list):
            return prompt
        return await self.engine.in_background(self.engine.engine.tokenize, prompt)

    async def encode_chat(self, messages: list[ChatMessage], add_special_tokens: bool = False) -> list[int]:
        """The messages as the template renders them, ready for the assistant's answer. Templates write
        special tokens themselves."""
        return await self.engine.in_background(
            lambda: self.encode(self.render(messages), add_special_tokens, "messages")
        )

    def render(self, messages: list[ChatMessage]) -> str:
        tokenizer = self.require_tokenizer("messages")
        if tokenizer.chat_template is None:
            raise ValueError("messages: the checkpoint has no chat template; use /v1/completions")
        conversation = [message.for_template() for message in messages]
        try:
            return str(
                tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"messages: the chat template refuses them: {error}") from error

    def encode(self, text: str, add_special_tokens: bool, field: str) -> list[int]:
        tokenizer = self.require_tokenizer(field)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can express
            raise ValueError(f"{field}: is not valid Unicode ({error.reason})") from None
        ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def spell(self, token: int) -> str:
        """A token's text, as log-probabilities name it."""
        return str(self.tokenizer.decode([token])) if self.tokenizer else f"token_id:{token}"

    def spell_bytes(self, token: int) -> list[int]:
        """A token's UTF-8 bytes; for a part of a character, these, which its text cannot tell."""
        text = self.spell(token)
        if "\N{REPLACEMENT CHARACTER}" in text and self.tokenizer is not None:
            name = str(self.tokenizer.convert_ids_to_tokens(token))
            if all(character in BYTES for character in name):
                return [BYTES[character] for character in name]
        return list(text.encode())

    async def tokenize(self, body: TokenizeRequest) -> TokenizeResponse:
        add = body.add_special_tokens
        if body.messages is not None:
            ids = await self.encode_chat(body.messages, add_special_tokens=bool(add))
        else:
            ids = await self.engine.in_background(self.encode, body.prompt or "", add is not False, "prompt")
        tokenizer = self.require_tokenizer("prompt")
        names = [str(tokenizer.convert_ids_to_tokens(i)) for i in ids] if body.return_token_strs else None
        return TokenizeResponse(
            count=len(ids), max_model_len=self.engine.engine.max_model_len, tokens=ids, token_strs=names
        )

    async def detokenize(self, body: DetokenizeRequest) -> DetokenizeResponse:
        tokenizer = self.require_tokenizer("tokens")
        vocab = self.engine.engine.model_config.vocab_size
        bad = next((token for token in body.tokens if not 0 <= token < vocab), None)
        if bad is not None:
            raise ValueError(f"tokens: token id {bad} is out of range; the vocabulary has {vocab} tokens")
        return DetokenizeResponse(prompt=str(await self.engine.in_background(tokenizer.decode, body.tokens)))

    def describe(self) -> TokenizerInfo:
        tokenizer = self.require_tokenizer("tokenizer_info")
        return TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            vocab_size=len(tokenizer),
            special_tokens={name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            has_chat_template=tokenizer.chat_template is not None,
        )
