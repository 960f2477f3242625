"""The engine: requests in, steps, text out. `LLMEngine.step` is the whole story. It runs on the
driver and touches no tensor. `scheduler.py` decides what a step computes, `executor.py` reaches the
ranks. Next: `llm.py`."""

import logging
import math
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from minidcp.batch import StepResult
from minidcp.config import EngineConfig, require
from minidcp.engine.detokenizer import Detokenizer
from minidcp.engine.drafter import make_drafter
from minidcp.engine.executor import Executor, is_driver, serve_torchrun_rank
from minidcp.engine.grammar import Grammars, Outcome
from minidcp.engine.limits import Limits
from minidcp.engine.listener import EngineStats, StepListener
from minidcp.engine.scheduler import ScheduledStep, Scheduler
from minidcp.engine.tokenizer import TextEncoder, load_tokenizer
from minidcp.generation_config import read_sampling_defaults
from minidcp.kv_cache.block_manager import BlockManager
from minidcp.kv_cache.interleave import Interleave
from minidcp.machine import detect_machine
from minidcp.model_config import ModelConfig
from minidcp.models.weights import find_model
from minidcp.request import (
    FinishReason,
    OutputDelta,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from minidcp.resolve import ResolvedConfig, resolve

logger = logging.getLogger("minidcp")

# How long planning waits for masks at most, and at most for half the time of a step: the step in
# flight goes on meanwhile. Requests whose mask comes later wait for the next step.
MASK_SECONDS = 0.005


class LLMEngine:
    """One model on the ranks that `start` starts, serving many requests at once.

    It is not thread-safe: one thread calls it, and no signal handler may raise in that thread while
    a step is made (`EngineThread` and the server use a thread of their own). Raises ValueError if
    the configuration or the checkpoint is wrong. Every method raises EngineDeadError if a rank has
    ended.
    """

    def __init__(
        self,
        config: EngineConfig,
        start: Callable[[ResolvedConfig, ModelConfig], Executor] = Executor,
        listener: StepListener | None = None,
    ) -> None:
        if not is_driver():
            serve_torchrun_rank(config.model)  # which does not return
        self.asked = config  # where `config` has what was decided
        config = replace(config, model=str(find_model(config.model)))
        self.model_config = ModelConfig.from_hf(config.model)
        resolved = resolve(config, self.model_config, detect_machine(config, self.model_config))
        self.sampling_defaults = read_sampling_defaults(
            config.generation_config, Path(config.model)
        )
        self.listener = listener
        self.tokenizer = load_tokenizer(Path(resolved.model))
        self.longest_token = 0  # in characters
        if self.tokenizer is not None:
            self.encoder = TextEncoder.from_checkpoint(self.tokenizer, Path(resolved.model))
            self.longest_token = max(len(token) for token in self.tokenizer.get_vocab())
        self.layout = Interleave(resolved.dcp_size, resolved.block_size)

        self.executor = start(resolved, self.model_config)
        try:
            num_blocks, self.max_model_len = self.init_cache(config, resolved)
        except BaseException:
            self.executor.close()
            raise
        self.config = replace(resolved, max_model_len=self.max_model_len)
        has_tokenizer = self.tokenizer is not None
        self.limits = Limits(self.max_model_len, self.model_config.vocab_size, has_tokenizer)

        self.blocks = BlockManager(num_blocks, self.layout.tokens_per_block, resolved.prefix_cache)
        self.scheduler = Scheduler(
            self.blocks,
            resolved.max_num_seqs,
            resolved.max_num_batched_tokens,
            resolved.mixed_steps,
            make_drafter(resolved),
        )
        self.grammars = Grammars(
            self.tokenizer, self.model_config.vocab_size, self.model_config.eos_token_ids
        )
        self.requests: dict[str, tuple[Request, Detokenizer]] = {}
        self.in_flight: deque[ScheduledStep] = deque()
        self.stats = EngineStats()
        self.last_step_seconds = 0.0

    # Starting.

    def init_cache(self, asked: EngineConfig, config: ResolvedConfig) -> tuple[int, int]:
        """Size the cache by the room that the ranks have, and have them allocate it.

        Returns the number of blocks, and max_model_len. If the user chose none, max_model_len is
        lowered to what the cache holds.
        """
        ready = self.executor.wait_ready()
        self.weight_bytes = max(r.bytes_read for r in ready)
        kv_bytes = min(r.kv_bytes for r in ready)
        num_blocks = asked.num_blocks or self.count_blocks_that_fit(kv_bytes, config)

        capacity = num_blocks * self.layout.tokens_per_block
        max_model_len = config.max_model_len
        if asked.max_model_len is None and 0 < capacity < max_model_len:
            logger.warning(
                "--max-model-len lowered from %d to the KV cache's %d tokens",
                max_model_len,
                capacity,
            )
            max_model_len = capacity
        size = f"{num_blocks} blocks of {config.block_size} × dcp {config.dcp_size}"
        require(
            capacity >= max_model_len,
            f"--max-model-len {max_model_len}: the KV cache holds {max(capacity, 0)} tokens "
            f"({size}); lower it, or raise --num-blocks or --dcp-size",
        )

        self.executor.submit(num_blocks)
        # Every rank runs the same.
        self.setup = self.executor.wait_ready()[0].setup
        self.log_sizes(num_blocks, max_model_len)
        return num_blocks, max_model_len

    def count_blocks_that_fit(self, kv_bytes: int, config: ResolvedConfig) -> int:
        """As many as fit into kv_bytes of a rank, but no more than can ever be used."""
        itemsize: int = getattr(torch, config.dtype).itemsize
        num_layers = config.count_cache_layers(self.model_config)
        token_bytes = num_layers * self.model_config.latent_dim * itemsize
        num_fitting = kv_bytes // (config.block_size * token_bytes)
        num_usable = config.max_num_seqs * self.layout.num_blocks(config.max_model_len)
        return min(num_fitting, num_usable)

    def log_sizes(self, num_blocks: int, max_model_len: int) -> None:
        tokens_per_rank = num_blocks * self.layout.block_size
        capacity = num_blocks * self.layout.tokens_per_block
        num_requests = num_blocks // self.layout.num_blocks(max_model_len)
        logger.info(
            f"weights: {self.weight_bytes / 1e6:.1f} MB read per rank; "
            f"KV cache: {num_blocks} blocks, {tokens_per_rank} tokens per rank, "
            f"{capacity} in all (dcp {self.layout.size}), "
            f"{num_requests} requests of {max_model_len} tokens"
        )

    # Requests.

    def add_request(
        self, request_id: str, prompt: str | list[int], params: SamplingParams, group: str = ""
    ) -> Request:
        """Queue a prompt. Requests of one group are admitted in order; groups take turns.

        Raises ValueError if it is empty, too long, has unknown tokens, or needs a tokenizer, or if
        its grammar is wrong. Have it compiled first (`Grammars.compile_later`), and hold it
        until this returns; else this waits for it.
        """
        require(request_id not in self.requests, f"request_id {request_id!r} is in use")
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        self.limits.check(tokens, params)

        stop_ids = list(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids += self.model_config.eos_token_ids
        vocab_size = self.model_config.vocab_size
        request = Request(
            request_id=request_id,
            prompt_token_ids=tokens,
            params=params,
            max_tokens=params.max_tokens or self.max_model_len - len(tokens),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            stop_ids=tuple(token for token in stop_ids if token < vocab_size),
            group=group,
        )
        if params.structured_outputs is not None:
            self.grammars.open(request)
        self.requests[request_id] = (request, Detokenizer(self.tokenizer, params))
        self.scheduler.add(request)
        return request

    def tokenize(self, text: str, special_tokens: bool = True, field: str = "prompt") -> list[int]:
        """Token ids of a text, with the special tokens that the checkpoint adds (BOS) or without.

        A text that must be too long is refused first: to tokenize megabytes takes seconds.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"{field}: the checkpoint has no tokenizer; give token ids instead of text"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can express
            raise ValueError(f"{field}: is not valid Unicode ({error.reason})") from None
        self.limits.require_fit(
            len(text) <= self.max_model_len * self.longest_token,
            f"your {field} has {len(text)} characters, more than so many tokens can hold.",
        )
        return self.encoder.encode(text, special_tokens)

    def abort(self, *request_ids: str) -> None:
        """Forget requests and free what they hold.

        Unknown ids are ignored, because a request may just have finished.
        """
        for request_id in request_ids:
            if request_id in self.requests:
                request, _ = self.requests[request_id]
                self.finish(request, FinishReason.ABORT)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request and forget it."""
        del self.requests[request.request_id]
        self.grammars.drop(request)
        self.scheduler.finish(request, reason)

    # Steps.

    @property
    def has_work(self) -> bool:
        return bool(self.requests or self.in_flight)

    def step(self, timeout: float = math.inf) -> list[OutputDelta]:
        """Plan and submit the next step, then take in the result of the one before it.

        So planning overlaps with running. Returns what that older step added to each request.
        Raises EngineDeadError if that result does not come within `timeout` seconds.
        """
        deltas = self.take_masks()
        planned = self.scheduler.schedule()
        if planned is not None:
            self.in_flight.append(planned)  # before it is sent: its result must find it here
            self.executor.submit(planned.plan)
            if self.listener is not None:
                self.listener.on_scheduled(planned)

        is_first = planned is not None and len(self.in_flight) == 1
        if not self.in_flight or is_first:
            return deltas
        result = self.executor.collect(timeout)
        return deltas + self.take_in(self.in_flight.popleft(), result)

    def take_masks(self) -> list[OutputDelta]:
        """Hand out the masks that are ready; ends requests whose grammar ends or has failed."""
        deltas = []
        for outcome in self.grammars.collect(min(MASK_SECONDS, self.last_step_seconds / 2)):
            outcome.request.mask = outcome.mask
            if outcome.mask is None:
                deltas.append(self.end_grammar(outcome))
        return deltas

    def end_grammar(self, outcome: Outcome) -> OutputDelta:
        """Finish a request that no token may follow. The delta has no token."""
        request = outcome.request
        _, detokenizer = self.requests[request.request_id]
        reason = FinishReason.STOP if outcome.error is None else FinishReason.ERROR
        self.finish(request, reason)
        return OutputDelta(
            request_id=request.request_id,
            text=detokenizer.flush(),
            token_ids=(),
            finish_reason=reason,
            cached_tokens=request.cached_tokens,
            error=outcome.error,
        )

    def take_in(self, step: ScheduledStep, result: StepResult) -> list[OutputDelta]:
        """Hand out a step's tokens, and what comes with them, to its requests."""
        results = self.scheduler.update(step, result.tokens, result.drafts)
        num_sampled = len(result.tokens)
        logprobs = result.logprobs or [None] * num_sampled
        self.note_prompt_logprobs(step, logprobs[num_sampled:])

        deltas = []
        for request, first, end, num_drafts in results:
            self.stats.note_drafts(num_drafts, end - first - 1)
            num_outputs = request.num_outputs - (end - first)
            for index in range(first, end):
                if request.finish_reason is not None:
                    break  # it ended, perhaps while this step was in flight
                num_outputs += 1
                token = result.tokens[index]
                deltas.append(self.advance(request, token, logprobs[index], num_outputs))

        if self.listener is not None:
            self.listener.on_finished(step, result)
        self.stats.steps += 1
        self.stats.step_seconds += result.seconds
        self.last_step_seconds = result.seconds
        drafter = self.scheduler.drafter
        if drafter is not None:
            drafter.note_step(step.plan, result.seconds)
        self.stats.received_bytes = result.received_bytes
        self.stats.prompt_tokens += len(step.plan.tokens)
        self.stats.generated_tokens += len(deltas)
        return deltas

    def note_prompt_logprobs(
        self, step: ScheduledStep, entries: list[TokenLogprobs | None]
    ) -> None:
        """Keep the entries of the plan's scored tokens with their requests."""
        plan = step.plan
        for (row, tokens_before_last, _), entry in zip(plan.scored, entries, strict=True):
            # The logits of a token are about the position after it.
            position = plan.starts[row] + plan.lengths[row] - tokens_before_last
            step.requests[row].prompt_logprobs[position] = entry

    def advance(
        self, request: Request, token: int, logprobs: TokenLogprobs | None, num_outputs: int
    ) -> OutputDelta:
        """Add a sampled token to its request's text, and finish the request if that ends it.

        It is output number `num_outputs`, counted from 1.
        """
        _, detokenizer = self.requests[request.request_id]
        may_stop = request.params.may_stop_after(num_outputs)
        is_stop_token = may_stop and token in request.stop_ids
        is_at_limit = num_outputs >= request.max_tokens

        text = ""
        if not is_stop_token:
            text = detokenizer.append(token)
        if is_stop_token or is_at_limit:
            text += detokenizer.flush()

        reason = None
        if is_stop_token or detokenizer.stopped:
            reason = FinishReason.STOP
        elif is_at_limit:
            reason = FinishReason.LENGTH
        if reason is not None:
            self.finish(request, reason)
        elif request.params.structured_outputs is not None:
            self.grammars.advance(request, token)

        return OutputDelta(
            request_id=request.request_id,
            text=text,
            token_ids=(token,),
            finish_reason=reason,
            logprobs=logprobs,
            cached_tokens=request.cached_tokens,
            prompt_logprobs=request.prompt_logprobs if num_outputs == 1 else None,
            num_held_back=len(detokenizer.held_back),
        )

    def kv_tokens(self) -> tuple[list[int], list[int]]:
        """By rank: how many tokens its cache can hold, and how many of running requests it has."""
        layout = self.layout
        room = self.blocks.num_blocks * layout.block_size
        lengths = [request.num_computed for request in list(self.scheduler.running)]
        used_by_dcp_rank = []
        for rank in range(layout.size):
            used_by_dcp_rank.append(sum(layout.local_len(length, rank) for length in lengths))
        num_groups = self.config.tp_size // layout.size
        return [room] * self.config.tp_size, used_by_dcp_rank * num_groups

    def close(self) -> None:
        self.executor.close()
        self.grammars.close()
