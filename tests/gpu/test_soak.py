"""Eight ranks on one GPU under load: nothing is lost, nothing leaks, nothing hangs.

SOAK_RANKS in the environment makes it another number of ranks, such as one for each GPU.
"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from checkpoints import Oracle, make_prompt, measure_errors

from minidcp import LLM, EngineConfig, SamplingParams
from minidcp.engine.engine import LLMEngine
from minidcp.engine.executor import EngineDeadError

pytestmark = pytest.mark.gpu
RANKS = int(os.environ.get("SOAK_RANKS", "8"))
OPTIONS = dict(device="cuda", max_model_len=512, max_num_batched_tokens=512)


def make_engine(oracle: Oracle, **options: object) -> LLMEngine:
    sizes = dict(tp_size=RANKS, dcp_size=RANKS)
    return LLMEngine(EngineConfig(str(oracle.path), **(sizes | OPTIONS | options)))


@pytest.mark.timeout(240)
def test_a_thousand_requests_with_aborts(checkpoint: Oracle) -> None:
    rng = random.Random(0)
    engine = make_engine(checkpoint, num_blocks=60, max_num_seqs=64)
    prompts: dict[str, list[int]] = {}
    tokens: dict[str, list[int]] = {}
    finished: set[str] = set()
    left, live = 1000, set()
    while left or engine.has_work:
        while left and len(live) < 96:
            left -= 1
            request_id = str(left)
            prompts[request_id] = make_prompt(rng.randint(1, 200), 512, salt=left)
            params = SamplingParams(max_tokens=rng.randint(1, 24), temperature=0.0, ignore_eos=True)
            engine.add_request(request_id, prompts[request_id], params)
            tokens[request_id] = []
            live.add(request_id)
        if live and rng.random() < 0.3:
            request_id = rng.choice(sorted(live))
            engine.abort(request_id)
            live.discard(request_id)
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                finished.add(delta.request_id)
                live.discard(delta.request_id)
        blocks = engine.blocks
        assert len(blocks.free) + len(blocks.cached) + len(blocks.live) == blocks.num_blocks
    assert len(engine.blocks.live) == 0 and len(finished) > 700
    engine.close()

    sampled = sorted(finished)[:: len(finished) // 60]
    with LLM(str(checkpoint.path), num_blocks=400, max_num_seqs=64, **OPTIONS) as llm:
        params = [
            SamplingParams(max_tokens=len(tokens[i]), temperature=0.0, ignore_eos=True, logprobs=2)
            for i in sampled
        ]
        alone = llm.generate([prompts[i] for i in sampled], params)
    noise = max(float(measure_errors(checkpoint.model, output).max()) for output in alone)
    for request_id, output in zip(sampled, alone, strict=True):
        for ours, entry in zip(tokens[request_id], output.outputs[0].logprobs, strict=True):
            if ours != entry.token_id:
                assert entry.top[0][1] - entry.top[1][1] < 2 * noise, f"request {request_id}"
                break


def test_a_killed_rank_ends_everything(checkpoint: Oracle) -> None:
    engine = make_engine(checkpoint, num_blocks=60, max_num_seqs=8)
    for i in range(4):
        engine.add_request(str(i), [5] * 50, SamplingParams(max_tokens=400, ignore_eos=True))
    for _ in range(20):
        engine.step()
    processes = engine.executor.processes
    killed = RANKS // 2
    os.kill(processes[killed].pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(EngineDeadError, match=f"rank {killed}"):
        while True:
            engine.step()
    assert time.monotonic() - start < 10
    assert all(process.poll() is not None for process in processes.values())
