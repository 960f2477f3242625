"""Text to token ids and back, chat templates included. Slow work: off the event loop, in one thread."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from .async_engine import AsyncEngine
from .protocol import ChatMessage, TokenizeRequest, TokenizeResponse

# A byte-level vocabulary spells printable bytes as themselves, and the others as characters from 256 on.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = {chr(b): b for b in PRINTABLE}
BYTES |= {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}


class Tokenization:
    """The checkpoint's tokenizer as endpoints use it. Errors of users are ValueErrors."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    def require_tokenizer(self, field: str) -> PreTrainedTokenizerBase:
        tokenizer = self.engine.engine.tokenizer
        if tokenizer is None:
            raise ValueError(f"{field}: the checkpoint has no tokenizer; only completions of token ids work")
        return tokenizer

    async def encode(self, prompt: str | list[int], special: bool | None) -> list[int]:
        """A prompt's token ids; text gets the special tokens that the tokenizer adds (BOS), but for False."""
        if isinstance(prompt, list):
            return prompt
        return await self.engine.in_background(self.engine.engine.tokenize, prompt, special is not False)

    async def encode_chat(self, messages: list[ChatMessage], special: bool | None) -> list[int]:
        """The messages as the template renders them. Templates write special tokens themselves."""

        def work() -> list[int]:
            return self.engine.engine.tokenize(self.render(messages), special is True, "messages")

        return await self.engine.in_background(work)

    def render(self, messages: list[ChatMessage]) -> str:
        """The messages as the template writes them, ready for the assistant's answer."""
        tokenizer = self.require_tokenizer("messages")
        if tokenizer.chat_template is None:
            raise ValueError("messages: the checkpoint has no chat template; use /v1/completions")
        conversation = [message.for_template() for message in messages]
        try:
            return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"messages: the chat template refuses them: {error}") from error

    def spell(self, token: int) -> str:
        """A token's text, as log-probabilities name it."""
        tokenizer = self.engine.engine.tokenizer
        return str(tokenizer.decode([token])) if tokenizer else f"token_id:{token}"

    def spell_bytes(self, token: int) -> list[int]:
        """A token's UTF-8 bytes; for a part of a character, these, which its text cannot tell."""
        text, tokenizer = self.spell(token), self.engine.engine.tokenizer
        if "\N{REPLACEMENT CHARACTER}" in text and tokenizer is not None:
            name = str(tokenizer.convert_ids_to_tokens(token))
            if all(character in BYTES for character in name):
                return [BYTES[character] for character in name]
        return list(text.encode())

    async def tokenize(self, body: TokenizeRequest) -> TokenizeResponse:
        tokenizer = self.require_tokenizer("messages" if body.messages else "prompt")
        if body.messages:
            ids = await self.encode_chat(body.messages, body.add_special_tokens)
        else:
            ids = await self.encode(body.prompt or "", body.add_special_tokens)
        names = [str(tokenizer.convert_ids_to_tokens(i)) for i in ids] if body.return_token_strs else None
        longest = self.engine.engine.max_model_len
        return TokenizeResponse(count=len(ids), max_model_len=longest, tokens=ids, token_strs=names)

    async def detokenize(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        tokenizer, vocab = self.require_tokenizer("tokens"), self.engine.engine.model_config.vocab_size
        bad = next((token for token in tokens if not 0 <= token < vocab), None)
        if bad is not None:
            raise ValueError(f"tokens: token id {bad} is out of range; the vocabulary has {vocab} tokens")
        return str(await self.engine.in_background(tokenizer.decode, tokens, skip_special_tokens))

    def describe(self) -> dict[str, Any]:
        tokenizer = self.require_tokenizer("tokenizer_info")
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "has_chat_template": tokenizer.chat_template is not None,
        }
