"""Chat templates that leave out messages. What they write is compared with transformers."""

from __future__ import annotations

from typing import Any

import pytest
from servers import Api, Local, check_error
from tokenizer_files import make_v2
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minidcp_server.chat_template import render_chat

pytest_plugins = ["servers"]
Message = dict[str, Any]

LOOP = "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}"
END = "{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
TEMPLATES = {
    # As DeepSeek-V2-Chat's: other roles than these three leave no trace.
    "v2": LOOP + "{% elif m.role == 'assistant' %}<A>{{ m.content }}"
    "{% elif m.role == 'system' %}{{ m.content }}" + END,
    # As the first of DeepSeek-V3: the last system prompt counts, and an answer loses its thoughts.
    "v3": "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}"
    "{{ ns.system }}" + LOOP + "{% elif m.role == 'assistant' and m.content is none %}"
    "{% for call in m.tool_calls %}<C>{{ call.function.name }}({{ call.function.arguments }})"
    "{% endfor %}{% elif m.role == 'assistant' %}<A>{{ m.content.split('</think>')[-1] }}"
    "{% elif m.role == 'tool' %}<T>{{ m.content }}" + END,
    # Any role, as it is.
    "chatml": "{% for m in messages %}<{{ m.role | capitalize }}>{{ m.content | trim }}"
    "{% endfor %}",
    # A role that is not known is an error.
    "strict": LOOP + "{% elif m.role == 'system' %}{{ m.content }}"
    "{% else %}{{ raise_exception('Unknown role: ' + m.role) }}" + END,
    "developer": LOOP + "{% elif m.role == 'developer' %}<D>{{ m.content }}"
    "{% elif m.role == 'system' %}<S>{{ m.content }}" + END,
    # Only JSON of a certain form is an answer.
    "picky": LOOP + "{% elif m.role == 'assistant' and m.content.startswith('OK ') %}"
    "<A>{{ m.content }}{% else %}{{ raise_exception('not OK') }}" + END,
}


def speak(role: str, content: str | None = "Be brief.", **fields: Any) -> Message:
    return {"role": role, "content": content, **fields}


USER = speak("user", "Hi")
FUNCTION = {"name": "look_up", "arguments": "{}"}
CALL = speak("assistant", None, tool_calls=[{"type": "function", "function": FUNCTION}])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=make_v2())


def use(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        ("v2", [speak("system"), USER, speak("assistant"), USER]),
        ("v2", [USER] * 11),
        ("v2", [speak("system", ""), USER, speak("assistant", "")]),
        ("v3", [speak("system"), USER, speak("tool", "42")]),
        ("v3", [USER, speak("assistant", "<think>so</think>Yes")]),
        ("v3", [USER, speak("assistant", "<think>so</think>")]),
        ("v3", [speak("system", "")]),
        ("chatml", [speak("tool"), speak("assistant", " 7 ")]),
        ("developer", [speak("developer"), speak("system"), USER]),
        ("picky", [USER, speak("assistant", "OK 7"), USER]),
    ],
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_conversations_that_reach_the_prompt_are_rendered_as_transformers_does(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[Message],
    add_generation_prompt: bool,
) -> None:
    use(tokenizer, template)
    expected = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert render_chat(tokenizer, messages, add_generation_prompt) == expected


def test_null_is_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Templates know an answer that only calls functions by its content of null."""
    use(tokenizer, "v3")
    text = render_chat(tokenizer, [USER, CALL, speak("tool", "42")], True)
    assert text == "<U>Hi<C>look_up({})<T>42<A>"
    for calls in (None, []):
        silent = speak("assistant", None, tool_calls=calls, refusal=None)
        assert render_chat(tokenizer, [USER, silent], True) == "<U>Hi<A><A>"
    use(tokenizer, "v2")
    assert render_chat(tokenizer, [USER, speak("assistant", None)], False) == "<U>Hi<A>"


@pytest.mark.parametrize("template", ["v2", "v3", "chatml", "strict"])
def test_a_developer_is_the_system_where_the_template_has_no_such_branch(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    use(tokenizer, template)
    system = tokenizer.apply_chat_template([speak("system"), USER], tokenize=False)
    assert render_chat(tokenizer, [speak("developer"), USER], False) == system


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        ("v2", [speak("tool"), USER], "0 (role 'tool')"),
        ("v2", [USER, CALL, speak("tool", "42")], "1 (role 'assistant')"),
        ("v2", [USER, speak("assistant"), speak("tool", "", tool_call_id="a")], "2 (role 'tool')"),
        ("v2", [*[USER] * 10, speak("tool")], "10 (role 'tool')"),
        ("v3", [speak("system", "A"), speak("system", "B"), USER], "0 (role 'system')"),
        ("v3", [speak("developer", "A"), speak("system", "B")], "0 (role 'developer')"),
        ("developer", [speak("developer"), speak("assistant"), USER], "1 (role 'assistant')"),
    ],
)
def test_a_message_that_vanishes_is_refused_by_name(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[Message], lost: str
) -> None:
    with pytest.raises(ValueError) as error:
        render_chat(use(tokenizer, template), messages, True)
    assert str(error.value).startswith(f"messages: nothing of message {lost} reaches the prompt")


def test_what_a_template_refuses_is_said_in_its_words(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="refuses them: Unknown role: tool"):
        render_chat(use(tokenizer, "strict"), [speak("tool")], True)
    with pytest.raises(ValueError, match="refuses them: not OK"):
        render_chat(use(tokenizer, "picky"), [speak("assistant", "no")], True)


def test_the_server_refuses_it_too(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.engine.tokenizer, "chat_template", TEMPLATES["v2"])
    api: Api = local.api
    for path in ("/v1/chat/completions", "/tokenize"):
        body = {"messages": [USER, speak("tool")], "max_tokens": 1}
        check_error(api.post(body, path), 400, "nothing of message 1 (role 'tool')", "messages")
    tokens = [
        api.post({"messages": [speak(role), USER]}, "/tokenize").json()["tokens"]
        for role in ("system", "developer")
    ]
    assert tokens[0] == tokens[1]
