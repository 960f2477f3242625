"""POST /v1/chat/completions. What generates is in `generation.py`."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import Request
from fastapi.responses import Response

from minidcp.request import OutputDelta, TokenLogprobs

from .generation import Generation
from .protocol import (
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprob,
    ChatLogprobs,
    ChatRequest,
    ChatTokenLogprob,
    Delta,
)


class Chat(Generation[ChatChunkChoice, ChatChoice]):
    id_prefix, whole_type, event_type = "chatcmpl", ChatCompletion, ChatCompletionChunk

    async def answer(self, body: ChatRequest, request: Request) -> Response:
        samples = body.samples()
        prompt = await self.tokenization.encode_chat(body.messages)
        return await self.generate(body, [prompt], samples, request)

    def start(self, index: int) -> Callable[[OutputDelta], ChatChunkChoice]:
        # The role comes with the first token: an event of its own would look like one to who measures.
        shape: type[AnswerMessage | Delta] = AnswerMessage

        def word(delta: OutputDelta) -> ChatChunkChoice:
            nonlocal shape
            words, shape = shape(content=delta.text), Delta
            logprobs = None if delta.logprobs is None else self.name_logprobs(delta.logprobs)
            return ChatChunkChoice(
                index=index, delta=words, logprobs=logprobs, finish_reason=delta.finish_reason
            )

        return word

    def name_logprobs(self, entry: TokenLogprobs) -> ChatLogprobs:
        chosen, *top = [
            ChatLogprob(
                token=self.tokenization.spell(token),
                logprob=logprob,
                bytes=self.tokenization.spell_bytes(token),
            )
            for token, logprob in ((entry.token_id, entry.logprob), *entry.top)
        ]
        return ChatLogprobs(content=[ChatTokenLogprob(**chosen.model_dump(), top_logprobs=top)])

    def merge(self, parts: list[ChatChunkChoice]) -> ChatChoice:
        each = [part.logprobs for part in parts if part.logprobs is not None]
        return ChatChoice(
            index=parts[0].index,
            message=AnswerMessage(content="".join(part.delta.content for part in parts)),
            logprobs=ChatLogprobs(content=[token for one in each for token in one.content]) if each else None,
            finish_reason=parts[-1].finish_reason,
        )
