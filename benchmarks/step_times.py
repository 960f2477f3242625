"""Measured times of single steps on one rank, and an executor that only pretends to take as long.

With that executor, scheduler and block manager are the real ones and only the clock is simulated.
Read `serving_emulated.py` next.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minidcp.batch import Admission, StepPlan, StepResult
from minidcp.engine.executor import Executor
from minidcp.model_config import ModelConfig
from minidcp.parallel.state import ParallelState
from minidcp.request import SamplingParams
from minidcp.resolve import ResolvedConfig
from minidcp.worker.model_runner import ModelRunner
from minidcp.worker.worker import Command, Ready

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of steps. Each is the mean of several steps that were launched one after another.

    Attributes:
        kv_bytes: the memory that the rank's cache may take, as the engine measures it.
        contexts: the two context lengths at which decode was measured.
        decode: [batch, seconds at contexts[0], seconds at contexts[1]] of pure decode steps.
        prefill: [tokens, seconds] of prompts without context.
        context: [new tokens, cached tokens, seconds that this context adds to the step].
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
        """Estimate the seconds of any step, by linear interpolation between the measured ones."""
        if plan.num_decode == len(plan.slots):
            return self.estimate_decode(plan)
        return self.estimate_mixed(plan)

    def estimate_decode(self, plan: StepPlan) -> float:
        """A pure decode step: interpolate the batch size and the mean context length."""
        num_decode = plan.num_decode
        batches, short_seconds, long_seconds = np.array(self.decode).T
        at_short = float(np.interp(num_decode, batches, short_seconds))
        at_long = float(np.interp(num_decode, batches, long_seconds))
        short, long = self.contexts
        mean_context = sum(plan.starts) / num_decode
        return at_short + (at_long - at_short) * (mean_context - short) / (long - short)

    def estimate_mixed(self, plan: StepPlan) -> float:
        """A step with prompts: add up new tokens, their cached context, and the decode rows.

        The time of the context is proportional to the number of (new token, cached token) pairs.
        """
        lengths = plan.lengths[plan.num_decode :]
        starts = plan.starts[plan.num_decode :]
        prefill_tokens, prefill_seconds = np.array(self.prefill).T
        new_seconds = float(np.interp(sum(lengths), prefill_tokens, prefill_seconds))

        new, cached, seconds = self.context
        num_pairs = sum(length * start for length, start in zip(lengths, starts, strict=True))
        context_seconds = num_pairs / (new * cached) * seconds

        rows, row_seconds = np.array([[0, 0], *self.beside]).T
        decode_seconds = float(np.interp(plan.num_decode, rows, row_seconds))
        return new_seconds + context_seconds + decode_seconds


class SimulatedExecutor(Executor):
    """An executor without ranks. Steps take time on a simulated clock, and every token is 0."""

    def __init__(self, times: StepTimes, config: ResolvedConfig, model_config: ModelConfig) -> None:
        self.times = times
        self.clock = 0.0
        self.free_at = 0.0  # when the last submitted step ends
        self.steps: deque[tuple[float, StepResult]] = deque()  # in flight: when they end, results

    def now(self) -> float:
        return self.clock

    def wait_ready(self) -> list[Ready]:
        return [Ready(self.times.kv_bytes)]

    def submit(self, command: Command) -> None:
        if not isinstance(command, StepPlan):
            return
        seconds = self.times.estimate(command)
        self.free_at = max(self.free_at, self.clock) + seconds
        tokens = [0] * len(command.sampling)
        self.steps.append((self.free_at, StepResult(tokens, None, seconds)))

    def collect(self, timeout: float = math.inf) -> StepResult:
        self.clock, result = self.steps.popleft()
        return result

    def check(self) -> None:
        return

    def close(self) -> None:
        return


class Meter:
    """Times steps of a rank with a cache of `num_blocks`.

    A batch that needs more blocks than that uses some of them several times.
    """

    def __init__(self, runner: ModelRunner, num_blocks: int, repeats: int) -> None:
        self.runner = runner
        self.num_blocks = num_blocks
        self.repeats = repeats
        self.vocab_size = runner.model_config.vocab_size

    def make_plan(self, rows: int, context: int, prompts: Sequence[tuple[int, int]]) -> StepPlan:
        """A step: `rows` rows decode at `context`, and prompts have (new, cached) tokens."""
        plan = StepPlan(num_decode=rows)
        next_block = 0
        all_rows = [(1, context)] * rows + list(prompts)
        for slot, (length, start) in enumerate(all_rows):
            count = self.runner.interleave.num_blocks(start + length)
            for index in range(count):
                plan.new_blocks.append((slot, index, (next_block + index) % self.num_blocks))
            next_block += count
            plan.slots.append(slot)
            plan.starts.append(start)
            plan.lengths.append(length)
            plan.sampling.append(slot)
            plan.admitted.append(Admission(slot, GREEDY))
            if slot >= rows:
                plan.tokens += random.choices(range(self.vocab_size), k=length)
        return plan

    def measure(
        self, rows: int = 0, context: int = 0, prompts: Sequence[tuple[int, int]] = ()
    ) -> float:
        """Mean seconds of such a step, after an uncounted one in which kernels are compiled."""
        plan = self.make_plan(rows, context, prompts)
        pending = []  # the steps copy their results to the host, so these must stay alive
        pending.append(self.run(plan))
        self.synchronize()
        start = time.perf_counter()
        for _ in range(self.repeats):
            pending.append(self.run(plan))
        self.synchronize()
        return (time.perf_counter() - start) / self.repeats

    def run(self, plan: StepPlan) -> object:
        # Random tokens, because rows with equal tokens would all go to the same experts.
        self.runner.last_tokens.random_(self.vocab_size)
        return self.runner.execute(plan)

    def synchronize(self) -> None:
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize()


@torch.inference_mode()
def measure(
    config: ResolvedConfig,
    model_config: ModelConfig,
    state: ParallelState,
    contexts: list[int],
    batches: list[int],
    repeats: int,
) -> StepTimes:
    """Measure the step times of one rank.

    Decode of `batches` is measured at two `contexts`. The shorter one is the length of a prompt.
    """
    runner = ModelRunner(config, model_config, state, torch.device(config.device))
    kv_bytes = runner.measure_kv_bytes()
    num_blocks = count_blocks(runner, kv_bytes, contexts[1])
    runner.allocate_cache(num_blocks)
    assert runner.cache is not None
    runner.cache.normal_()
    meter = Meter(runner, num_blocks, repeats)

    prompt_length = contexts[0]
    # The cache never holds more requests than this, so one measured batch beyond it is enough.
    max_batch = num_blocks // runner.interleave.num_blocks(prompt_length)
    sizes = []
    for index, batch in enumerate(batches):
        if index == 0 or batches[index - 1] < max_batch:
            sizes.append(batch)
    decode = []
    for batch in sizes:
        seconds = [meter.measure(batch, context) for context in contexts]
        decode.append([batch, *seconds])

    budget = config.max_num_batched_tokens
    prefill = measure_prefill(meter, budget, prompt_length)

    # Half a budget of new tokens: alone, on as many cached tokens, and beside decode rows.
    half = max(1, min(budget, prompt_length) // 2)
    alone = meter.measure(prompts=[(half, 0)])
    with_context = meter.measure(prompts=[(half, half)])
    context = [half, half, max(0.0, with_context - alone)]

    mean_context = sum(contexts) // 2
    most_rows = min(config.max_num_seqs - 1, budget - half)
    beside = []
    for rows in sorted({min(batch, most_rows) for batch in sizes}):
        if rows > 0:
            with_decode = meter.measure(rows, mean_context, [(half, 0)])
            beside.append([rows, max(0.0, with_decode - alone)])
    return StepTimes(kv_bytes, config.dtype, contexts, decode, prefill, context, beside)


def count_blocks(runner: ModelRunner, kv_bytes: int, longest: int) -> int:
    """The blocks that fit into `kv_bytes`, at most those that `longest` tokens a request need."""
    config = runner.config
    model_config = runner.model_config
    token_bytes = model_config.latent_dim * runner.dtype.itemsize
    block_bytes = model_config.num_hidden_layers * config.block_size * token_bytes
    num_usable = config.max_num_seqs * runner.interleave.num_blocks(longest + 1)
    return min(kv_bytes // block_bytes, num_usable)


def measure_prefill(meter: Meter, budget: int, prompt_length: int) -> list[list[float]]:
    """[tokens, seconds] of steps whose prompts take the whole budget, or a fraction of it."""
    prefill = []
    for tokens in sorted({max(1, budget // divisor) for divisor in (1, 2, 4, 16, 128)}):
        num_whole, rest = divmod(tokens, prompt_length)
        prompts = [(prompt_length, 0)] * num_whole
        if rest > 0:
            prompts.append((rest, 0))
        prefill.append([tokens, meter.measure(prompts=prompts)])
    return prefill
