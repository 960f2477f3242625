"""Bodies parsed in pieces, against Python's own parser; how little of wrong ones is looked at."""

from __future__ import annotations

import json
import random

import pytest
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from minidcp.config import shorten
from minidcp.request import SamplingParams
from minidcp_server import json_body
from minidcp_server.json_body import MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES, IntList, parse_large
from minidcp_server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest

TEXTS = ["", "x", '"', "\\", '\\\\"', "a,b:[{]}", "\ud83d", "中", "😀" * 5, "z" * 50]
SCALARS = [1, -2.5, 10**20, True, None, *TEXTS]
MARKS = [b",", b"[", b"]", b"{", b"}", b":", b'"', b"\\", b" ", b"1", b""]


def make_value(rng: random.Random, depth: int = 0) -> object:
    kind = rng.random()
    size = rng.choice([0, 1, 2, 5])
    if depth < 4 and kind < 0.35:
        return [make_value(rng, depth + 1) for _ in range(size)]
    if depth < 4 and kind < 0.6:
        return {rng.choice(TEXTS): make_value(rng, depth + 1) for _ in range(size)}
    return rng.choice(SCALARS)


def make_body(rng: random.Random) -> bytes:
    value = [make_value(rng), make_value(rng)]
    indent = rng.choice([None, None, 1, 5])
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=indent)
    return text.encode(errors="replace")


def damage(body: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(body)
    for _ in range(rng.choice([1, 1, 2, 4])):
        start = rng.randrange(len(damaged) + 1)
        damaged[start : start + rng.choice([0, 1])] = rng.choice(MARKS)
    return bytes(damaged)


@pytest.mark.parametrize("seed", range(5))
def test_pieces_make_what_the_whole_makes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    num_refused = 0
    for i in range(200):
        monkeypatch.setattr(json_body, "PIECE_BYTES", rng.choice([1, 2, 8, 20, 60]))
        monkeypatch.setattr(json_body, "WINDOW_BYTES", rng.choice([1, 2, 3, 7, 64, 1000]))
        body = make_body(rng)
        if i % 2:
            body = damage(body, rng)
        try:
            expected = repr(json.loads(body))
        except ValueError:
            num_refused += 1
            with pytest.raises((ValueError, HTTPException)):
                parse_large(body)
        else:
            assert repr(parse_large(body)) == expected, body
    assert 25 < num_refused < 100


def test_no_piece_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else runs while a piece is parsed."""
    sizes = []

    def parse_piece(piece: bytes) -> object:
        sizes.append(len(piece))
        return json.loads(piece)

    monkeypatch.setattr(json_body, "parse_piece", parse_piece)
    messages = [{"role": "user", "content": "a" * 1000}] * 1000
    content = {"prompt": [[*range(50_000)], [7] * 9], "messages": messages, "n": 1}
    body = json.dumps(content, indent=2).encode()
    assert parse_large(body) == content
    assert max(sizes) <= json_body.PIECE_BYTES + 2  # and the brackets around it


def test_byte_order_marks_are_skipped() -> None:
    for size in (1, 100_000):
        body = b"\xef\xbb\xbf" + json.dumps("a" * size).encode()
        assert parse_large(body) == "a" * size


TOO_MUCH = [
    (b"[" + b"1," * MAX_VALUES + b"1]", f"too many values, at most {MAX_VALUES}"),
    (b"[" + b"[]," * MAX_CONTAINERS + b"1]", f"at most {MAX_CONTAINERS}"),
    (b"{" + b'"a":1,' * MAX_CONTAINERS + b'"a":1}', f"at most {MAX_CONTAINERS}"),
    (b"[" * 1_000_000, f"too many levels of lists and objects, at most {MAX_DEPTH}"),
    (b"[" * 5_000, f"too many levels of lists and objects, at most {MAX_DEPTH}"),
    (b"1" * 1_000_000, "a number with too many digits"),
    (b"1" * 5_000, "a number with too many digits"),
]


@pytest.mark.parametrize(("body", "words"), TOO_MUCH, ids=[words for _, words in TOO_MUCH])
def test_what_holds_too_much_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(HTTPException) as refused:
        parse_large(body)
    assert refused.value.status_code == 400
    assert words in refused.value.detail


def test_commas_in_strings_do_not_count() -> None:
    assert parse_large(b'["' + b',\\"[{:' * MAX_VALUES + b'"]') == [',"[{:' * MAX_VALUES]


MANY = 100_000
WRONG_LISTS = [
    (CompletionRequest, {"prompt": [1.5] * MANY}),
    (CompletionRequest, {"prompt": ["a", *[1] * 4000]}),
    (CompletionRequest, {"prompt": [[1.5]] * 4000}),
    (CompletionRequest, {"prompt": [[1.5] * MANY]}),
    (CompletionRequest, {"prompt": "a", "stop": [1] * 64}),
    (CompletionRequest, {"prompt": "a", "stop": [1] * MANY}),
    (CompletionRequest, {"prompt": "a", "stop_token_ids": ["x"] * 1000}),
    (ChatRequest, {"messages": [1] * 4000}),
    (ChatRequest, {"messages": [{"role": "user", "content": [1] * MANY}]}),
    (DetokenizeRequest, {"tokens": ["a"] * MANY}),
]


@pytest.mark.parametrize(("model", "body"), WRONG_LISTS, ids=lambda value: repr(value)[:60])
def test_the_first_wrong_item_ends_the_check(model: type, body: dict) -> None:
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    assert refused.value.error_count() <= 2


@pytest.mark.parametrize("count", [1, 100, 40_000, MANY])
def test_integers_are_looked_at_in_the_parser_s_thread_only(count: int) -> None:
    """Millions of them would keep the event loop for a twentieth of a second."""
    text = "5, " * (count - 1) + "5"
    body = parse_large(f'{{"a": [{text}], "b": [[{text}], [{text}, "c"], [{text}, 5.0]]}}'.encode())
    inner, *mixed = body["b"]
    is_large = len(text) * 5 > json_body.PIECE_BYTES
    for ids in (body["a"], inner):
        assert ids == [5] * count
        assert isinstance(ids, IntList) == is_large
    assert [type(items) for items in mixed] == [list, list]
    if is_large:
        assert DetokenizeRequest.model_validate({"tokens": body["a"]}).tokens is body["a"]
        assert CompletionRequest.model_validate({"prompt": [inner]}).prompt[0] is inner
    for items, words in zip(mixed, ("tokens", "tokens: an item is not an integer"), strict=True):
        if count >= 40_000:
            with pytest.raises(ValidationError, match=words):
                DetokenizeRequest.model_validate({"tokens": items})


def test_parameters_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    check = SamplingParams.__post_init__
    monkeypatch.setattr(
        SamplingParams, "__post_init__", lambda self: (checks.append(self), check(self))
    )
    body = CompletionRequest(prompt="a", n=128, seed=5, logit_bias={7: 1})
    samples = body.make_sampling_params({})
    assert len(checks) == 1
    assert len({params.seed for params in samples}) == 128
    assert all(params.logit_bias == {7: 1} for params in samples)


class Unprintable(dict):
    def __repr__(self) -> str:
        raise AssertionError("a message was made although nothing is wrong")


def test_messages_are_made_only_where_something_is_wrong() -> None:
    SamplingParams(logit_bias=Unprintable({5: 1.0}))


def test_messages_are_short() -> None:
    large = {str(number): number for number in range(100_000)}
    for value in (large, list(large), "a" * 100_000, [large] * 1000):
        assert len(shorten(value)) < 1000
    assert shorten({"b": [1, 2], "a": 2}) in ("{'b': [1, 2], 'a': 2}", "{'a': 2, 'b': [1, 2]}")
    assert shorten(large) == "{'0': 0, '1': 1, '2': 2, '3': 3, ...}"
    with pytest.raises(ValueError, match="logit_bias") as refused:
        SamplingParams(logit_bias=large)
    assert len(str(refused.value)) < 1000
