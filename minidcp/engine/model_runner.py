"""One rank's model, cache and step: a StepPlan in, sampled tokens out. How plans arrive and what happens when a rank
fails is `worker.py`'s; graphs are `cuda_graph.py`'s."""

import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minidcp.attention import make_backend
from minidcp.batch import BlockTables, ContextPolicy, ForwardBatch, StepPlan
from minidcp.config import EngineConfig
from minidcp.engine.cuda_graph import DecodeGraphs
from minidcp.engine.sampler import Sampled, Sampler
from minidcp.engine.scheduler import MAX_SCORED
from minidcp.kv_cache.interleave import Interleave
from minidcp.model_config import ModelConfig
from minidcp.models.deepseek_v2 import Blueprint, DeepseekV2ForCausalLM
from minidcp.models.layers import MoE
from minidcp.models.weights import CheckpointSource, RandomSource, RecordingSource, Weights, WeightSource
from minidcp.parallel.exchange import EXCHANGES
from minidcp.parallel.state import ParallelState, count_ranks_per_gpu
from minidcp.request import TokenLogprobs

logger = logging.getLogger("minidcp")

CPU_KV_BYTES = 2 << 30  # of all ranks together; pages are taken only when tokens are written
GRAPH_BYTES = 1 << 30  # left free for CUDA graphs and what libraries take later


@dataclass(frozen=True)
class StepResult:
    """A token per sampling row, in order; log-probabilities of these and the scored tokens, if any are wanted."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    seconds: float = 0.0  # of the step on rank 0, without waiting for it to begin
    received_bytes: int = 0  # by rank 0 from other ranks, since the start


class PendingResult:
    """A step that the device may still be working on; `wait` gives its result. The copy to the host is started here,
    so that nothing else has to wait for the device."""

    def __init__(self, sampled: Sampled, begin: float | torch.cuda.Event, received_bytes: int) -> None:
        self.sampled, self.begin, self.received_bytes = sampled, begin, received_bytes
        if isinstance(begin, torch.cuda.Event):
            self.end = torch.cuda.Event(enable_timing=True)
            self.sampled = sampled.map(lambda x: torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, True))
            self.end.record()

    def wait(self) -> StepResult:
        if isinstance(self.begin, torch.cuda.Event):
            self.end.synchronize()
            seconds = self.begin.elapsed_time(self.end) * 1e-3
        else:
            seconds = time.perf_counter() - self.begin
        tokens = self.sampled.tokens[: self.sampled.num_sampled].tolist()
        return StepResult(tokens, self.sampled.list_logprobs(), seconds, self.received_bytes)


class ModelRunner:
    """Runs steps on one rank. Every rank gets the same plans in the same order. Raises ValueError if the checkpoint
    does not fit its config.json, or the back-end cannot run here."""

    def __init__(
        self, config: EngineConfig, model_config: ModelConfig, state: ParallelState, device: torch.device
    ) -> None:
        assert config.max_model_len is not None  # engine.py hands out resolved configurations
        self.config, self.model_config, self.state = config, model_config, state
        self.device, self.dtype = device, getattr(torch, config.dtype)
        self.max_model_len, self.budget = config.max_model_len, config.max_num_batched_tokens or 0
        self.interleave = Interleave(config.dcp_size, config.block_size)
        self.attention = make_backend(config, model_config, device)
        heads, strategy = model_config.num_attention_heads // config.tp_size, config.prefill_strategy
        if strategy == "auto" and self.attention.name == "reference":  # it gathers the context for every row
            strategy = "gather_kv"
        self.policy = ContextPolicy(model_config, heads, self.interleave, strategy, self.budget)
        exchange = config.dcp_comm_backend if config.dcp_size > 1 else "none"
        groups = f"groups: {type(state.tp).__name__}; exchange: {exchange}, {config.exchange_policy}"
        self.log(f"attention: {self.attention.name}; {groups}")
        self.model, self.bytes_read = self.load()
        self.tables = BlockTables(config.max_num_seqs, self.interleave.num_blocks(self.max_model_len) + 1)
        # By slot; the last place is for the padded rows of CUDA graphs.
        self.last_tokens = torch.zeros(config.max_num_seqs + 1, dtype=torch.int64, device=device)
        self.sampler = Sampler()
        self.cache: Tensor | None = None
        self.graphs: DecodeGraphs | None = None

    def log(self, message: str, level: int = logging.INFO) -> None:
        """Rank 0 speaks for all."""
        if self.state.tp.rank == 0:
            logger.log(level, message)

    def load(self) -> tuple[DeepseekV2ForCausalLM, int]:
        """The model and how many bytes of weights were read for it."""
        if self.config.load_format == "dummy":
            random = RandomSource(self.dtype, self.device)
            return self.build(random), random.bytes_read
        source = CheckpointSource(Path(self.config.model), self.dtype, self.device, progress=self.state.tp.rank == 0)
        wanted = RecordingSource()
        self.build(wanted)
        source.check(wanted.shapes)
        model = self.build(source)
        source.close()
        return model, source.bytes_read

    def build(self, source: WeightSource) -> DeepseekV2ForCausalLM:
        c, exchange = self.config, EXCHANGES[self.config.dcp_comm_backend]
        heads = c.needs_group_heads, c.replicates_q
        blueprint = Blueprint(self.model_config, self.state, self.attention, exchange, *heads)
        return DeepseekV2ForCausalLM(blueprint, Weights(source), self.max_model_len)

    def measure_kv_bytes(self) -> int:
        """How much memory this rank's cache may take: what a step of the largest size leaves over."""
        if self.device.type == "cpu":
            return CPU_KV_BYTES // self.state.tp.size
        torch.cuda.empty_cache()  # of what loading needed
        self.run_prefills()
        free, total = torch.cuda.mem_get_info(self.device)
        reserve = int(total * (1 - self.config.gpu_memory_utilization)) + GRAPH_BYTES
        # What the step needed stays with the allocator, so it is not free any more.
        return (free - reserve) // count_ranks_per_gpu(self.state.tp.size)

    @torch.inference_mode()
    def run_prefills(self) -> None:
        """Steps of up to max_num_batched_tokens tokens on as much context, which store nothing. What the largest needs
        is the allocator's from then on; at these sizes all kernels are compiled, so that no request waits for it."""
        bounds = {n for layer in self.model.layers[-1:] if isinstance(layer.mlp, MoE) for n in layer.mlp.bounds}
        sizes = [n for n in {*bounds, *(1 << i for i in range(31)), self.budget} if n <= self.budget]
        self.cache = self.make_cache(1, 1).expand(self.model_config.num_hidden_layers, -1, -1, -1)
        policy, longest = self.policy, self.max_model_len
        for size in sorted(sizes, reverse=True):
            d = min(1, size - 1, self.config.max_num_seqs - 1)
            left, plan = size - d, StepPlan(d, [0] * d, [longest - 1] * d, [1] * d, sampling=[0] * d)
            while left and (rows := self.config.max_num_seqs - len(plan.slots)):
                length = min(left, longest, max(-(-longest // 2), -(-left // rows)))
                plan.sampling.append(len(plan.slots))
                plan.slots.append(len(plan.slots))
                plan.starts.append(longest - length)
                plan.lengths.append(length)
                plan.tokens += [0] * length
                left -= length
            for strategy in ("gather_kv", "gather_q") if policy.strategy == "auto" else (policy.strategy,):
                self.policy = replace(policy, strategy=strategy)
                batch = self.build_batch(plan)
                logits, _ = self.forward(replace(batch, slot_mapping=torch.full_like(batch.slot_mapping, -1)))
        self.policy = policy
        self.model.lm_head.gather(logits.new_empty(self.config.max_num_seqs + MAX_SCORED, logits.shape[1]))
        torch.cuda.synchronize(self.device)

    def make_cache(self, layers: int, num_blocks: int) -> Tensor:
        """The tensors behind the block ids. MLA stores one vector per token that all heads share: the normed latent and
        the rotated key part. Zeroed once: kernels may read (and mask) unused slots, and NaN would come through."""
        shape = layers, num_blocks, self.config.block_size, self.model_config.latent_dim
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        memory = np.zeros(math.prod(shape) * self.dtype.itemsize, np.uint8)  # taken only where something is written
        return torch.from_numpy(memory).view(self.dtype).view(shape)

    def allocate_cache(self, num_blocks: int) -> None:
        """Allocate the cache and capture the decode graphs over it."""
        self.cache = self.make_cache(self.model_config.num_hidden_layers, num_blocks)
        if self.device.type != "cuda" or not self.config.cuda_graph:
            return
        if not self.attention.graphs:
            self.log(f"no CUDA graphs: {self.attention.name} cannot be captured", logging.WARNING)
            return
        start = time.perf_counter()
        with torch.inference_mode():
            self.graphs = DecodeGraphs(self.forward, self.config, self.state, self.tables, self.device)
        self.log(f"captured {len(self.graphs.sizes)} CUDA graphs in {time.perf_counter() - start:.1f} s")

    def build_batch(self, plan: StepPlan) -> ForwardBatch:
        narrow, rank = self.config.exchanges_narrow, self.state.dcp.rank
        return ForwardBatch.build(plan, self.tables, self.policy, rank, narrow, self.device)

    def forward(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """A step up to this rank's logits [S + K, V / N] and the best tokens [S], which become the slots' last ones."""
        assert self.cache is not None
        self.state.begin_step()
        token_ids = self.last_tokens[batch.decode_slots]
        if len(batch.prefill_tokens):
            token_ids = torch.cat([token_ids, batch.prefill_tokens.long()])
        logits = self.model(token_ids, self.cache, batch)
        if not len(batch.sample_slots):
            return logits, self.last_tokens[:0]
        best = self.model.lm_head.choose_best(logits[: len(batch.sample_slots)])
        self.last_tokens[batch.sample_slots] = best
        return logits, best

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingResult:
        """Start one step; only rank 0's result has tokens. On a GPU the host does not wait for it."""
        begin: float | torch.cuda.Event = time.perf_counter()
        if self.device.type == "cuda":
            begin = torch.cuda.Event(enable_timing=True)
            begin.record()
        self.tables.update(plan)
        self.sampler.admit(plan)
        if self.graphs is not None and plan.num_decode == len(plan.slots):
            logits, tokens = self.graphs.replay(plan)
            slots = self.graphs.inputs[2, : plan.num_decode]
        else:
            batch = self.build_batch(plan)
            logits, tokens = self.forward(batch)
            slots = batch.sample_slots
        sampled = Sampled(tokens[:0])
        if plan.sampling or plan.scored:
            if self.sampler.reads_logits(plan):
                self.state.begin_step()  # these collectives are in no graph
                logits = self.model.lm_head.gather(logits)
            if self.state.tp.rank == 0:
                sampled = self.sampler.sample(logits, plan, tokens)
                tokens = sampled.tokens[: len(tokens)]
            if len(tokens) and not self.sampler.takes_best(plan):
                # Rank 0 decides for all: two ranks that round differently must not go separate ways.
                self.last_tokens[slots] = self.state.tp.all_gather(tokens)[:, 0]
        return PendingResult(sampled, begin, self.state.received_bytes)
