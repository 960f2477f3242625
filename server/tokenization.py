"""Text to token ids and back, chat templates included. Slow work runs outside the event loop, in
the one thread that `AsyncEngine.start` sets up for it."""

import asyncio

from transformers import PreTrainedTokenizerBase

from minidcp.config import require
from minidcp.structured_outputs import StructuredOutputsParams

from .async_engine import AsyncEngine
from .chat_template import TraitsFinder, render_chat
from .protocol import ChatRequest, TokenizeRequest, TokenizeResponse
from .spelling import spell_bytes, spell_token
from .template_tools import prepare_calls
from .tools import ToolUse, choose_tool_use


class TokenizerService:
    """The checkpoint's tokenizer as the endpoints use it. User errors are ValueErrors."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.traits = TraitsFinder(engine.config.tool_call_parser)

    def require_tokenizer(self, field: str) -> PreTrainedTokenizerBase:
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ValueError(
                f"{field}: the checkpoint has no tokenizer; only completions of token ids work"
            )
        return tokenizer

    async def encode_prompt(
        self, prompt: str | list[int], add_special_tokens: bool | None
    ) -> list[int]:
        """A prompt's token ids. Text gets the special tokens that the checkpoint adds (BOS), unless
        `add_special_tokens` is False."""
        if isinstance(prompt, list):
            return prompt
        add_special_tokens = add_special_tokens is not False
        return await asyncio.to_thread(self.engine.tokenize, prompt, add_special_tokens)

    async def encode_messages(
        self,
        body: ChatRequest | TokenizeRequest,
        answer: StructuredOutputsParams | None = None,
    ) -> tuple[list[int], ToolUse]:
        """A conversation's token ids, and what its tools mean. Special tokens (BOS) are added only
        where `add_special_tokens` is True and the template has not written them. `answer` is what
        the text of the answer must be like."""
        tokenizer = self.require_tokenizer("messages")
        require(
            tokenizer.chat_template,
            "messages: the checkpoint has no chat template; use /v1/completions",
        )
        messages = [message.to_template() for message in body.messages or []]
        add_generation_prompt = body.add_generation_prompt is not False
        add_special_tokens = body.add_special_tokens is True

        def encode() -> tuple[list[int], ToolUse]:
            traits = self.traits.find(tokenizer)
            use = choose_tool_use(body, traits, tokenizer, answer)
            if body.tools and use.notation is None and body.tool_choice != "none":
                self.traits.explain_once(traits)
            text = render_chat(
                tokenizer,
                prepare_calls(messages, traits),
                add_generation_prompt,
                use.tools,
                use.description,
            )
            return self.engine.tokenize(text, add_special_tokens, "messages"), use

        return await asyncio.to_thread(encode)

    def token_text(self, token: int) -> str:
        """A token's text, as log-probabilities name it."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            return f"token_id:{token}"
        return spell_token(tokenizer, token)

    def token_bytes(self, token: int) -> list[int]:
        """A token's UTF-8 bytes, those of part of a character included."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            return list(self.token_text(token).encode())
        return spell_bytes(tokenizer, token)

    async def tokenize(self, body: TokenizeRequest) -> TokenizeResponse:
        tokenizer = self.require_tokenizer("messages" if body.messages else "prompt")
        if body.messages:
            tokens, _ = await self.encode_messages(body)
        else:
            tokens = await self.encode_prompt(body.prompt or "", body.add_special_tokens)

        token_strs = None
        if body.return_token_strs:
            token_strs = [str(tokenizer.convert_ids_to_tokens(token)) for token in tokens]
        return TokenizeResponse(
            count=len(tokens),
            max_model_len=self.engine.max_model_len,
            tokens=tokens,
            token_strs=token_strs,
        )

    async def detokenize(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        tokenizer = self.require_tokenizer("tokens")
        vocab_size = self.engine.vocab_size

        def decode() -> str:
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise ValueError(
                        f"tokens: token id {token} is out of range; "
                        f"the vocabulary has {vocab_size} tokens"
                    )
            return str(tokenizer.decode(tokens, skip_special_tokens))

        return await asyncio.to_thread(decode)
