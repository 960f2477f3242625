"""One rank's model, cache and step: a StepPlan in, sampled tokens out.

How plans arrive and what happens when a rank fails is `worker.py`'s.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minidcp.attention import make_backend
from minidcp.batch import BlockTables, ForwardBatch, StepPlan
from minidcp.config import EngineConfig, ModelConfig
from minidcp.engine.sampler import sample
from minidcp.kv_cache.interleave import Interleave
from minidcp.kv_cache.latent_cache import LatentCache
from minidcp.models.deepseek_v2 import DeepseekV2ForCausalLM
from minidcp.models.weights import CheckpointSource, RecordingSource, Weights, WeightSource
from minidcp.parallel.exchange import EXCHANGES
from minidcp.parallel.state import ParallelState
from minidcp.request import TokenLogprobs

logger = logging.getLogger("minidcp")

CPU_KV_BYTES = 2 << 30  # of all ranks together; pages are taken only when tokens are written


@dataclass(frozen=True)
class StepResult:
    """One token per sampling row of the plan, in order, and log-probabilities if any row asked."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    seconds: float = 0.0  # from the plan's arrival on rank 0 to its tokens


class ModelRunner:
    """Runs steps on one rank. Every rank gets the same plans in the same order.

    Raises:
        ValueError: the checkpoint does not fit its config.json.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        state: ParallelState,
        device: torch.device,
    ) -> None:
        assert config.max_model_len is not None  # engine.py hands out resolved configurations
        self.config, self.model_config, self.state = config, model_config, state
        self.device, self.dtype = device, getattr(torch, config.dtype)
        self.max_model_len = config.max_model_len
        self.interleave = Interleave(config.dcp_size, config.block_size)
        self.attention = make_backend(config.attention_backend, model_config.softmax_scale)
        source = CheckpointSource(Path(config.model), self.dtype, device, progress=state.rank == 0)
        wanted = RecordingSource()
        self.build(wanted)
        source.check(wanted.shapes)
        self.model = self.build(source)
        source.close()
        self.bytes_read = source.bytes_read
        self.tables = BlockTables(config.max_num_seqs, self.interleave.num_blocks(self.max_model_len) + 1)
        self.last_tokens = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=device)
        self.cache: LatentCache | None = None

    def build(self, source: WeightSource) -> DeepseekV2ForCausalLM:
        return DeepseekV2ForCausalLM(
            self.model_config,
            self.state,
            Weights(source),
            self.attention,
            EXCHANGES[self.config.dcp_comm_backend],
            self.config.may_exchange_narrow,
            self.max_model_len,
        )

    def measure_kv_bytes(self) -> int:
        """How much memory this rank's cache may take."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return free - int(total * (1 - self.config.gpu_memory_utilization))
        return CPU_KV_BYTES // self.state.tp.size

    def allocate_cache(self, num_blocks: int) -> None:
        layers, width = self.model_config.num_hidden_layers, self.model_config.latent_dim
        self.cache = LatentCache(layers, num_blocks, self.config.block_size, width, self.dtype, self.device)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult | None:
        """Run one step; the result on rank 0, None elsewhere."""
        assert self.cache is not None
        start = time.perf_counter()
        self.tables.update(plan)
        narrow = self.config.exchanges_narrow(plan.num_decode)
        batch = ForwardBatch.build(
            plan, self.tables, self.interleave, self.state.dcp.rank, narrow, self.device
        )
        d = plan.num_decode
        batch.token_ids[:d] = self.last_tokens[batch.decode_slots]
        logits = self.model(batch.token_ids, self.cache, batch)
        if not plan.sample.rows:
            return StepResult([], None, time.perf_counter() - start) if self.state.rank == 0 else None
        # Rank 0 samples for all: two ranks that round differently must not go separate ways.
        sampled = sample(logits, plan.sample) if self.state.rank == 0 else None
        own = sampled.tokens if sampled is not None else torch.empty_like(batch.sample_slots)
        tokens = self.state.tp.broadcast(own)
        self.last_tokens[batch.sample_slots] = tokens
        if sampled is None:
            return None
        return StepResult(tokens.tolist(), sampled.logprobs, time.perf_counter() - start)
