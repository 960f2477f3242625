"""Times of single steps, measured on one rank, and an engine's executor that runs no step but takes as long.

Scheduler and block manager are then the real ones, and only the clock is simulated; see `serving_emulated.py`.
"""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from minidcp.batch import Admission, StepPlan
from minidcp.config import EngineConfig
from minidcp.engine.executor import Executor
from minidcp.engine.model_runner import ModelRunner, StepResult
from minidcp.engine.worker import Command, Ready
from minidcp.model_config import ModelConfig
from minidcp.parallel.state import ParallelState
from minidcp.request import SamplingParams

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of steps, each the mean of several that were launched one after another.

    Attributes:
        kv_bytes: what the rank's cache may take, as the engine measures it.
        decode: [batch, seconds at contexts[0], at contexts[1]] of pure decode steps.
        prefill: [tokens, seconds] of new prompts.
        context: [new tokens, cached tokens, seconds that seeing these adds].
        beside: [decode rows, seconds that they add to a step with prompts].
    """

    kv_bytes: int
    dtype: str
    contexts: list[int]
    decode: list[list[float]]
    prefill: list[list[float]]
    context: list[float]
    beside: list[list[float]]

    def estimate(self, plan: StepPlan) -> float:
        """Seconds of any step: straight lines between the measured points and over the mean context. Cached context
        that prompts see counts by pairs of tokens."""
        d = plan.num_decode
        if d == len(plan.slots):
            batch, *times = np.array(self.decode).T
            low, high = (float(np.interp(d, batch, column)) for column in times)
            first, second = self.contexts
            return low + (high - low) * (sum(plan.starts) / d - first) / (second - first)
        chunks = list(zip(plan.lengths[d:], plan.starts[d:], strict=True))
        new, cached, extra = self.context
        seen = sum(length * start for length, start in chunks) / (new * cached) * extra
        prefill, beside = np.array(self.prefill).T, np.array([[0, 0], *self.beside]).T
        tokens = sum(length for length, _ in chunks)
        return float(np.interp(tokens, *prefill)) + seen + float(np.interp(d, *beside))


class SimulatedExecutor(Executor):
    """No rank at all. Steps run one after another on a clock of their own; every token is 0."""

    def __init__(self, times: StepTimes, config: EngineConfig, model_config: ModelConfig) -> None:
        self.times, self.clock, self.free_at = times, 0.0, 0.0
        self.steps: deque[tuple[float, StepResult]] = deque()  # those in flight, and when they end

    def now(self) -> float:
        return self.clock

    def wait_ready(self) -> list[Ready]:
        return [Ready(self.times.kv_bytes)]

    def submit(self, command: Command) -> None:
        if isinstance(command, StepPlan):
            seconds = self.times.estimate(command)
            self.free_at = max(self.free_at, self.clock) + seconds
            self.steps.append((self.free_at, StepResult([0] * len(command.sampling), None, seconds)))

    def collect(self) -> StepResult:
        self.clock, result = self.steps.popleft()
        return result

    def check(self) -> None:
        return

    def close(self) -> None:
        return


class Meter:
    """Times steps of a rank whose cache has `num_blocks`, which are used again where a batch needs more."""

    def __init__(self, runner: ModelRunner, num_blocks: int, repeats: int) -> None:
        self.runner, self.num_blocks, self.repeats = runner, num_blocks, repeats
        self.vocab = runner.model_config.vocab_size

    def plan(self, rows: int, context: int, prompts: list[tuple[int, int]]) -> StepPlan:
        """`rows` decode at `context`; `prompts` have (new, cached) tokens."""
        plan, block = StepPlan(num_decode=rows), 0
        for slot, (length, start) in enumerate([(1, context)] * rows + prompts):
            count = self.runner.interleave.num_blocks(start + length)
            plan.new_blocks += [(slot, i, (block + i) % self.num_blocks) for i in range(count)]
            block += count
            plan.slots.append(slot)
            plan.starts.append(start)
            plan.lengths.append(length)
            plan.sampling.append(slot)
            plan.admitted.append(Admission(slot, GREEDY))
            plan.tokens += random.choices(range(self.vocab), k=length if slot >= rows else 0)
        return plan

    def seconds(self, rows: int, context: int, *prompts: tuple[int, int]) -> float:
        plan, start, pending = self.plan(rows, context, [*prompts]), 0.0, []
        for i in range(self.repeats + 1):
            if i < 2:  # the first step compiles kernels
                self.synchronize()
                start = time.perf_counter()
            self.runner.last_tokens.random_(self.vocab)  # rows with equal tokens would go to the same experts
            pending.append(self.runner.execute(plan))  # which copies to the host, and so must live
        self.synchronize()
        return (time.perf_counter() - start) / self.repeats

    def synchronize(self) -> None:
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize()


@torch.inference_mode()
def measure(
    config: EngineConfig, model_config: ModelConfig, state: ParallelState, contexts: list[int], batches: list[int],
    repeats: int,
) -> StepTimes:  # fmt: skip
    """The step times of one rank: decode of `batches` at two `contexts`, the shorter of which is a prompt's length."""
    runner = ModelRunner(config, model_config, state, torch.device(config.device))
    layout, budget, most = runner.interleave, config.max_num_batched_tokens or 0, config.max_num_seqs
    kv_bytes, token_bytes = runner.measure_kv_bytes(), model_config.latent_dim * runner.dtype.itemsize
    num_blocks = kv_bytes // (model_config.num_hidden_layers * config.block_size * token_bytes)
    num_blocks = min(num_blocks, most * layout.num_blocks(contexts[1] + 1))
    runner.allocate_cache(num_blocks)
    assert runner.cache is not None
    runner.cache.normal_()
    meter, prompt = Meter(runner, num_blocks, repeats), contexts[0]

    fitting = num_blocks // layout.num_blocks(prompt)  # no batch will ever be larger: one point beyond is enough
    sizes = [b for i, b in enumerate(batches) if i == 0 or batches[i - 1] < fitting]
    decode = [[b, *(meter.seconds(b, context) for context in contexts)] for b in sizes]
    half, middle, prefill = max(1, min(budget, prompt) // 2), sum(contexts) // 2, []
    for tokens in sorted({max(1, budget // n) for n in (1, 2, 4, 16, 128)}):
        whole, rest = divmod(tokens, prompt)
        prefill.append([tokens, meter.seconds(0, 0, *[(prompt, 0)] * whole, *[(rest, 0)] * (rest > 0))])
    alone = meter.seconds(0, 0, (half, 0))
    context = [half, half, max(0.0, meter.seconds(0, 0, (half, half)) - alone)]
    rows = sorted({min(b, most - 1, budget - half) for b in sizes} - {0})
    beside = [[b, max(0.0, meter.seconds(b, middle, (half, 0)) - alone)] for b in rows]
    return StepTimes(kv_bytes, config.dtype, contexts, decode, prefill, context, beside)
