"""Conversations to text, by the checkpoint's chat template. A template leaves out messages with
roles that it does not know, without a word: here such a message is an error, and a developer's
message is a system message. `tokenization.py` makes token ids of the text."""

import logging
import re
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .template_tools import TemplateTraits, add_to_system_prompt, find_traits, separate_calls
from .tool_calls import NOTATIONS

logger = logging.getLogger("minidcp")

Message = dict[str, Any]  # as templates take it: role, content, and what else the client sent
Tools = list[dict[str, Any]] | None  # as clients send them


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool,
    tools: Tools = None,
    description: str | None = None,
) -> str:
    """The text of a conversation. Raises ValueError if the template refuses the messages, or if
    nothing of a message reaches the text.

    tools: functions that the model may call, for the template.
    description: the same as text, for the system prompt.
    """
    template = ChatTemplate(tokenizer, add_generation_prompt, tools)
    known = messages
    if not template.knows_developer(messages):
        known = rename_developer(messages, "system")
    known, origins = separate_calls(known, template.render)

    if description is None:
        text = template.render(known)
    else:
        text = template.render(add_to_system_prompt(known, description))
    lost = template.find_lost(known)
    if lost is not None:
        index = origins[lost]
        role = messages[index]["role"]
        raise ValueError(
            f"messages: nothing of message {index} (role {role!r}) reaches the prompt, because the "
            "model's chat template leaves it out; leave it out too, or move its text to a message "
            "with another role"
        )
    return text


class ChatTemplate:
    """The template, and what can be found out about it by rendering."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        add_generation_prompt: bool,
        tools: Tools = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.add_generation_prompt = add_generation_prompt
        self.tools = tools

    def render(self, messages: list[Message], tools: Tools = None) -> str:
        """Raises ValueError if the template refuses the messages. `tools` replace the template's
        own."""
        special_tokens: dict[str, Any] = self.tokenizer.special_tokens_map
        listed: Any = tools or self.tools
        try:
            # Not `apply_chat_template`: that of transformers 5 drops a content of None, by which
            # DeepSeek-V3's template knows that an answer only calls functions.
            rendered: Any = render_jinja_template(
                [[drop_nulls(message) for message in messages]],
                tools=listed,
                chat_template=self.tokenizer.get_chat_template(tools=listed),
                add_generation_prompt=self.add_generation_prompt,
                **special_tokens,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"messages: the chat template refuses them: {error}") from error
        texts, _ = rendered
        return str(texts[0])

    def knows_developer(self, messages: list[Message]) -> bool:
        """Whether it treats the role "developer" otherwise than a role that no template knows."""
        if all(message["role"] != "developer" for message in messages):
            return True
        unknown = f"role{secrets.token_hex(8)}"
        outcome = self.describe_outcome(rename_developer(messages, unknown))
        return outcome.replace(unknown, "developer") != self.describe_outcome(messages)

    def describe_outcome(self, messages: list[Message]) -> str:
        """The text or the error, in lower case because templates may capitalize roles."""
        try:
            return self.render(messages).lower()
        except ValueError as error:
            return str(error).lower()

    def find_lost(self, messages: list[Message]) -> int | None:
        """The index of the first message of which nothing reaches the text, if there is one.

        Every message gets a marker of its own, which then stands in the text or not. First it takes
        the place of the content. Where that is not enough, it follows the content, because a
        template may look at it. Nothing is lost if the template refuses both.
        """
        nonce = f"{secrets.randbelow(10**20):020}"  # digits, which no filter changes
        width = len(str(len(messages)))
        lost = None
        reached: set[int] = set()
        for keeps_content in (False, True):
            marked = [
                mark_message(message, f"{nonce}{index:0{width}}", keeps_content)
                for index, message in enumerate(messages)
            ]
            try:
                text = self.render(marked)
            except ValueError:
                continue
            found = re.findall(rf"{nonce}(\d{{{width}}})", text)
            reached.update(int(index) for index in found)
            lost = next((i for i in range(len(messages)) if i not in reached), None)
            if lost is None:
                return None
        return lost


class TraitsFinder:
    """Keeps what is known about the templates that it has met: all but tests have one."""

    def __init__(self, tool_call_parser: str) -> None:
        self.tool_call_parser = tool_call_parser  # the option of that name
        self.known: dict[str, TemplateTraits] = {}
        self.has_explained = False

    def find(self, tokenizer: PreTrainedTokenizerBase) -> TemplateTraits:
        key = str(tokenizer.chat_template)
        if key not in self.known:
            template = ChatTemplate(tokenizer, add_generation_prompt=False)
            self.known[key] = self.override(find_traits(template.render))
        return self.known[key]

    def override(self, traits: TemplateTraits) -> TemplateTraits:
        if self.tool_call_parser == "auto":
            return traits
        return replace(traits, notation=NOTATIONS.get(self.tool_call_parser))

    def explain_once(self, traits: TemplateTraits) -> None:
        """Say in the log why a request's tools will not be called."""
        if traits.notation is not None or self.has_explained:
            return
        self.has_explained = True
        listed = "lists them" if traits.lists_tools else "leaves them out of the prompt"
        logger.warning(
            "a request has tools. The model's chat template %s, and it is not known how the model "
            "writes calls, so it answers with text. Calls are made where tool_choice demands one, "
            "and with a --tool-call-parser. This is logged once",
            listed,
        )


def drop_nulls(message: Message) -> Message:
    """The message without fields that are null, which templates would take for given. An answer's
    content of null is an empty text, or remains null where the answer calls functions instead."""
    kept = {name: value for name, value in message.items() if value is not None}
    if not kept.get("tool_calls"):
        kept.pop("tool_calls", None)
    if message["role"] == "assistant":
        kept.setdefault("content", None if "tool_calls" in kept else "")
    return kept


def rename_developer(messages: list[Message], role: str) -> list[Message]:
    """The messages, with another role in place of "developer"."""
    return [
        message | {"role": role} if message["role"] == "developer" else message
        for message in messages
    ]


def mark_message(message: Message, marker: str, keeps_content: bool) -> Message:
    """The message with a marker in whatever it says: its content, and the names of functions that
    it calls. A message that only calls functions keeps its empty content."""
    calls = message.get("tool_calls")
    names = mark_calls(calls, marker) if isinstance(calls, list) else None
    marked = dict(message)
    if names is not None:
        marked["tool_calls"] = names
    content = message["content"] or ""
    if content or names is None:
        marked["content"] = f"{content}{marker}" if keeps_content else marker
    return marked


def mark_calls(calls: list[Any], marker: str) -> list[Any] | None:
    """Tool calls with a marker as the names of their functions; None if there are no functions."""
    marked = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            return None
        marked.append(call | {"function": function | {"name": marker}})
    return marked or None


def read_template_file(path: str) -> str:
    """The template in the file that --chat-template names. Raises ValueError if there is none, or
    it is not valid Jinja."""
    try:
        template = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {path!r}: cannot be read ({error})") from None
    try:
        render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=template)
    except TemplateSyntaxError as error:
        raise ValueError(f"--chat-template {path!r}: line {error.lineno}: {error}") from None
    except Exception:  # it may refuse this message, or need what the tokenizer knows
        return template
    return template


def set_chat_template(tokenizer: PreTrainedTokenizerBase | None, template: str) -> None:
    """Use this template in place of the checkpoint's own."""
    if tokenizer is None:
        raise ValueError("--chat-template: the checkpoint has no tokenizer, so there are no chats")
    tokenizer.chat_template = template
