"""Calls in a model's text: the parser, cut at every place, against the patterns by which vLLM finds
calls; and what chat templates do with tools."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_files import make_v2
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minidcp import SamplingParams
from minidcp.engine.detokenizer import Detokenizer
from minidcp_server.chat_template import TraitsFinder, render_chat
from minidcp_server.template_tools import prepare_calls
from minidcp_server.tool_calls import (
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    JSON_LINES,
    NOTATIONS,
    Notation,
    Piece,
    TextPiece,
    ToolCallParser,
    join_calls,
    join_text,
)
from minidcp_server.tools import Markers, ToolFields, choose_tool_use

# As vLLM 0.33 has them in its parsers deepseek_v3 and deepseek_v31.
VLLM_PATTERNS = {
    "deepseek_v3": re.compile(
        r"<｜tool▁call▁begin｜>(?P<type>.*?)<｜tool▁sep｜>(?P<name>.*?)\n```json\n"
        r"(?P<arguments>.*?)\n```<｜tool▁call▁end｜>",
        re.DOTALL,
    ),
    "deepseek_v31": re.compile(
        r"<｜tool▁call▁begin｜>(?P<name>.*?)<｜tool▁sep｜>(?P<arguments>.*?)<｜tool▁call▁end｜>",
        re.DOTALL,
    ),
}
ALL = [DEEPSEEK_V3, DEEPSEEK_V31, JSON_LINES]
MARKERS = sorted(
    {
        marker
        for notation in ALL
        for marker in (
            notation.begin,
            notation.head,
            notation.separator,
            notation.tail,
            notation.end,
        )
        if marker
    }
)

NAMES = st.from_regex(r"[a-z_][\w.-]{0,8}", fullmatch=True)
ARGUMENTS = st.sampled_from(
    ['{"city": "Köln"}', "{}", '{"a": [1, {"b": "}\\n"}]}', '{"text": "`` <｜tool"}']
)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3)
TEXTS = st.text("ab <｜tool▁\n`", max_size=12)


def parse(notation: Notation, *parts: str, **options: Any) -> list[Piece]:
    parser = ToolCallParser(notation, **options)
    pieces = []
    for part in parts:
        pieces += parser.feed(part)
    return pieces + parser.flush()


def summarize(pieces: list[Piece]) -> tuple[str, list[tuple[int, str | None, str]]]:
    calls = [(call.index, call.name, call.arguments) for call in join_calls(pieces)]
    return join_text(pieces), calls


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("notation", [DEEPSEEK_V3, DEEPSEEK_V31], ids=lambda n: n.name)
@given(CALLS, TEXTS, TEXTS, st.lists(st.integers(0, 1000)))
def test_calls_that_vllm_finds(
    notation: Notation,
    calls: list[tuple[str, str]],
    before: str,
    after: str,
    places: list[int],
) -> None:
    text = before + notation.write(calls) + after
    expected = [
        (index, found["name"], found["arguments"])
        for index, found in enumerate(VLLM_PATTERNS[notation.name].finditer(text))
    ]
    assert [(name, arguments) for _, name, arguments in expected] == calls
    for parts in ([text], list(text), cut(text, places)):
        assert summarize(parse(notation, *parts)) == (before + after, expected)


@given(CALLS, st.lists(st.integers(0, 1000)))
def test_calls_on_lines_of_json(calls: list[tuple[str, str]], places: list[int]) -> None:
    text = JSON_LINES.write(calls)
    expected = ("", [(index, *call) for index, call in enumerate(calls)])
    for parts in ([text], list(text), cut(text, places)):
        assert summarize(parse(JSON_LINES, *parts)) == expected


@pytest.mark.parametrize("notation", ALL, ids=lambda n: n.name)
@given(
    st.lists(st.sampled_from([*MARKERS, "f", "7", '"', " ", "\n", "<｜tool▁ca", "`"]), max_size=12),
    st.lists(st.integers(0, 1000)),
)
def test_any_text_in_any_pieces(
    notation: Notation, fragments: list[str], places: list[int]
) -> None:
    """Nothing depends on the cuts; nothing is lost but markers, and white space around calls."""
    text = "".join(fragments)
    whole = summarize(parse(notation, text))
    assert summarize(parse(notation, *text)) == whole
    assert summarize(parse(notation, *cut(text, places))) == whole
    if not whole[1]:
        assert whole[0] == text
    kept = whole[0] + "".join(f"{name}{arguments}" for _, name, arguments in whole[1])
    assert kept.count("7") == text.count("7")  # which no marker has


def test_the_order_of_pieces() -> None:
    """The name comes as soon as it is known, then arguments as they come."""
    parser = ToolCallParser(DEEPSEEK_V31)
    seen = []
    for part in (
        "Yes",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f",
        "<｜tool▁sep｜>",
        '{"a"',
        ": 1}",
    ):
        seen.append(summarize(parser.feed(part)))
    call = (0, None)
    assert seen == [
        ("Yes", []),
        ("", []),
        ("", [(0, "f", "")]),
        ("", [(*call, '{"a"')]),
        ("", [(*call, ": 1}")]),
    ]
    ids = {piece.id for piece in parser.feed("more") if not isinstance(piece, TextPiece)}
    assert len(ids) == 1 and re.fullmatch("call_[0-9a-f]{24}", ids.pop())


MALFORMED = [
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>",
    "<｜tool▁calls▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜><｜tool▁sep｜>{}",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>a b<｜tool▁sep｜>{}",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>" + "f" * 200 + "<｜tool▁sep｜>{}",
    "<｜tool▁calls▁begin｜>" + " " * 65 + "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}",
    "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
]


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
@pytest.mark.parametrize("notation", [DEEPSEEK_V3, DEEPSEEK_V31], ids=lambda n: n.name)
def test_what_is_no_call_is_text(notation: Notation, text: str) -> None:
    for parts in ([text], list(text)):
        assert summarize(parse(notation, *parts)) == (text, [])


def test_calls_that_are_cut_short_or_not_wanted() -> None:
    two = DEEPSEEK_V31.write([("f", '{"a": 1}'), ("g", "")])
    assert summarize(parse(DEEPSEEK_V31, two)) == ("", [(0, "f", '{"a": 1}'), (1, "g", "{}")])
    assert summarize(parse(DEEPSEEK_V31, two, max_calls=1)) == ("", [(0, "f", '{"a": 1}')])
    cut_text = two[: two.index("1}") + 1]
    assert summarize(parse(DEEPSEEK_V31, cut_text)) == ("", [(0, "f", '{"a": 1')])
    unfinished = two.removesuffix("<｜tool▁calls▁end｜>") + "\n"
    assert summarize(parse(DEEPSEEK_V31, unfinished))[0] == ""


# Templates, written as the real ones are as far as calls go.

CALL_V3 = (
    "<｜tool▁call▁begin｜>{{ call.type }}<｜tool▁sep｜>{{ call.function.name }}\n```json\n"
    "{{ ARGUMENTS }}\n```<｜tool▁call▁end｜>"
)
CALL_V31 = (
    "<｜tool▁call▁begin｜>{{ call.function.name }}<｜tool▁sep｜>{{ ARGUMENTS }}<｜tool▁call▁end｜>"
)
TEXT = "{{ '' + call.function.arguments }}"  # fails for a dict
DICT = "{{ call.function.arguments | tojson }}"
LOOP = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<U>{{ m.content }}{% elif m.role == 'tool' %}<T>{{ m.content }}"
)
BEGIN = "<｜tool▁calls▁begin｜>{% for call in m.tool_calls %}"
END = "{% endfor %}<｜tool▁calls▁end｜>"
REST = "{% elif m.role == 'assistant' %}<A>{{ m.content }}{% endif %}{% endfor %}"


def make_template(call: str, arguments: str, condition: str, content: str, tools: str = "") -> str:
    call = call.replace("{{ ARGUMENTS }}", arguments)
    branch = "{% elif m.role == 'assistant' and CONDITION %}<A>".replace("CONDITION", condition)
    return tools + LOOP + branch + content + BEGIN + call + END + REST


LISTED = "{% if tools %}{{ tools | tojson }}{% endif %}"
ANY_CONTENT = "{% if m.content is not none %}{{ m.content }}{% endif %}"
HERMES = (
    LISTED + LOOP + "{% elif m.role == 'assistant' %}<A>{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{% endif %}{% endfor %}"
)
# The template, and its lists_tools, notation, takes_text and no_content.
TEMPLATES: dict[str, tuple[str, tuple[bool, str | None, bool, str | None]]] = {
    # DeepSeek-V3 as it first was, and R1: calls only where the content is null.
    "v3": (
        make_template(CALL_V3, TEXT, "m.content is none", ""),
        (False, "deepseek_v3", True, None),
    ),
    # DeepSeek-V3-0324
    "v3-0324": (
        make_template(CALL_V3, TEXT, "'tool_calls' in m", ANY_CONTENT),
        (False, "deepseek_v3", True, None),
    ),
    # What vLLM ships for R1: it lists tools, and fails where the content is null.
    "r1-vllm": (
        make_template(CALL_V3, DICT, "m.tool_calls is defined", "{{ '' + m.content }}", LISTED),
        (True, "deepseek_v3", False, ""),
    ),
    "v31": (
        make_template(CALL_V31, TEXT, "m.tool_calls is defined", ANY_CONTENT),
        (False, "deepseek_v31", True, None),
    ),
    "hermes": (HERMES, (True, None, False, "")),
    "v2": (LOOP.split("{% elif m.role == 'tool'")[0] + REST, (False, None, False, None)),
}

FUNCTION = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOL = {"type": "function", "function": FUNCTION}
USER = {"role": "user", "content": "Hi"}
ARGUMENTS_TEXT = '{"city": "Köln"}'


def call_message(content: str | None, *names: str) -> dict[str, Any]:
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": n, "arguments": ARGUMENTS_TEXT}}
        for i, n in enumerate(names)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=make_v2())


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_does_with_tools(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    template, expected = TEMPLATES[name]
    tokenizer.chat_template = template
    traits = TraitsFinder("auto").find(tokenizer)
    notation = traits.notation.name if traits.notation is not None else None
    assert (traits.lists_tools, notation, traits.takes_text, traits.no_content) == expected
    assert traits.takes_system


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "v2"])
@pytest.mark.parametrize("content", [None, "", "Let me see."])
def test_earlier_calls_reach_the_prompt_as_the_model_writes_them(
    tokenizer: PreTrainedTokenizerBase, name: str, content: str | None
) -> None:
    tokenizer.chat_template, (_, notation, _, _) = TEMPLATES[name]
    traits = TraitsFinder("auto").find(tokenizer)
    messages = [USER, call_message(content, "f"), {"role": "tool", "content": "42"}, USER]
    text = render_chat(tokenizer, prepare_calls(messages, traits), False)
    if notation is not None:
        assert NOTATIONS[notation].write([("f", ARGUMENTS_TEXT)]) + "<T>42" in text
    assert ARGUMENTS_TEXT in text
    assert "None" not in text
    assert text.count("Let me see.") == (content == "Let me see.")


def test_tools_reach_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    for name, (template, (lists_tools, notation, _, _)) in TEMPLATES.items():
        tokenizer.chat_template = template
        traits = TraitsFinder("auto").find(tokenizer)
        use = choose_tool_use(ToolFields(tools=[TOOL]), traits, tokenizer)
        text = render_chat(tokenizer, [USER], False, use.tools, use.description)
        if lists_tools:
            expected = tokenizer.apply_chat_template([USER], tools=use.tools, tokenize=False)
            assert text == expected and use.description is None
        assert ("get_weather" in text) == (lists_tools or notation is not None), name

    tokenizer.chat_template, _ = TEMPLATES["v2"]  # which knows nothing of tools
    traits = TraitsFinder("auto").find(tokenizer)
    forced = ToolFields(tools=[TOOL], tool_choice="required")
    use = choose_tool_use(forced, traits, tokenizer)
    assert use.notation is JSON_LINES
    system = {"role": "system", "content": "Be brief."}
    text = render_chat(tokenizer, [system, USER], False, use.tools, use.description)
    assert text.startswith("Be brief.\n\n## Tools\n") and text.endswith("Schema<U>Hi")
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}" + (
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"^tool_choice 'required': .* --chat-template"):
        choose_tool_use(forced, TraitsFinder("auto").find(tokenizer), tokenizer)


def test_the_option_overrides_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template, _ = TEMPLATES["hermes"]
    for option, notation in (("deepseek_v3", DEEPSEEK_V3), ("none", None)):
        assert TraitsFinder(option).find(tokenizer).notation is notation


# Special tokens.


@pytest.mark.parametrize("special", [True, False])
def test_markers_survive_and_other_special_tokens_do_not(special: bool) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_v2())
    names = ["calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"]
    tokens = [AddedToken(f"<｜tool▁{name}｜>", special=special) for name in names]
    tokenizer.add_tokens([*tokens, AddedToken("<｜pad｜>", special=True)])
    markers = Markers(tokenizer, DEEPSEEK_V3)
    text = DEEPSEEK_V3.write([("f", "{}")])
    parts = markers.split(text)
    begin, head, _, separator, *_ = parts
    ids = tokenizer.convert_tokens_to_ids([f"<｜tool▁{name}｜>" for name in names])
    assert (begin, head, separator) == (ids[0], ids[2], ids[4])
    assert sorted(markers.special_tokens) == (sorted(ids) if special else [])
    spelled = [tokenizer.decode([part]) if isinstance(part, int) else part for part in parts]
    assert "".join(spelled) == text

    tokenizer.chat_template, _ = TEMPLATES["v3"]
    none = ToolFields(tools=[TOOL], tool_choice="none")
    use = choose_tool_use(none, TraitsFinder("auto").find(tokenizer), tokenizer)
    assert use.banned_token == ids[0] and use.notation is None
    assert SamplingParams().with_tools(None, (), ids[0]).logit_bias == {ids[0]: -100}

    params = SamplingParams().with_tools(None, markers.special_tokens, None)
    detokenizer = Detokenizer(tokenizer, params)
    shown = f"<｜begin▁of▁sentence｜>Yes<｜pad｜>{text}<｜end▁of▁sentence｜>"
    streamed = [detokenizer.append(token) for token in tokenizer(shown)["input_ids"]]
    assert "".join(streamed) + detokenizer.flush() == f"Yes{text}"
