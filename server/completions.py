"""POST /v1/completions. What generates is in `generation.py`."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import Request
from fastapi.responses import Response

from minidcp.request import OutputDelta, TokenLogprobs

from .generation import Generation
from .protocol import Choice, CompletionRequest, CompletionResponse, Logprobs


class Completions(Generation[Choice, Choice]):
    id_prefix, whole_type, event_type = "cmpl", CompletionResponse, CompletionResponse

    async def answer(self, body: CompletionRequest, request: Request) -> Response:
        samples = body.samples()
        prompts = [await self.tokenization.encode_prompt(prompt) for prompt in body.prompts()]
        if not prompts:
            raise ValueError("prompt: is empty; give at least one")
        return await self.generate(body, prompts, samples, request)

    def start(self, index: int) -> Callable[[OutputDelta], Choice]:
        offset = 0

        def word(delta: OutputDelta) -> Choice:
            nonlocal offset
            choice = Choice(index=index, text=delta.text, finish_reason=delta.finish_reason)
            if delta.logprobs is not None:
                choice.logprobs = self.name_logprobs(delta.logprobs, offset)
                offset += len(choice.logprobs.tokens[0])
            return choice

        return word

    def name_logprobs(self, entry: TokenLogprobs, offset: int) -> Logprobs:
        spell = self.tokenization.spell
        token = spell(entry.token_id)
        top: dict[str, float] = {}
        for candidate, logprob in entry.top:
            top.setdefault(spell(candidate), logprob)  # two ids can share a text; the likelier one counts
        top.setdefault(token, entry.logprob)
        return Logprobs(
            tokens=[token], token_logprobs=[entry.logprob], top_logprobs=[top], text_offset=[offset]
        )

    def merge(self, parts: list[Choice]) -> Choice:
        each = [part.logprobs for part in parts if part.logprobs is not None]
        columns = {
            name: [row for one in each for row in getattr(one, name)] for name in Logprobs.model_fields
        }
        return Choice(
            index=parts[0].index,
            text="".join(part.text for part in parts),
            logprobs=Logprobs(**columns) if each else None,
            finish_reason=parts[-1].finish_reason,
        )
