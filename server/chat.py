"""POST /v1/chat/completions: messages in, a message out, which may call functions. What it shares
with completions is in `generation.py`; `tools.py` has what tools mean."""

from collections.abc import Iterable, Sequence
from typing import Any

from minidcp.request import FinishReason

from .generation import Generation
from .logprobs import Columns, Position
from .protocol import ChatRequest
from .tool_calls import CallPiece, Piece, TextPiece, ToolCallParser, join_calls, join_text
from .tools import ToolUse


class ChatGeneration(Generation):
    ID_PREFIX = "chatcmpl"
    ANSWER_OBJECT = "chat.completion"
    EVENT_OBJECT = "chat.completion.chunk"

    body: ChatRequest
    tool_use: ToolUse
    parsers: list[ToolCallParser | None]  # by choice

    async def prepare(self) -> None:
        self.check_room(1)
        answer = self.samples[0].structured_outputs
        tokens, use = await self.tokenizer_service.encode_messages(self.body, answer)
        self.prompts = [tokens]
        self.use_tools(use)
        await self.validate_prompts()

    def use_tools(self, use: ToolUse) -> None:
        grammar = use.grammar or self.samples[0].structured_outputs
        self.samples = [
            params.with_tools(grammar, use.shown_special_tokens, use.banned_token)
            for params in self.samples
        ]
        self.parsers = [use.make_parser() for _ in self.samples]

    def parse(self, index: int, text: str) -> Sequence[Piece]:
        """What a choice's new text is; all of it, if the choice has ended."""
        parser = self.parsers[index]
        if parser is None:
            return [TextPiece(text)]
        pieces = parser.feed(text)
        if self.choices[index].finish_reason is not None:
            pieces += parser.flush()
        return pieces

    def describe_finish(self, index: int) -> str | None:
        reason = self.choices[index].finish_reason
        parser = self.parsers[index]
        has_calls = parser is not None and parser.num_calls > 0
        return "tool_calls" if has_calls and reason == FinishReason.STOP else reason

    def describe_text(self, index: int, text: str) -> dict[str, Any]:
        pieces = self.parse(index, text)
        calls = [describe_call(call) for call in join_calls(pieces)]
        content = join_text(pieces)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {"message": message}

    def describe_new_text(self, index: int, text: str, is_first: bool) -> dict[str, Any]:
        pieces = self.parse(index, text)
        calls = [describe_call_piece(call) for call in join_calls(pieces)]
        delta: dict[str, Any] = {}
        if is_first:
            # The role comes with the first token. Clients that measure the time to the first token
            # would take a separate event with the role for that token.
            delta["role"] = "assistant"
        content = join_text(pieces)
        if content or self.parsers[index] is None:
            delta["content"] = content
        elif is_first:
            delta["content"] = None  # there may be calls only
        if calls:
            delta["tool_calls"] = calls
        return {"delta": delta}

    def format_logprobs(self, positions: Iterable[Position]) -> Columns:
        return self.formatter.format_chat(positions)


def describe_call(call: CallPiece) -> dict[str, Any]:
    """A whole call."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def describe_call_piece(call: CallPiece) -> dict[str, Any]:
    """A part of a call, as events have it: the id, the type and the name come once."""
    if call.name is not None:
        return {"index": call.index, **describe_call(call)}
    return {"index": call.index, "function": {"arguments": call.arguments}}
