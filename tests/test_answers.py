"""What answers have beside their text, and how long ones are made: offsets of tokens,
log-probabilities that are not finite, prompts as /metrics counts them, work outside the event loop.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from servers import BOS, Local, wait_until
from tokenizers import Tokenizer

from minidcp.request import TokenLogprobs
from minidcp.worker import sampler
from minidcp_server import generation
from minidcp_server.json_pieces import PIECE_BYTES, JsonList, join_pieces, write_json
from minidcp_server.logprobs import LogprobsFormatter, Position
from minidcp_server.side_work import SHIFT_SECONDS, SideWorker

pytest_plugins = ["servers"]
EOS = 1
TEXT = "Once upon a time: naïve 日本 🙂🙂, he said."


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def complete(local: Local, prompt: object = TEXT, **fields: object) -> Any:
    """The only choice of a completion, whose JSON has nothing that is only Python's."""
    response = local.api.post(local.api.body(prompt, **fields))
    assert response.status_code == 200, response.text
    return json.loads(response.text, parse_constant=refuse)["choices"][0]


def stream(local: Local, prompt: object = TEXT, **fields: object) -> list[Any]:
    lines = local.api.post(local.api.body(prompt, stream=True, **fields)).text.split("\n\n")
    events = [line.removeprefix("data: ") for line in lines[:-2]]
    return [json.loads(event, parse_constant=refuse)["choices"][0] for event in events]


@pytest.mark.parametrize("as_ids", [False, True])
def test_offsets_of_an_echoed_prompt(local: Local, tokenizer: Tokenizer, as_ids: bool) -> None:
    """BOS has no text, and the tokens of one character begin where it does, as tokenizers says."""
    encoding = tokenizer.encode(TEXT)
    expected = [start for start, _ in encoding.offsets]
    assert encoding.ids[0] == BOS and max(map(expected.count, expected)) > 2
    choice = complete(local, encoding.ids if as_ids else TEXT, echo=True, logprobs=1)
    offsets = choice["logprobs"]["text_offset"]
    assert offsets[: len(expected)] == expected
    assert offsets[len(expected)] == len(TEXT)
    first, *others = stream(local, encoding.ids if as_ids else TEXT, echo=True, logprobs=1)
    streamed = [
        *first["logprobs"]["text_offset"],
        *(c["logprobs"]["text_offset"][0] for c in others),
    ]
    assert streamed == offsets


def test_offsets_of_special_tokens_that_are_shown(local: Local, tokenizer: Tokenizer) -> None:
    names = [tokenizer.id_to_token(token) for token in (BOS, EOS)]
    ids = [BOS, *tokenizer.encode("one", add_special_tokens=False).ids, EOS, BOS]
    for fields, text in (
        (dict(), "one"),
        (dict(skip_special_tokens=False), f"{names[0]}one{names[1]}{names[0]}"),
    ):
        choice = complete(local, ids, echo=True, logprobs=0, max_tokens=1, **fields)
        assert choice["text"].startswith(text)
        offsets = choice["logprobs"]["text_offset"][:-1]
        shown = [names[0] in text, *[True] * (len(ids) - 3), names[0] in text, names[0] in text]
        for token, offset, is_shown in zip(ids, offsets, shown, strict=True):
            spelled = tokenizer.decode([token], skip_special_tokens=False)
            assert text[offset:].startswith(spelled) == is_shown
    literal = f"one{names[1]}two"  # a client may write a special token as text
    choice = complete(local, literal, echo=True, logprobs=0)
    assert choice["logprobs"]["text_offset"][:4] == [
        0,
        *[s for s, _ in tokenizer.encode(literal).offsets][1:4],
    ]


def test_offsets_of_text_that_was_held_back(local: Local) -> None:
    """Text that may become a stop string comes late, and stands where it would without."""
    plain = complete(local, max_tokens=30, logprobs=0)
    text = plain["text"]
    stops = [text[start : start + 6] + "never" for start in range(0, len(text) - 6, 3)]
    held = complete(local, max_tokens=30, logprobs=0, stop=stops[:4])
    assert held["text"] == text
    assert held["logprobs"]["text_offset"] == plain["logprobs"]["text_offset"]
    columns = (plain["logprobs"]["tokens"], plain["logprobs"]["text_offset"])
    for token, offset in zip(*columns, strict=True):
        assert text[offset:].startswith(token) or "\ufffd" in token


def test_offsets_of_sampled_characters_and_special_tokens(
    local: Local, tokenizer: Tokenizer
) -> None:
    """The tokens are forced: two of one character, then EOS, then a letter."""
    ids = tokenizer.encode("é!", add_special_tokens=False).ids
    assert len(ids) == 3
    forced = [*ids[:2], EOS, ids[2]]
    offsets = []
    for num_known in range(len(forced)):
        bias = {str(forced[num_known]): 100}
        prompt = [BOS, 5, *forced[:num_known]]
        choice = complete(local, prompt, echo=True, logprobs=0, max_tokens=1, logit_bias=bias)
        offsets.append(choice["logprobs"]["text_offset"])
    base = offsets[-1][2]
    assert offsets[-1][2:] == [base, base, base + 1, base + 1]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_logprobs_that_are_not_finite(
    local: Local, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    original = sampler.compute_logprobs

    def spoil(*args: Any) -> sampler.Logprobs:
        chosen, ids, values = original(*args)
        return sampler.Logprobs(chosen.fill_(value), ids, values.fill_(value))

    monkeypatch.setattr(sampler, "compute_logprobs", spoil)
    for _ in range(2):
        entries = complete(local, echo=True, logprobs=2)["logprobs"]
        assert set(entries["token_logprobs"][1:]) == {-9999.0}
        assert set(entries["top_logprobs"][1].values()) == {-9999.0}
        assert stream(local, logprobs=2)[0]["logprobs"]["token_logprobs"] == [-9999.0]
        answer = local.api.chat(
            [{"role": "user", "content": "one"}], logprobs=True, top_logprobs=2, max_tokens=2
        )
        first = answer.choices[0].logprobs.content[0]
        assert first.logprob == first.top_logprobs[1].logprob == -9999.0
    logged = [record for record in caplog.records if "NaN" in record.message]
    assert len(logged) == (1 if value != value else 0)


def read_counter(local: Local, name: str) -> float:
    for family in text_string_to_metric_families(local.api.http.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name:
                return sample.value
    raise AssertionError(f"no metric {name}")


def test_prompts_count_once(local: Local) -> None:
    """Also those whose request is preempted, and computed again."""
    scheduler = local.engine.scheduler
    before = read_counter(local, "vllm:prompt_tokens_total")
    computed_before = local.engine.stats.prompt_tokens
    done = threading.Event()

    def preempt() -> None:
        """In the engine's thread: between two steps, once the request has some tokens."""
        running = scheduler.running
        if running and running[-1].num_outputs > 3 and not done.is_set():
            scheduler.preempt(running[-1])
            done.set()

    schedule = scheduler.schedule
    scheduler.schedule = lambda: (preempt(), schedule())[1]
    try:
        usage = local.api.complete([BOS, *range(5, 25)], max_tokens=12).usage
    finally:
        scheduler.schedule = schedule
    assert done.is_set() and usage.completion_tokens == 12
    assert local.engine.stats.prompt_tokens - computed_before > usage.prompt_tokens
    assert read_counter(local, "vllm:prompt_tokens_total") - before == usage.prompt_tokens
    assert local.api.http.get("/load").json()["prompt_tokens"] == before + usage.prompt_tokens


@pytest.mark.parametrize(("logprobs", "num_steps"), [(None, 0), (1, 1)])
def test_steps_of_an_echo_of_no_tokens(local: Local, logprobs: int | None, num_steps: int) -> None:
    """Log-probabilities take one step, in which the prompt is computed. Text alone takes none."""
    for fetch in (complete, lambda *args, **fields: stream(*args, **fields)[-1]):
        wait_until(local.is_idle, 5, "requests of another test are left")
        before = local.engine.stats.steps
        choice = fetch(local, TEXT, echo=True, max_tokens=0, logprobs=logprobs)
        assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
        wait_until(local.is_idle, 5, "the request has not ended")
        assert local.engine.stats.steps - before == num_steps


def test_the_text_of_a_token_is_found_once() -> None:
    asked: list[int] = []

    class Service:
        def token_text(self, token: int) -> str:
            asked.append(token)
            return f"<{token}>"

        def token_bytes(self, token: int) -> list[int]:
            return [token]

    formatter = LogprobsFormatter(Service())
    positions = [Position(5, 0, TokenLogprobs(5, -1.0, ((6, -0.5), (5, -1.0))))] * 3
    assert (
        formatter.format_completion(positions)["top_logprobs"] == [{"<6>": -0.5, "<5>": -1.0}] * 3
    )
    assert formatter.format_chat(positions)["content"][2]["bytes"] == [5]
    assert sorted(asked) == [5, 6]


@pytest.mark.parametrize("echo", [False, True])
def test_many_logprobs_are_formatted_outside_the_event_loop(
    local: Local, monkeypatch: pytest.MonkeyPatch, echo: bool
) -> None:
    monkeypatch.setattr(generation, "MAX_LOGPROBS_AT_ONCE", 20)
    threads: list[str] = []
    original = generation.CompletionGeneration.format_logprobs

    def note(self: generation.CompletionGeneration, positions: Any) -> Any:
        threads.append(threading.current_thread().name)
        return original(self, positions)

    monkeypatch.setattr(generation.CompletionGeneration, "format_logprobs", note)
    few = complete(local, logprobs=1, max_tokens=3)
    assert not any("side work" in name for name in threads)
    threads.clear()
    prompt = [BOS, *range(5, 100)]
    many = complete(local, prompt, n=8, logprobs=20, max_tokens=4, echo=echo)
    assert any("side work" in name for name in threads)
    assert len(few["logprobs"]["tokens"]) == 3
    num_echoed = len(prompt) if echo else 0
    assert {len(column) for column in many["logprobs"].values()} == {num_echoed + 4}
    chunks = stream(local, prompt, logprobs=20, max_tokens=4, echo=echo)
    assert len(chunks[0]["logprobs"]["tokens"]) == num_echoed + 1


def test_side_work_lets_the_event_loop_run() -> None:
    def work() -> Iterator[bytes]:
        for number in range(20):
            time.sleep(SHIFT_SECONDS / 4)
            yield b"%d" % number

    async def run() -> int:
        num_turns = 0
        working = asyncio.create_task(SideWorker().run(work()))
        while not working.done():
            num_turns += 1
            await asyncio.sleep(0)
        assert await working == [b"%d" % number for number in range(20)]
        return num_turns

    assert asyncio.run(run()) > 20


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def with_encoded_lists(value: Any) -> Any:
    """The same value, but its lists are encoded in two parts."""
    if isinstance(value, dict):
        return {name: with_encoded_lists(item) for name, item in value.items()}
    if isinstance(value, list):
        encoded = JsonList()
        encoded.extend(value[:1])
        encoded.extend(value[1:])
        return encoded
    return value


@given(JSON)
def test_json_in_pieces_is_the_same_json(value: Any) -> None:
    assert json.loads(b"".join(write_json(value))) == value
    assert json.loads(b"".join(join_pieces(write_json(with_encoded_lists(value))))) == value


def test_long_answers_are_sent_in_pieces(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    original = generation.respond_in_pieces

    def note(pieces: list[bytes]) -> Any:
        sent.extend(map(len, pieces))
        return original(pieces)

    monkeypatch.setattr(generation, "respond_in_pieces", note)
    response = local.api.post(local.api.body([5] * 200, echo=True, logprobs=20, n=2, max_tokens=2))
    assert len(sent) > 2 and max(sent) < 2 * PIECE_BYTES
    assert int(response.headers["content-length"]) == sum(sent) == len(response.content)
    assert [len(c["logprobs"]["tokens"]) for c in response.json()["choices"]] == [202, 202]
