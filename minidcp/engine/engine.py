"""The engine: requests in, steps, text out. `LLMEngine.step` is the whole story. It runs on the driver and touches no
tensor. `scheduler.py` decides, `executor.py` reaches the ranks."""

import itertools
import logging
import os
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minidcp.config import EngineConfig, divisors, flag, require
from minidcp.engine.detokenizer import Detokenizer, load_tokenizer
from minidcp.engine.executor import Executor, under_torchrun
from minidcp.engine.model_runner import StepResult
from minidcp.engine.scheduler import PlannedStep, Scheduler
from minidcp.kv_cache.block_manager import BlockManager
from minidcp.kv_cache.interleave import Interleave
from minidcp.model_config import ModelConfig
from minidcp.models.weights import find_model
from minidcp.request import FinishReason, OutputDelta, Request, SamplingParams, TokenLogprobs

logger = logging.getLogger("minidcp")


@dataclass
class EngineStats:
    """Counters since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    step_seconds: float = 0.0  # spent by rank 0 inside steps
    received_bytes: int = 0  # by rank 0 from other ranks


class LLMEngine:
    """One model on the ranks that `start` starts, serving many requests at once. Not thread-safe: one thread calls it.
    Raises ValueError if the configuration or the checkpoint is wrong; every method EngineDeadError if a rank ended."""

    def __init__(self, config: EngineConfig, start: Callable[[EngineConfig, ModelConfig], Executor] = Executor) -> None:
        lower_max_model_len = config.max_model_len is None
        config, self.model_config = resolve(config)
        self.tokenizer = load_tokenizer(Path(config.model))
        self.longest_token = max(map(len, self.tokenizer.get_vocab())) if self.tokenizer else 0
        self.layout = Interleave(config.dcp_size, config.block_size)
        self.executor = start(config, self.model_config)
        try:
            num_blocks, self.max_model_len = self.init_cache(config, lower_max_model_len)
        except BaseException:
            self.executor.close()
            raise
        self.config = replace(config, num_blocks=num_blocks, max_model_len=self.max_model_len)
        self.blocks = BlockManager(num_blocks, self.layout.tokens_per_block, config.prefix_cache)
        budget = config.max_num_batched_tokens or 0
        self.scheduler = Scheduler(self.blocks, config.max_num_seqs, budget, config.mixed_steps)
        self.requests: dict[str, tuple[Request, Detokenizer]] = {}
        self.in_flight: deque[PlannedStep] = deque()
        self.stats = EngineStats()
        # Hears of every step when it is planned, with None, and again with its result.
        self.observe: Callable[[PlannedStep, StepResult | None], None] = lambda _, __: None

    def init_cache(self, config: EngineConfig, lower_max_model_len: bool) -> tuple[int, int]:
        """Size the cache by the ranks' room; its blocks, and the context length, lowered to it if nobody chose one."""
        ready = self.executor.wait_ready()
        self.weight_bytes, layout = max(r.bytes_read for r in ready), self.layout
        width = self.model_config.latent_dim * getattr(torch, config.dtype).itemsize
        block_bytes = self.model_config.num_hidden_layers * config.block_size * width
        max_model_len, num_blocks = config.max_model_len or 0, config.num_blocks
        if num_blocks is None:
            room = min(r.kv_bytes for r in ready) // block_bytes
            num_blocks = min(room, config.max_num_seqs * layout.num_blocks(max_model_len))
        capacity = num_blocks * layout.tokens_per_block
        if lower_max_model_len and 0 < capacity < max_model_len:
            logger.warning("--max-model-len lowered from %d to the KV cache's %d tokens", max_model_len, capacity)
            max_model_len = capacity
        held = f"{max(capacity, 0)} tokens ({num_blocks} blocks of {config.block_size} × dcp {config.dcp_size})"
        what = f"--max-model-len {max_model_len}: the KV cache holds {held}"
        require(capacity >= max_model_len, f"{what}; lower it, or raise --num-blocks or --dcp-size")
        self.executor.submit(num_blocks)
        self.executor.wait_ready()
        held = f"{num_blocks * config.block_size} tokens per rank, {capacity} in all (dcp {config.dcp_size})"
        held += f", {num_blocks // layout.num_blocks(max_model_len)} requests of {max_model_len} tokens"
        logger.info(f"weights: {self.weight_bytes / 1e6:.1f} MB read per rank; KV cache: {num_blocks} blocks, {held}")
        return num_blocks, max_model_len

    def add_request(self, request_id: str, prompt: str | list[int], params: SamplingParams) -> Request:
        """Queue a prompt. Raises ValueError if it is empty, too long, has unknown tokens, or needs a tokenizer."""
        require(request_id not in self.requests, f"request_id {request_id!r} is in use")
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        self.validate(tokens, params)
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        max_tokens = params.max_tokens or self.max_model_len - len(tokens)
        ends = (*params.stop_token_ids, *(() if params.ignore_eos else self.model_config.eos_token_ids))
        stop_ids = tuple(t for t in ends if t < self.model_config.vocab_size)
        request = Request(request_id, tokens, params, max_tokens, seed, stop_ids)
        self.requests[request_id] = request, Detokenizer(self.tokenizer, params)
        self.scheduler.add(request)
        return request

    def tokenize(self, text: str, special_tokens: bool = True, field: str = "prompt") -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds (BOS) or without. A text that must be
        too long is refused before that: tokenizing megabytes takes seconds."""
        if self.tokenizer is None:
            raise ValueError(f"{field}: the checkpoint has no tokenizer; give token ids instead of text")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can express
            raise ValueError(f"{field}: is not valid Unicode ({error.reason})") from None
        given = f"your {field} has {len(text)} characters, more than so many tokens can hold."
        self.require_fit(len(text) <= self.max_model_len * self.longest_token, given)
        return list(self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"])

    def require_fit(self, fits: bool, given: str) -> None:
        require(fits, f"This model's maximum context length is {self.max_model_len} tokens. However, {given}")

    def validate(self, tokens: list[int], params: SamplingParams) -> None:
        require(len(tokens) > 0, "prompt: is empty; give at least one token")
        vocab = self.model_config.vocab_size
        bad = next((t for t in tokens if not isinstance(t, int) or not 0 <= t < vocab), None)
        require(bad is None, f"prompt: token id {bad!r} is out of range; the vocabulary has {vocab} tokens")
        wanted, length = params.max_tokens or 1, len(tokens)
        given = f"you requested {length + wanted} tokens ({length} in the prompt, max_tokens {wanted})."
        self.require_fit(length + wanted <= self.max_model_len, f"{given} Shorten the prompt or lower max_tokens.")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            require((count or 0) <= vocab, f"{name} {count}: the vocabulary has {vocab} tokens")
        for name in ("logit_bias", "stop_token_ids"):
            unknown = next((t for t in getattr(params, name) if t >= vocab), None)
            require(unknown is None, f"{name} {unknown!r}: the vocabulary has {vocab} tokens")
        can_stop = not params.stop or self.tokenizer is not None
        require(can_stop, f"stop {params.stop!r}: the checkpoint has no tokenizer; use stop_token_ids")

    def abort(self, *request_ids: str) -> None:
        """Forget requests and free what they hold; unknown ids are ignored (one may just have finished)."""
        for request_id in request_ids:
            if entry := self.requests.pop(request_id, None):
                self.scheduler.finish(entry[0], FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        return bool(self.requests or self.in_flight)

    def step(self) -> list[OutputDelta]:
        """Plan and submit the next step, then take in the result of the one before it: planning overlaps with running.
        Returns what that older step added to each request."""
        planned = self.scheduler.schedule()
        if planned is not None:
            self.executor.submit(planned.plan)
            self.in_flight.append(planned)
            self.observe(planned, None)
        if not self.in_flight or (planned is not None and len(self.in_flight) == 1):
            return []
        result = self.executor.collect()  # if this is interrupted, the step is still in flight
        return self.take_in(self.in_flight.popleft(), result)

    def take_in(self, step: PlannedStep, result: StepResult) -> list[OutputDelta]:
        requests, plan = self.scheduler.update(step, result.tokens), step.plan
        logprobs = result.logprobs or [None] * len(requests)
        for (row, back, _), entry in zip(plan.scored, logprobs[len(requests) :], strict=True):
            step.requests[row].prompt_logprobs[plan.starts[row] + plan.lengths[row] - back] = entry
        deltas = [
            self.advance(request, token, entry)
            for request, token, entry in zip(requests, result.tokens, logprobs, strict=False)
            if request.finish_reason is None  # it ended while this step was in flight
        ]
        self.observe(step, result)
        stats = self.stats
        stats.received_bytes = result.received_bytes
        stats.steps += 1
        stats.step_seconds += result.seconds
        stats.prompt_tokens += len(plan.tokens)
        stats.generated_tokens += len(deltas)
        return deltas

    def advance(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> OutputDelta:
        """Add a sampled token to its request's text and finish the request if that ends it."""
        params, detokenizer = request.params, self.requests[request.request_id][1]
        stops = request.num_outputs > params.min_tokens and token in request.stop_ids
        is_last = stops or request.num_outputs >= request.max_tokens
        text = "" if stops else detokenizer.append(token)
        if is_last:
            text += detokenizer.flush()
        reason = None
        if is_last or detokenizer.stopped:
            reason = FinishReason.STOP if stops or detokenizer.stopped else FinishReason.LENGTH
            del self.requests[request.request_id]
            self.scheduler.finish(request, reason)
        of_prompt = request.prompt_logprobs if request.num_outputs == 1 else None
        return OutputDelta(request.request_id, text, (token,), reason, logprobs, request.cached_tokens, of_prompt)

    def kv_tokens(self) -> tuple[list[int], list[int]]:
        """How many tokens each rank's cache has room for, and how many of running requests it holds."""
        layout, running = self.layout, [request.num_computed for request in list(self.scheduler.running)]
        shards = [sum(layout.local_len(n, rank) for n in running) for rank in range(layout.size)]
        groups = self.config.tp_size // layout.size
        return [self.blocks.num_blocks * layout.block_size] * self.config.tp_size, shards * groups

    def close(self) -> None:
        self.executor.close()


def resolve(config: EngineConfig) -> tuple[EngineConfig, ModelConfig]:
    """Fill in every "auto" and check the configuration against the model and the machine."""
    path, device = find_model(config.model), config.device
    model_config = ModelConfig.from_hf(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    require(device == "cpu" or torch.cuda.is_available(), f"--device {device}: no CUDA device is available")
    config = fit(replace(config, model=str(path), device=device), model_config)
    for name in ("dcp_comm_backend", "exchange_policy", "q_proj"):
        if config.dcp_size == 1 and getattr(config, name) != getattr(EngineConfig, name):
            logger.warning(f"{flag(name)} {getattr(config, name)} has no effect with --dcp-size 1")
    config = replace(config, ranks=choose_ranks(config), comm=choose_comm(config))
    return replace(config, dcp_comm_backend=choose_exchange(config)), model_config


def fit(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """Fill in what follows from the model's shape and the device, which is no longer "auto"."""
    heads, longest = model.num_attention_heads, model.max_position_embeddings
    wanted = f"--tp-size {config.tp_size} must divide the model's {heads} attention heads"
    require(heads % config.tp_size == 0, f"{wanted}; possible: {divisors(heads)}")
    max_len, dtype, on_cpu = config.max_model_len or longest, config.dtype, config.device == "cpu"
    require(max_len <= longest, f"--max-model-len {max_len}: the model's positions end at {longest}")
    if dtype == "auto":  # on a CPU bf16 is slower and less exact than fp32
        dtype = "float32" if on_cpu else "bfloat16"
    batched = config.max_num_batched_tokens or max(2048 if on_cpu else 8192, config.max_num_seqs)
    return replace(config, dtype=dtype, max_model_len=max_len, max_num_batched_tokens=batched)


def choose_ranks(config: EngineConfig) -> str:
    """What ranks are for `--ranks auto`: torchrun's processes if there are any, else our own, or one thread."""
    ranks, one = config.ranks, config.tp_size == 1
    require(ranks != "torchrun" or under_torchrun(), "--ranks torchrun: start the program with torchrun")
    if under_torchrun():
        world = int(os.environ["WORLD_SIZE"])
        require(world == config.tp_size, f"--tp-size {config.tp_size}: torchrun started {world} processes")
        require(ranks in ("auto", "torchrun"), f"--ranks {ranks}: under torchrun its processes are the ranks")
        return "torchrun"
    possible = ranks != "threads" or config.device == "cpu" or one
    require(possible, "--ranks threads: several ranks on GPUs are processes; use --ranks processes")
    return ranks if ranks != "auto" else "threads" if one and config.device == "cpu" else "processes"


def choose_comm(config: EngineConfig) -> str:
    """Collectives for `--comm auto`: symmetric memory where all ranks can read each other's GPU."""
    if config.device == "cpu":
        require(config.comm in ("auto", "gloo"), f"--comm {config.comm}: needs GPUs; CPUs use gloo")
        return "gloo"
    require(config.comm != "gloo", "--comm gloo: is for CPUs; use symmetric or nccl")
    if config.tp_size == 1:
        return "nccl" if config.comm == "auto" else config.comm
    gpus = torch.cuda.device_count()
    one_node = not under_torchrun() or int(os.environ["LOCAL_WORLD_SIZE"]) == config.tp_size
    pairs = itertools.permutations(range(min(gpus, config.tp_size)), 2)
    peers = all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    why = "" if one_node and peers else "the ranks are on several nodes" if peers else "the GPUs are not peers"
    require(config.comm != "symmetric" or not why, f"--comm symmetric: {why}; use nccl")
    comm = ("nccl" if why else "symmetric") if config.comm == "auto" else config.comm
    logger.info("collectives: %s (%s)", comm, why or "one node, and every GPU can read its peers' memory")
    if config.tp_size > gpus and one_node:
        require(comm == "symmetric", f"--tp-size {config.tp_size}: {comm} needs a GPU per rank, there are {gpus}")
        logger.warning("%d ranks share %d GPUs: right for tests, not for speed", config.tp_size, gpus)
    return comm


def choose_exchange(config: EngineConfig) -> str:
    """The exchange for `--dcp-comm-backend auto`: p2p where ranks can read each other's memory, else a2a."""
    symmetric, exchange = config.comm == "symmetric", config.dcp_comm_backend
    possible, needs = symmetric or exchange != "p2p" or config.dcp_size == 1, "symmetric memory (GPUs of one node)"
    require(possible, f"--dcp-comm-backend p2p: needs {needs}, not --comm {config.comm}; use a2a")
    return exchange if exchange != "auto" else "p2p" if symmetric else "a2a"
