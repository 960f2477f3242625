"""One rank's model, cache and step: a StepPlan in, sampled tokens out. How plans arrive, and what
happens when a rank fails, is in `worker.py`. Next: `cuda_graph.py`."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from minidcp.attention import make_backend
from minidcp.attention.context import ContextPolicy
from minidcp.batch import MAX_SCORED_TOKENS, Admission, BlockTables, ForwardBatch, StepPlan
from minidcp.kernels.tokens import read_tokens
from minidcp.kv_cache.interleave import Interleave
from minidcp.model_config import ModelConfig
from minidcp.models.layers import MoE
from minidcp.parallel.state import ParallelState, count_ranks_per_gpu
from minidcp.request import SamplingParams
from minidcp.resolve import ResolvedConfig
from minidcp.worker.cuda_graph import DecodeGraphs, PredictionGraphs
from minidcp.worker.drafts import find_drafts, judge
from minidcp.worker.loader import ModelLoader
from minidcp.worker.pending import PendingResult
from minidcp.worker.predictor import Predictor
from minidcp.worker.prompt_graphs import PromptGraphs
from minidcp.worker.sampler import Sampled, Sampler

logger = logging.getLogger("minidcp")

# Of all ranks together on a CPU. The system gives memory only as tokens are written.
CPU_KV_BYTES = 2 << 30
# Left free on a GPU, for CUDA graphs of decode steps and for what libraries allocate later.
GRAPH_BYTES = 1 << 29


class ModelRunner:
    """Runs steps on one rank. Every rank gets the same plans in the same order.

    Raises ValueError if the checkpoint does not fit its config.json.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        model_config: ModelConfig,
        state: ParallelState,
        device: torch.device,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.state = state
        self.device = device
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.interleave = Interleave(config.dcp_size, config.block_size)
        self.attention = make_backend(config, model_config, device)
        self.policy = ContextPolicy(
            config=model_config,
            num_heads=model_config.num_attention_heads // config.tp_size,
            layout=self.interleave,
            strategy=config.prefill_strategy,
            workspace=config.max_num_batched_tokens,
        )
        self.log(
            f"attention: {self.attention.name}; groups: {type(state.tp).__name__}; "
            f"exchange: {describe_exchange(config)}; quantization: {config.quantization}"
        )

        loader = ModelLoader(config, model_config, state, device, self.attention, self.log)
        self.model, prediction_layer = loader.load()
        self.model_config = loader.model_config
        self.bytes_read = loader.bytes_read
        width = self.interleave.num_blocks(config.max_model_len)
        self.tables = BlockTables(config.max_num_seqs, width)
        # By request slot: the token that was sampled last, which is the next decode row's input,
        # and the drafts behind it. The last place is for tokens that do not count.
        shape = (config.max_num_seqs + 1, 1 + config.num_predicted)
        self.last_tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.sampler = Sampler()
        self.predictor: Predictor | None = None
        if prediction_layer is not None:
            self.predictor = Predictor(
                prediction_layer, config, state, self.tables, self.interleave
            )
        self.cache: Tensor | None = None
        self.graphs: DecodeGraphs | None = None
        self.prompt_graphs: PromptGraphs | None = None

    def log(self, message: str, level: int = logging.INFO) -> None:
        """Rank 0 speaks for all ranks."""
        if self.state.tp.rank == 0:
            logger.log(level, message)

    # Memory.

    def measure_kv_bytes(self) -> int:
        """How much memory this rank's cache may take: what a step of the largest size leaves."""
        if self.device.type == "cpu":
            return CPU_KV_BYTES // self.state.tp.size
        torch.cuda.empty_cache()  # give back what loading needed
        self.warm_up(self.list_warm_up_sizes())
        if self.config.cuda_graph and self.attention.graphs:
            self.make_prompt_graphs()
            self.warm_up([self.config.max_num_batched_tokens])  # what is not in the graphs
        # What the largest step needed stays with torch's allocator, so it is not free any more.
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = int(total * (1 - self.config.gpu_memory_utilization)) + GRAPH_BYTES
        return (free - reserved) // count_ranks_per_gpu(self.state.tp.size)

    @torch.inference_mode()
    def warm_up(self, sizes: Sequence[int]) -> None:
        """Run steps of these numbers of tokens, which rise, with long contexts, storing nothing.

        The largest step takes the memory that steps need. All that `list_warm_up_sizes` has
        together compile every kernel, so that no request waits for a compiler.
        """
        num_layers = self.config.count_cache_layers(self.model_config)
        self.set_cache(self.make_cache(1, 1).expand(num_layers, -1, -1, -1))
        strategies = [self.policy.strategy]
        if self.policy.strategy == "cheaper":
            strategies = ["gather_kv", "gather_q"]
        chosen_policy = self.policy
        for size in reversed(sizes):
            plan = self.plan_warm_up(size)
            for strategy in strategies:
                self.policy = replace(chosen_policy, strategy=strategy)
                batch = self.build_batch(plan)
                nowhere = torch.full_like(batch.slot_mapping, -1)
                batch = replace(batch, slot_mapping=nowhere)
                logits, best, hidden = self.forward(batch, self.find_prompt_graphs(plan))
                if self.predictor is not None:
                    self.predictor.make_drafts(plan, batch, hidden, best)
        self.policy = chosen_policy

        # What sampling gathers, at least and at most. Few rows go by mail, which is another kernel.
        for rows in (1, self.config.max_num_seqs + MAX_SCORED_TOKENS):
            self.model.lm_head.gather(logits.new_empty(rows, logits.shape[1]))
        torch.cuda.synchronize(self.device)

    def list_warm_up_sizes(self) -> list[int]:
        """Numbers of tokens that together use every variant of every kernel, in rising order.

        Those are the powers of two, and the sizes at which other kernels of the experts take over.
        """
        budget = self.config.max_num_batched_tokens
        sizes = {budget}
        sizes.update(1 << i for i in range(budget.bit_length()))
        last_mlp = self.model.layers[-1].mlp
        if isinstance(last_mlp, MoE):
            sizes.update(last_mlp.token_limits)
        return sorted(size for size in sizes if size <= budget)

    def plan_warm_up(self, size: int) -> StepPlan:
        """A step of `size` tokens: one decode row, if it fits, and prompts with long contexts.

        Every prompt ends at max_model_len, so that its context is as long as can be. Prompts get
        longer where otherwise they would be more than max_num_seqs rows.
        """
        max_num_seqs = self.config.max_num_seqs
        longest = self.config.max_model_len
        num_decode = min(1, size - 1, max_num_seqs - 1)
        plan = StepPlan(
            num_decode=num_decode,
            slots=[0] * num_decode,
            starts=[longest - 1] * num_decode,
            lengths=[1] * num_decode,
            sampling=[0] * num_decode,
            room=[longest] * num_decode,
        )
        tokens_left = size - num_decode
        while tokens_left > 0 and len(plan.slots) < max_num_seqs:
            rows_left = max_num_seqs - len(plan.slots)
            half_the_context = -(-longest // 2)
            share_of_the_rest = -(-tokens_left // rows_left)
            length = min(tokens_left, longest, max(half_the_context, share_of_the_rest))
            row = len(plan.slots)
            plan.sampling.append(row)
            plan.slots.append(row)
            plan.starts.append(longest - length)
            plan.lengths.append(length)
            plan.tokens += [0] * length
            plan.followers.append(-1)
            plan.room.append(longest)
            tokens_left -= length
        return plan

    def make_cache(self, num_layers: int, num_blocks: int) -> Tensor:
        """The memory behind the block ids: [num_layers, num_blocks, block_size, C + rope].

        MLA stores one vector per token that all heads share: the normed latent and the rotated
        part of the key. It is zeroed once. Kernels may read unused slots and mask what they get,
        and NaN would come through.
        """
        block_size = self.config.block_size
        shape = (num_layers, num_blocks, block_size, self.model_config.latent_dim)
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # numpy's zeros take memory only where something is written.
        memory = np.zeros(math.prod(shape) * self.dtype.itemsize, np.uint8)
        return torch.from_numpy(memory).view(self.dtype).view(shape)

    def set_cache(self, cache: Tensor) -> None:
        num_layers = self.model_config.num_hidden_layers
        self.cache = cache[:num_layers]
        if self.predictor is not None:
            self.predictor.kv = cache[num_layers]

    def allocate_cache(self, num_blocks: int) -> None:
        """Allocate the cache, and capture the graphs over it."""
        num_layers = self.config.count_cache_layers(self.model_config)
        self.set_cache(self.make_cache(num_layers, num_blocks))
        if self.device.type != "cuda":
            return
        if self.config.cuda_graph and self.attention.graphs:
            self.make_graphs()
        elif self.config.cuda_graph:
            name = self.attention.name
            self.log(f"no CUDA graphs: {name} cannot be captured", logging.WARNING)
        if self.config.num_speculative_tokens > 0:
            self.warm_up_drafts()

    @torch.inference_mode()
    def make_prompt_graphs(self) -> None:
        """They do not touch the cache. So they come first, and it gets the memory they leave."""
        start = time.perf_counter()
        most_tokens = self.config.max_num_batched_tokens
        self.prompt_graphs = PromptGraphs(self.model, self.state, most_tokens)
        num_graphs = sum(map(len, self.prompt_graphs.steps.values()))
        seconds = time.perf_counter() - start
        self.log(f"captured {num_graphs} CUDA graphs of pieces of prompts in {seconds:.1f} s")

    @torch.inference_mode()
    def make_graphs(self) -> None:
        start = time.perf_counter()
        # Graphs for prompts leave nothing in their memory, so these can share it.
        pool = None if self.prompt_graphs is None else self.prompt_graphs.pool
        self.graphs = DecodeGraphs(
            self.forward, self.attention, self.config, self.state, self.tables, self.device, pool
        )
        num_graphs = len(self.graphs.sizes)
        if self.predictor is not None:
            self.predictor.graphs = PredictionGraphs(
                self.predictor.predict, self.graphs, self.model_config.hidden_size, self.dtype
            )
            num_graphs *= 2
        seconds = time.perf_counter() - start
        self.log(f"captured {num_graphs} CUDA graphs of decode steps in {seconds:.1f} s")

    def warm_up_drafts(self) -> None:
        """Run steps with a draft. Loading what only these use takes 10 ms, and the engine would
        take that for the price of drafts. They write to block 0, which nobody owns yet."""
        for temperature in (0.0, 1.0):
            plan = StepPlan(
                num_decode=1,
                slots=[0],
                starts=[0],
                lengths=[2],
                drafts=[0],
                sampling=[0, 0],
                room=[2],
                admitted=[Admission(0, SamplingParams(temperature=temperature))],
            )
            self.execute(plan).wait()

    # Steps.

    def build_batch(self, plan: StepPlan) -> ForwardBatch:
        rank = self.state.dcp.rank
        exchanges_narrow = self.config.exchanges_narrow
        context = self.policy.build_context(plan, self.tables, rank, exchanges_narrow, self.device)
        batch = ForwardBatch.build(
            plan, self.tables, self.interleave, rank, exchanges_narrow, self.device, context
        )
        for queries in batch.cache_queries:
            self.attention.plan(queries)
        return batch

    def forward(
        self, batch: ForwardBatch, prompt_graphs: PromptGraphs | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's logits [S + K, V / tp] of a batch, the most likely tokens [S] and the hidden
        states [T, hidden], which are left out if no drafts are made of them.

        It runs eagerly, but for what `prompt_graphs` have, and while a graph is captured.
        """
        assert self.cache is not None
        self.state.begin_step()
        token_ids = self.read_decode_tokens(batch)
        if len(batch.prefill_tokens) > 0:
            token_ids = torch.cat([token_ids, batch.prefill_tokens.long()])
        make_pieces = None if prompt_graphs is None else prompt_graphs.start
        logits, hidden = self.model(token_ids, self.cache, batch, make_pieces)
        if self.predictor is None:
            hidden = hidden.new_empty(0)  # a graph would keep them

        num_sampled = len(batch.sample_slots)
        if num_sampled == 0:
            return logits, token_ids[:0], hidden
        return logits, self.model.lm_head.choose_best(logits[:num_sampled]), hidden

    def read_decode_tokens(self, batch: ForwardBatch) -> Tensor:
        """The tokens of the decode rows [D]."""
        if batch.decode_tokens is None:
            return self.last_tokens[batch.decode_slots, 0]
        return read_tokens(batch.decode_tokens, self.last_tokens, batch.decode_slots)

    def can_replay(self, plan: StepPlan) -> bool:
        """Whether one CUDA graph runs this step. All ranks decide alike.

        Prompts in graphs are decode rows. Their kernels are not launched one by one, which takes
        the host up to a millisecond a layer, however few tokens there are.
        """
        if self.graphs is None:
            return False
        is_pure_decode = plan.num_decode == len(plan.slots)
        if is_pure_decode:
            return True
        return self.graphs.has_room(plan.num_tokens) and self.policy.suits_decode(plan)

    def find_prompt_graphs(self, plan: StepPlan) -> PromptGraphs | None:
        """The graphs for the pieces of a step, if it is not too large for them."""
        graphs = self.prompt_graphs
        return graphs if graphs is not None and graphs.has_room(plan.num_tokens) else None

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingResult:
        """Start one step. On a GPU the host does not wait for it.

        Only the result of rank 0 has tokens.
        """
        begin: float | torch.cuda.Event = time.perf_counter()
        if self.device.type == "cuda":
            begin = torch.cuda.Event(enable_timing=True)
            begin.record()

        self.tables.update(plan)
        self.sampler.admit(plan)
        if self.graphs is not None and self.can_replay(plan):
            batch, logits, best, hidden = self.graphs.replay(plan)
        else:
            batch = self.build_batch(plan)
            logits, best, hidden = self.forward(batch, self.find_prompt_graphs(plan))
        decode_tokens = None
        if plan.drafts:
            decode_tokens = self.read_decode_tokens(batch)[: plan.num_decode_tokens]
        sampled, tokens = self.sample(plan, logits, best, decode_tokens)

        sample_slots = batch.sample_slots
        verdict = None
        drafts = None
        if decode_tokens is not None:
            verdict = judge(tokens, plan, decode_tokens)
            nowhere = len(self.last_tokens) - 1
            sample_slots = torch.where(verdict.is_last, sample_slots, nowhere)
            if self.predictor is not None and self.state.tp.rank == 0:
                drafts = find_drafts(plan, decode_tokens)
        if plan.sampling:
            self.last_tokens[sample_slots, 0] = tokens
        if self.predictor is not None:
            made = self.predictor.make_drafts(plan, batch, hidden, tokens, verdict)
            if made is not None:
                self.last_tokens[made.slots, 1:] = made.tokens
        return PendingResult(sampled, drafts, begin, self.state.received_bytes)

    def sample(
        self, plan: StepPlan, logits: Tensor, best: Tensor, decode_tokens: Tensor | None
    ) -> tuple[Sampled, Tensor]:
        """What to report, on rank 0 only; and the tokens [S] of the sampling rows, on all ranks."""
        nothing = Sampled(best[:0])
        if not plan.sampling and not plan.scored:
            return nothing, best
        if self.sampler.reads_logits(plan):
            # A replayed graph leaves the groups' buffers as its capture left them. The collectives
            # from here on are in no graph, so they begin anew.
            self.state.begin_step()
            logits = self.model.lm_head.gather(logits)

        sampled = nothing
        tokens = best
        if self.state.tp.rank == 0:
            sampled = self.sampler.sample(logits, plan, best, decode_tokens)
            tokens = sampled.tokens[: len(best)]
        if plan.sampling and not self.sampler.takes_best(plan):
            # Rank 0 decides for all: two ranks that round differently must not go separate ways.
            tokens = self.state.tp.all_gather(tokens)[:, 0]
        return sampled, tokens


def describe_exchange(config: ResolvedConfig) -> str:
    """For the log."""
    if config.dcp_size == 1:
        return "none"
    policy = config.exchange_policy
    if policy == "by_batch":
        policy = f"narrow from {config.narrow_threshold} rows on"
    return f"{config.dcp_comm_backend}, {policy}"
