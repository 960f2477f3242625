"""LLM.generate: interrupts at any point, many threads, all forms of prompts, stuck ranks, seeds."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Oracle, make_prompt
from servers import demo, wait_until  # noqa: F401 -- `demo` is a fixture
from test_faults import children_of, is_alive, needs_proc

from minidcp import LLM, RequestOutput, SamplingParams
from minidcp.engine.executor import EngineDeadError
from minidcp.engine.reports import Reports
from minidcp.worker.model_runner import ModelRunner

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
OPTIONS: dict[str, Any] = dict(device="cpu", max_model_len=512)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def llm(v2: Oracle) -> Iterator[LLM]:
    before = threads_of_engines()
    with LLM(v2.path, ranks="threads", tp_size=2, dcp_size=2, **OPTIONS) as llm:
        yield llm
    wait_until(lambda: threads_of_engines() <= before, 10, "threads are left")


def threads_of_engines() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith(("LLM", "rank"))}


def is_idle(llm: LLM) -> bool:
    blocks = llm.engine.blocks
    is_whole = len(blocks.free) + len(blocks.cached) == blocks.num_blocks
    return not llm.engine.has_work and not blocks.live and is_whole


# Ctrl-C.


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th line of `generate` that this thread executes."""

    def __init__(self, line: int) -> None:
        self.lines_left = line

    def __call__(self, frame: FrameType, event: str, _: object) -> InterruptAt | None:
        if frame.f_globals["__name__"] not in ("minidcp.llm", "minidcp.engine.engine_thread"):
            return None
        if event == "line":
            self.lines_left -= 1
            if self.lines_left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("use_tqdm", [False, True])
def test_an_interrupt_at_any_line(llm: LLM, v2: Oracle, use_tqdm: bool) -> None:
    """At every line that the caller's thread executes. No other thread is ever interrupted."""
    prompts = v2.prompts[1:3]
    expected = [tokens[:8] for tokens in v2.tokens[1:3]]
    line = 0
    was_interrupted = True
    while was_interrupted:
        line += 1
        sys.settrace(InterruptAt(line))
        try:
            llm.generate(prompts, GREEDY, use_tqdm)
            was_interrupted = False
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        if line % 3 == 0:
            assert tokens_of(llm.generate(prompts, GREEDY)) == expected
    assert line > 30
    assert tokens_of(llm.generate(prompts, GREEDY)) == expected
    wait_until(lambda: is_idle(llm), 10, "interrupted requests are left")


SCRIPT = """
import os, random, signal, sys, threading, time
from minidcp import LLM, SamplingParams

path, ranks, end = sys.argv[1:]
params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
endless = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
prompts = [[5, 6, 7], list(range(2, 100)), [8]]
llm = LLM(path, device="cpu", ranks=ranks, tp_size=2, dcp_size=2, max_model_len=512)
expected = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
rng = random.Random(0)

def interrupt(seconds):
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGINT)

for trial in range(20):
    seconds = rng.choice([0.001, 0.02, 0.1]) * rng.random()
    try:
        threading.Thread(target=interrupt, args=[seconds]).start()
        llm.generate(prompts, endless)
        raise SystemExit("it was not interrupted")
    except KeyboardInterrupt:
        pass
    if trial % 2:
        got = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
        assert got == expected, (trial, got, expected)
print("right", flush=True)
try:
    threading.Thread(target=interrupt, args=[0.05]).start()
    llm.generate(prompts, endless)
except KeyboardInterrupt:
    if end == "uncaught":
        raise
    sys.exit(7)
"""


@pytest.mark.parametrize(
    ("ranks", "end", "code"), [("threads", "exit", 7), ("processes", "uncaught", -signal.SIGINT)]
)
def test_ctrl_c_at_random_times_then_an_exit_without_close(
    v2: Oracle, ranks: str, end: str, code: int
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(v2.path), ranks, end]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert result.stdout == "right\n", result.stderr
    assert result.returncode == code, result.stderr
    for words in ("terminate called", "Fatal", "Exception ignored"):
        assert words not in result.stderr


SLOW_STEP = """
import os, signal, sys, threading
import torch
import minidcp.engine.executor
from minidcp import LLM
from minidcp.worker.model_runner import ModelRunner

minidcp.engine.executor.STOP_SECONDS = 0.3
reached = threading.Event()

def execute(self, plan):
    reached.set()
    while True:
        torch.ones(100, 100) @ torch.ones(100, 100)

ModelRunner.execute = execute
llm = LLM(sys.argv[1], device="cpu", ranks="threads", tp_size=1, max_model_len=512)

def interrupt():
    reached.wait()
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    llm.generate([5])
except KeyboardInterrupt:
    sys.exit(7)
"""


def test_an_exit_in_the_middle_of_a_long_step(v2: Oracle) -> None:
    """A thread that still computes while the interpreter is torn down would abort the process."""
    command = [sys.executable, "-c", SLOW_STEP, str(v2.path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 7, result.stderr
    assert "terminate called" not in result.stderr


def test_a_step_is_noted_if_sending_it_raises(
    llm: LLM, v2: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No signal does this in the engine's thread. If anything does, steps still match results."""
    submit = llm.engine.executor.submit
    countdown = iter(range(4, -1, -1))

    def submit_and_raise(plan: Any) -> None:
        submit(plan)
        if next(countdown, None) == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.executor, "submit", submit_and_raise)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(v2.prompts[:3], GREEDY)
    assert tokens_of(llm.generate(v2.prompts[:3], GREEDY)) == [t[:8] for t in v2.tokens[:3]]
    wait_until(lambda: is_idle(llm), 10, "requests are left")


def test_a_command_that_reaches_some_ranks_only_ends_the_engine(
    v2: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(v2.path, ranks="threads", tp_size=2, dcp_size=2, **OPTIONS) as llm:
        connection = llm.engine.executor.connections[1]

        def interrupted(message: object) -> None:
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(connection, "send_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([5], GREEDY)
        with pytest.raises(EngineDeadError, match="a command has not reached every rank"):
            llm.generate([5], GREEDY)


# Several threads.


def test_many_threads(llm: LLM, v2: Oracle) -> None:
    """Each gets what it asked for, also while others make mistakes."""

    def complete(which: int) -> bool:
        prompts = [v2.prompts[(which + i) % len(v2.prompts)] for i in range(1 + which % 3)]
        tokens = [v2.tokens[(which + i) % len(v2.prompts)][:8] for i in range(1 + which % 3)]
        return all(tokens_of(llm.generate(prompts, GREEDY)) == tokens for _ in range(3))

    def make_mistakes(_: int) -> bool:
        for _ in range(10):
            with pytest.raises(ValueError, match="out of range"):
                llm.generate([[5, 6], [-1]], GREEDY)
        return True

    with ThreadPoolExecutor(10) as threads:
        rights = list(threads.map(complete, range(8)))
        mistakes = list(threads.map(make_mistakes, range(2)))
    assert all(rights) and all(mistakes)
    wait_until(lambda: is_idle(llm), 10, "requests are left")


def test_threads_run_together(llm: LLM, v2: Oracle) -> None:
    """Calls do not wait for each other: a short one ends while a long one runs."""
    with ThreadPoolExecutor(1) as thread:
        long = thread.submit(llm.generate, [5, 6], ENDLESS)
        wait_until(lambda: len(llm.engine.requests) == 1, 10, "the long call has not begun")
        assert tokens_of(llm.generate(v2.prompts[3], GREEDY)) == [v2.tokens[3][:8]]
        assert not long.done()
        assert len(tokens_of(long.result())[0]) == 400


def test_close_ends_the_calls_of_other_threads(v2: Oracle) -> None:
    llm = LLM(v2.path, ranks="threads", tp_size=2, dcp_size=2, **OPTIONS)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(llm.generate, [5 + i], ENDLESS) for i in range(2)]
        wait_until(lambda: len(llm.engine.requests) == 2, 10, "the calls have not begun")
        llm.close()
        for call in calls:
            with pytest.raises(EngineDeadError, match="the engine is closed"):
                call.result(10)
    with pytest.raises(EngineDeadError, match="the engine is closed"):
        llm.generate([5], GREEDY)
    llm.close()


# Prompts.

IDS = [5, 6, 7]


@pytest.mark.parametrize(
    "prompts",
    [
        IDS,
        tuple(IDS),
        range(5, 8),
        np.array(IDS),
        np.array(IDS, dtype=np.uint16),
        [np.int64(5), np.int32(6), 7],
        torch.tensor(IDS),
        list(torch.tensor(IDS)),
        {"prompt_token_ids": IDS},
        {"prompt_token_ids": np.array(IDS)},
        {"prompt_token_ids": tuple(IDS), "prompt": None},
        [IDS],
        [np.array(IDS)],
        np.array([IDS]),
        torch.tensor([IDS]),
        [{"prompt_token_ids": IDS}],
        ({"prompt_token_ids": [np.int64(i) for i in IDS]},),
    ],
    ids=repr,
)
def test_one_prompt_in_every_form(llm: LLM, prompts: Any) -> None:
    (output,) = llm.generate(prompts, GREEDY)
    assert output.prompt_token_ids == IDS
    assert all(type(token) is int for token in output.prompt_token_ids)
    assert output.prompt is None
    assert tokens_of([output]) == tokens_of(llm.generate([[5, 6, 7]], GREEDY))


def test_several_prompts_in_every_form(llm: LLM) -> None:
    outputs = llm.generate([IDS, {"prompt_token_ids": [8]}, np.array([9, 10]), (11,)], GREEDY)
    assert [output.prompt_token_ids for output in outputs] == [IDS, [8], [9, 10], [11]]
    assert [o.prompt_token_ids for o in llm.generate(np.array([[2, 3], [4, 5]]), GREEDY)] == [
        [2, 3],
        [4, 5],
    ]
    assert llm.generate([], GREEDY) == []


def test_dicts_with_texts(demo: Path) -> None:  # noqa: F811
    text = "Once upon a time"
    with LLM(demo, device="cpu", ranks="threads") as llm:
        plain, alone, both = llm.generate(
            [text, {"prompt": text}, {"prompt": text, "prompt_token_ids": [5, 6]}], GREEDY
        )
        (single,) = llm.generate({"prompt": text}, GREEDY)
    for output in (alone, single):
        assert output.prompt == text and output.prompt_token_ids == plain.prompt_token_ids
        assert output.outputs == plain.outputs
    assert both.prompt == text and both.prompt_token_ids == [5, 6]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({"prompt_tokens": [5]}, "'prompt_tokens'; possible are 'prompt' and 'prompt_token_ids'"),
        ([{"prompt_token_ids": [5], "multi_modal_data": {}}], "a dict has 'multi_modal_data'"),
        ({"input_ids": [[5]], "attention_mask": [[1]]}, "'input_ids', 'attention_mask'; possible"),
        ({}, "a dict is empty"),
        ({"prompt": None}, "a dict is empty"),
        ({"prompt": [5, 6]}, "'prompt' is [5, 6]; give a text"),
        ({"prompt_token_ids": "text"}, "'prompt_token_ids' is 'text'; give a list"),
        ({"prompt_token_ids": 5}, "'prompt_token_ids' is 5; give a list"),
        ({"prompt_token_ids": [[5]]}, "token id [5]"),
        ({"prompt_token_ids": []}, "prompt: is empty"),
        ([5, {"prompt_token_ids": [5]}], "not mixed"),
        (None, "prompts: None is neither"),
        (5, "prompts: 5 is neither"),
        (np.int64(5), "prompts: 5 is neither"),
        (b"text", "prompts: b'text' is neither"),
        ({5, 6}, "prompts: {5, 6} is neither"),
        (np.array([1.0, 2.0]), "prompts: 1.0 is neither"),
        ([True, False], "token id True"),
        ([[5, True]], "token id True"),
    ],
    ids=repr,
)
def test_prompts_that_are_refused(llm: LLM, prompts: Any, words: str) -> None:
    with pytest.raises(ValueError) as refusal:
        llm.generate(prompts, GREEDY)
    assert words in str(refusal.value)
    assert is_idle(llm)


# Stuck ranks.


@needs_proc
def test_a_stuck_rank_ends_generate(v2: Oracle) -> None:
    options = OPTIONS | dict(engine_timeout=1.0)
    with LLM(v2.path, ranks="processes", tp_size=2, dcp_size=2, **options) as llm:
        ranks = children_of(os.getpid())
        assert tokens_of(llm.generate(v2.prompts[:2], GREEDY)) == [t[:8] for t in v2.tokens[:2]]

        os.kill(ranks[1], signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match=r"no step has ended for 1 s.*--engine-timeout 1"):
            llm.generate([5], GREEDY)
        assert not any(map(is_alive, ranks))
        with pytest.raises(EngineDeadError, match="no step has ended for 1 s"):
            llm.generate([5], GREEDY)
        assert llm.engine.requests == {}


def test_ctrl_c_and_close_in_the_middle_of_a_long_step(
    v2: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is free at once. `close` ends a rank that computes, and the waiting thread."""
    monkeypatch.setattr("minidcp.engine.executor.STOP_SECONDS", 0.3)
    begun = threading.Event()

    def execute(*_: object) -> None:
        begun.set()
        while True:
            torch.ones(100, 100) @ torch.ones(100, 100)

    monkeypatch.setattr(ModelRunner, "execute", execute)
    before = threads_of_engines()
    with LLM(v2.path, ranks="threads", **OPTIONS) as llm:

        def interrupt() -> None:
            begun.wait()
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            threading.Thread(target=interrupt).start()
            llm.generate([5], GREEDY)
    wait_until(lambda: threads_of_engines() <= before, 10, "threads are left")


def test_suspended_time_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-Z and `fg` the time of one wait is up. That is not the whole timeout."""
    waits: list[float] = []

    def get(timeout: float) -> str:
        waits.append(timeout)
        if len(waits) < 3:
            raise queue.Empty
        return "a result"

    reports = Reports()
    monkeypatch.setattr(reports, "queue", SimpleNamespace(get=get))
    assert reports.get(60) == "a result"
    assert sum(waits) < 30


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf"), "long"])
def test_engine_timeout_is_checked(v2: Oracle, value: object) -> None:
    with pytest.raises(ValueError, match=f"--engine-timeout {value!r}"):
        LLM(v2.path, engine_timeout=value)


# Seeds.


@pytest.mark.parametrize("layout", [(1, 1), (4, 2)])
def test_a_seed_fixes_the_tokens_in_float32(
    v2: Oracle, layout: tuple[int, int], crowded: None
) -> None:
    """Whatever runs beside it, with a cached prefix, in chunks, and after preemption."""
    tp, dcp = layout
    prompt = v2.prompts[13]
    sampled = SamplingParams(max_tokens=24, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
    other = SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True)
    mates = [make_prompt(20 + 9 * i, 128, salt=i) for i in range(6)]
    options = OPTIONS | dict(ranks="threads", tp_size=tp, dcp_size=dcp, block_size=4)

    with LLM(v2.path, **options) as llm:
        (alone,) = tokens_of(llm.generate([prompt], sampled))
        (cached,) = llm.generate([prompt], sampled)
        assert cached.cached_tokens > 0
        assert tokens_of([cached]) == [alone]
        together = llm.generate([*mates, prompt], [other] * 6 + [sampled])
        assert tokens_of(together)[-1] == alone

    small = options | dict(num_blocks=128 // (4 * dcp), max_model_len=128)
    small |= dict(max_num_batched_tokens=16, max_num_seqs=8, prefix_cache=False)
    with LLM(v2.path, **small) as llm:
        again = llm.generate(
            [*mates[:3], prompt, *mates[3:]], [other] * 3 + [sampled] + [other] * 3
        )
        assert tokens_of(again)[3] == alone
        assert llm.engine.scheduler.num_preemptions > 0
    assert len(set(alone)) > 8  # it was sampled
