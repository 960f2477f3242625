"""Text to token ids and back, chat templates included. Slow work: off the event loop, in one thread."""

import asyncio

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minidcp.config import require

from .async_engine import AsyncEngine
from .protocol import ChatRequest, TokenizeRequest, TokenizeResponse

# As byte-level vocabularies spell them.
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]


class Tokenization:
    """The checkpoint's tokenizer as endpoints use it. Errors of users are ValueErrors."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    def require_tokenizer(self, field: str) -> PreTrainedTokenizerBase:
        tokenizer = self.engine.engine.tokenizer
        if tokenizer is None:
            raise ValueError(f"{field}: the checkpoint has no tokenizer; only completions of token ids work")
        return tokenizer

    async def encode(self, prompt: str | list[int] | ChatRequest | TokenizeRequest, special: bool | None) -> list[int]:
        """A prompt's token ids. Text gets the special tokens that the tokenizer adds (BOS), but for False; messages get
        them for True only, because templates write them."""
        if isinstance(prompt, list):
            return prompt
        if isinstance(prompt, str):
            return await asyncio.to_thread(self.engine.engine.tokenize, prompt, special is not False)
        tokenizer, ready = self.require_tokenizer("messages"), prompt.add_generation_prompt is not False
        require(tokenizer.chat_template, "messages: the checkpoint has no chat template; use /v1/completions")
        conversation = [message.for_template() for message in prompt.messages or []]

        def work() -> list[int]:
            try:
                text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=ready)
            except Exception as error:  # a template is a program: it may raise anything
                raise ValueError(f"messages: the chat template refuses them: {error}") from error
            return self.engine.engine.tokenize(str(text), special is True, "messages")

        return await asyncio.to_thread(work)

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
        ids = await self.encode(body if body.messages else body.prompt or "", body.add_special_tokens)
        names = [str(tokenizer.convert_ids_to_tokens(i)) for i in ids] if body.return_token_strs else None
        longest = self.engine.engine.max_model_len
        return TokenizeResponse(count=len(ids), max_model_len=longest, tokens=ids, token_strs=names)

    async def detokenize(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        tokenizer, vocab = self.require_tokenizer("tokens"), self.engine.engine.model_config.vocab_size
        bad = next((token for token in tokens if not 0 <= token < vocab), None)
        require(bad is None, f"tokens: token id {bad} is out of range; the vocabulary has {vocab} tokens")
        return str(await asyncio.to_thread(tokenizer.decode, tokens, skip_special_tokens))
