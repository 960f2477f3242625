"""What clients of one server share, over HTTP: the prefix cache, and turns."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers import BOS, PROMPT, Api, Local, check_error, wait_until

from minidcp.engine.scheduler import ScheduledStep, Scheduler

pytest_plugins = ["servers"]
TOKENS_PER_BLOCK = 16


@pytest.fixture
def api(local: Local) -> Iterator[Api]:
    wait_until(local.is_idle, 20, "requests of another test are left")
    yield local.api


def count_cached(api: Api, prompt: list[int], salt: str | None) -> int:
    body = api.body(prompt, max_tokens=1, cache_salt=salt)
    answer = api.post(body)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_different_salts_share_nothing(api: Api) -> None:
    prompt = [BOS, *range(5, 5 + 3 * TOKENS_PER_BLOCK)]
    salts = ["tenant a", "tenant b", None, "tenant ab"]
    for salt in salts:
        assert count_cached(api, prompt, salt) == 0
    for salt in salts:
        assert count_cached(api, prompt, salt) == 3 * TOKENS_PER_BLOCK


def test_salts_change_no_token_and_count_in_chats(api: Api) -> None:
    texts = {
        api.post(api.body(cache_salt=s)).json()["choices"][0]["text"] for s in (None, "a", "ä")
    }
    assert len(texts) == 1

    messages = [{"role": "user", "content": "Tell me a story. " * 20}]
    cached = []
    for salt in ("chat a", "chat b", "chat a"):
        body = dict(messages=messages, max_tokens=1, cache_salt=salt)
        answer = api.post(body, "/v1/chat/completions")
        cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


@pytest.mark.parametrize("salt", ["", "x" * 1025, 5, ["a"]])
def test_salts_that_are_refused(api: Api, salt: object) -> None:
    response = api.post(api.body(cache_salt=salt))
    check_error(response, 400, "cache_salt", param="cache_salt")
    assert "xxx" not in response.text


@pytest.mark.parametrize(("num_prompts", "n"), [(1, 2), (2, 1)])
def test_a_prompt_is_computed_once(local: Local, api: Api, num_prompts: int, n: int) -> None:
    """For two samples, and for two equal prompts. Both run at once here."""
    prompt = [BOS, *range(5, 204)]
    before = local.engine.stats.prompt_tokens
    salt = f"{num_prompts} prompts"  # what other tests have left is not used
    answer = api.post(api.body([prompt] * num_prompts, n=n, max_tokens=9, cache_salt=salt))
    texts = [choice["text"] for choice in answer.json()["choices"]]
    assert len(texts) == 2
    assert texts[0] == texts[1]
    num_shared = (len(prompt) - 1) // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK
    assert local.engine.stats.prompt_tokens - before == 2 * len(prompt) - num_shared


def test_one_prompt_beside_a_large_batch(
    local: Local, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client with one prompt is served while many of another's 40 prompts still wait."""
    num_waiting = []
    schedule = Scheduler.schedule

    def note_admissions(scheduler: Scheduler) -> ScheduledStep | None:
        step = schedule(scheduler)
        for request in step.admitted if step is not None else ():
            if len(request.prompt_token_ids) == 3:
                num_waiting.append(len(scheduler.waiting))
        return step

    monkeypatch.setattr(Scheduler, "schedule", note_admissions)
    batch = api.body([PROMPT] * 40)
    with ThreadPoolExecutor(1) as executor:
        answer = executor.submit(api.post, batch)
        wait_until(lambda: local.num_unfinished() > 30, 20, "the batch does not run")
        assert len(api.complete([BOS, 5, 6], max_tokens=1).choices) == 1
        assert len(answer.result().json()["choices"]) == 40
    assert len(num_waiting) == 1
    assert num_waiting[0] > 10  # first come, first served: 0
