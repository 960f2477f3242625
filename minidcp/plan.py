"""Estimates from config.json alone what fits on a deployment's GPUs and how fast it would decode.

It counts memory the way the engine does. A decode step is a sum of parts, each estimated as its
roofline floor corrected by costs fitted to measured steps. Prompts are not modelled."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

from minidcp.config import EngineConfig, require
from minidcp.hardware import DEFAULT_CAPABILITY, GPUS
from minidcp.kv_cache.interleave import Interleave
from minidcp.machine import Machine
from minidcp.model_config import ModelConfig
from minidcp.models.weights import find_model
from minidcp.parallel.symmetric import ONE_SHOT_BYTES
from minidcp.plan_drafts import Pass, check_acceptance, count_drafts, expect_accepted, list_passes
from minidcp.plan_memory import count_bytes_beside_cache, get_itemsize
from minidcp.plan_weights import count_weights
from minidcp.resolve import FP8_CAPABILITY, ResolvedConfig, resolve

FLOAT32_BYTES = 4


class Cost(NamedTuple):
    """How long a part of a step takes, given its floor:
    floor × times_floor + calls × (us_per_call + us_per_row × rows)."""

    times_floor: float
    us_per_call: float
    us_per_row: float


# Fitted to one rank of DeepSeek-V2 in bf16 on an H200, as measured in docs/benchmarks.md, and used
# for FP8, too. The cost of a collective is that of the p2p kernel, run alone.
COSTS = {
    "attention": Cost(times_floor=1.84, us_per_call=14.0, us_per_row=0.0),
    "experts": Cost(times_floor=1.0, us_per_call=16.0, us_per_row=0.16),
    "projections": Cost(times_floor=1.3, us_per_call=21.0, us_per_row=0.0),
    "exchange": Cost(times_floor=1.0, us_per_call=4.0, us_per_row=0.0),
    "rest": Cost(times_floor=0.0, us_per_call=3.0, us_per_row=0.03),
}


class Floor(NamedTuple):
    """The least time that a part of a step can take, over all layers."""

    seconds: float
    calls: int  # layers that have this part; for the exchange, collectives


class Traffic(NamedTuple):
    """What one rank receives from its peers in one decode step."""

    received_bytes: float
    collectives: int


class Deployment:
    """One rank of a deployment whose requests are `context` tokens long on average.

    `gpu` has the numbers that `hardware.GPUS` lists. `acceptance` is how likely a draft is right if
    those before it are; without it no drafts are counted. Raises ValueError, saying why, if the
    weights or one such request do not fit."""

    def __init__(
        self,
        config: EngineConfig,
        gpu: dict[str, float],
        context: int,
        acceptance: float | None = None,
    ) -> None:
        path = find_model(config.model, ("config.json",))
        self.model_config = ModelConfig.from_hf(path)
        config = replace(config, model=str(path))
        self.config = resolve_for_gpus(config, self.model_config, gpu)
        self.layout = Interleave(config.dcp_size, config.block_size)
        self.itemsize = get_itemsize(self.config)
        self.gpu = gpu
        self.context = context
        self.acceptance = acceptance
        self.check_context()
        check_acceptance(acceptance, self.config)

        self.weights, self.prediction_weights = count_weights(self.config, self.model_config)
        held_bytes = self.weights.num_bytes + self.prediction_weights.num_bytes
        self.weight_bytes = held_bytes + self.rotary_bytes
        max_blocks = self.count_max_blocks()
        num_blocks = config.num_blocks
        if num_blocks is None:
            num_blocks = min(max_blocks, self.count_usable_blocks())
        self.check_fit(num_blocks, max_blocks)
        self.memory = self.describe_memory(num_blocks)

    def check_context(self) -> None:
        longest = self.config.max_model_len
        require(
            1 <= self.context <= longest,
            f"--context {self.context}: must be in 1..{longest}, which a request can have",
        )

    @property
    def rotary_bytes(self) -> int:
        """Bytes of the rotary table, which is float32 in any case."""
        values_per_token = self.model_config.qk_rope_head_dim
        return self.config.max_model_len * values_per_token * FLOAT32_BYTES

    @property
    def block_bytes(self) -> int:
        """Bytes that one block takes on this rank, in all layers."""
        values_per_layer = self.config.block_size * self.model_config.latent_dim
        num_layers = self.config.count_cache_layers(self.model_config)
        return num_layers * values_per_layer * self.itemsize

    def count_max_blocks(self) -> int:
        """How many blocks fit beside everything else. Not positive if the weights do not fit."""
        usable_bytes = int(self.gpu["memory"] * self.config.gpu_memory_utilization)
        other_bytes = count_bytes_beside_cache(self.config, self.model_config)
        return (usable_bytes - other_bytes - self.weight_bytes) // self.block_bytes

    def count_usable_blocks(self) -> int:
        """How many blocks --max-num-seqs requests of the greatest length would fill."""
        return self.config.max_num_seqs * self.layout.num_blocks(self.config.max_model_len)

    def check_fit(self, num_blocks: int, max_blocks: int) -> None:
        weights = f"--tp-size {self.config.tp_size}: {self.weight_bytes / 1e9:.1f} GB of weights"
        hint = "raise it, or --gpu-memory-utilization"
        can_quantize = get_capability(self.gpu) >= FP8_CAPABILITY
        if can_quantize and self.config.quantization == "none":
            hint += ", or use --quantization fp8"
        require(max_blocks > 0, f"{weights} leave no room for KV; {hint}")
        require(num_blocks <= max_blocks, f"--num-blocks {num_blocks}: {max_blocks} fit")

        capacity = num_blocks * self.layout.tokens_per_block
        require(
            self.context <= capacity,
            f"--context {self.context}: the KV cache holds {capacity} tokens; raise --dcp-size",
        )

    def describe_memory(self, num_blocks: int) -> dict[str, int]:
        """Bytes are of this rank. Tokens and requests are those of the whole cache, which the ranks
        of a DCP group hold together."""
        capacity = num_blocks * self.layout.tokens_per_block
        requests_in_cache = num_blocks // self.layout.num_blocks(self.context)
        return {
            "dcp_size": self.config.dcp_size,
            "weight_bytes": self.weight_bytes,
            "kv_bytes": num_blocks * self.block_bytes,
            "capacity": capacity,
            "longest_context": min(capacity, self.config.max_model_len),
            "most_requests": min(requests_in_cache, self.config.max_num_seqs),
        }

    def time_step(self, concurrency: int) -> dict[str, Any]:
        """Estimate a decode step while clients keep `concurrency` requests open. Requests that do
        not fit wait and are not part of the step."""
        requests = min(concurrency, self.memory["most_requests"])
        num_drafts = 0
        num_accepted = 0.0
        drafts: dict[str, float] = {}
        if self.acceptance is not None:
            num_drafts = count_drafts(requests, self.config)
            num_accepted = expect_accepted(requests, num_drafts, self.acceptance)
            drafts = {"drafts": num_drafts, "tokens_per_step": requests + num_accepted}

        parts_ms = dict.fromkeys(COSTS, 0.0)
        floor_ms = 0.0
        received_bytes = 0.0
        weights = (self.weights, self.prediction_weights)
        configs = (self.config, self.model_config)
        for part_of_step in list_passes(*weights, *configs, requests, num_drafts):
            rows = part_of_step.rows
            traffic = self.count_received(part_of_step)
            received_bytes += traffic.received_bytes
            floors = {
                "attention": self.bound_attention(part_of_step),
                "experts": self.bound_experts(part_of_step),
                "projections": self.bound_projections(part_of_step),
                "exchange": Floor(traffic.received_bytes / self.gpu["link"], traffic.collectives),
                "rest": Floor(0.0, part_of_step.layers),
            }
            for part, floor in floors.items():
                cost = COSTS[part]
                us_per_call = cost.us_per_call + cost.us_per_row * rows
                floor_ms += 1e3 * floor.seconds
                parts_ms[part] += 1e3 * floor.seconds * cost.times_floor
                parts_ms[part] += 1e-3 * floor.calls * us_per_call

        step_ms = sum(parts_ms.values())
        return {
            "dcp_size": self.config.dcp_size,
            "concurrency": concurrency,
            "running": requests,
            **drafts,
            "received_bytes": received_bytes,
            "parts_ms": parts_ms,
            "step_ms": step_ms,
            "floor_ms": floor_ms,
            "tokens_per_s": 1e3 * (requests + num_accepted) / step_ms,
        }

    def bound_time(self, bytes_read: float, products: float) -> float:
        """Seconds to read the bytes or to do the multiply-adds, whichever takes longer."""
        return max(bytes_read / self.gpu["bandwidth"], 2 * products / self.gpu["flops"])

    def bound_attention(self, part: Pass) -> Floor:
        """Absorbed attention of all heads of the DCP group over this rank's shard of the cache. A
        request's drafts read its shard again, each for itself."""
        latent_dim = self.model_config.latent_dim
        tokens_read = part.layers * part.rows * self.context / self.config.dcp_size

        num_heads = self.model_config.num_attention_heads
        group_heads = num_heads * self.config.dcp_size // self.config.tp_size
        products_per_token = (latent_dim + self.model_config.kv_lora_rank) * group_heads
        bytes_read = tokens_read * latent_dim * self.itemsize
        return Floor(self.bound_time(bytes_read, tokens_read * products_per_token), part.layers)

    def bound_experts(self, part: Pass) -> Floor:
        """Routed experts, shared experts and the router. Every expert is as likely as any other to
        be chosen."""
        rows = part.rows
        routed = part.weights.routed_experts
        always_read = part.weights.shared_experts + part.weights.router
        num_experts = max(1, self.model_config.n_routed_experts)
        chosen_share = self.model_config.num_experts_per_tok / num_experts

        touched_share = 1 - (1 - chosen_share) ** rows
        bytes_read = routed.num_bytes * touched_share + always_read.num_bytes
        products = rows * (routed.products * chosen_share + always_read.products)
        return Floor(self.bound_time(bytes_read, products), part.moe_layers)

    def bound_projections(self, part: Pass) -> Floor:
        """Projections around attention with absorption and W_UV, dense MLPs and the head."""
        rows = part.rows
        kv_b_proj = part.weights.kv_b_proj
        uses_group_heads = self.config.replicates_q or self.config.exchanges_narrow(rows)
        if self.config.needs_group_heads and not uses_group_heads:
            kv_b_proj = kv_b_proj.share(self.config.dcp_size)  # this rank's heads only

        read = part.weights.others + kv_b_proj
        if self.model_config.tie_word_embeddings:
            read += part.weights.embedding  # it is the head, too
        seconds = self.bound_time(read.num_bytes, rows * read.products)
        return Floor(seconds, part.layers)

    def count_received(self, part: Pass) -> Traffic:
        """What this rank receives in some layers of a decode step: two all-reduces per layer
        over the TP group, and the q gather and the exchange of outputs over the DCP group."""
        all_reduce_bytes = self.count_all_reduce_bytes(part.rows)
        dcp_bytes = self.count_dcp_bytes(part.rows)

        collectives_per_layer = 0
        if self.config.tp_size > 1:
            collectives_per_layer += 2
        if self.config.dcp_size > 1:
            collectives_per_layer += 1
            if self.config.dcp_comm_backend == "ag_rs":
                collectives_per_layer += 1  # the LSEs go before the outputs
            if not self.config.replicates_q:
                collectives_per_layer += 1

        received_bytes = part.layers * (2 * all_reduce_bytes + dcp_bytes)
        return Traffic(received_bytes, part.layers * collectives_per_layer)

    def count_all_reduce_bytes(self, rows: int) -> float:
        """Bytes that this rank receives in one all-reduce of [rows, hidden size]."""
        tp_size = self.config.tp_size
        input_bytes = rows * self.model_config.hidden_size * self.itemsize
        reads_whole_inputs = self.config.comm != "nccl" and input_bytes <= ONE_SHOT_BYTES
        if reads_whole_inputs:
            return input_bytes * (tp_size - 1)
        # Reduce-scatter and all-gather: this rank's share, twice, from each peer.
        return input_bytes * (tp_size - 1) * (2 / tp_size)

    def count_dcp_bytes(self, rows: int) -> int:
        """Bytes of q, outputs and LSEs that this rank receives from its DCP group in one layer."""
        dcp_size = self.config.dcp_size
        if self.config.exchanges_narrow(rows):
            q_dim = self.model_config.qk_head_dim
            out_dim = self.model_config.v_head_dim
        else:
            q_dim = self.model_config.latent_dim
            out_dim = self.model_config.kv_lora_rank

        bytes_per_head = out_dim * self.itemsize
        if not self.config.replicates_q:
            bytes_per_head += q_dim * self.itemsize
        if self.config.dcp_comm_backend == "ag_rs":
            # Peers send their LSEs of all the group's heads, not only of ours.
            bytes_per_head += FLOAT32_BYTES * dcp_size
        else:
            bytes_per_head += FLOAT32_BYTES

        own_heads = self.model_config.num_attention_heads // self.config.tp_size
        return rows * (dcp_size - 1) * own_heads * bytes_per_head


def resolve_for_gpus(
    config: EngineConfig, model_config: ModelConfig, gpu: dict[str, float]
) -> ResolvedConfig:
    """Resolve for a machine with one GPU per rank where all GPUs are peers."""
    machine = Machine(num_gpus=config.tp_size, capability=get_capability(gpu), has_peer_access=True)
    # How ranks are started changes nothing here, and torchrun may not be running.
    config = replace(config, device="cuda", ranks="auto")
    return resolve(config, model_config, machine, report=ignore_report)


def get_capability(gpu: dict[str, float]) -> tuple[int, int]:
    """9.0 is sm_90, and so is 90."""
    capability = gpu["capability"]
    if capability < 20:
        capability *= 10
    major, minor = divmod(round(capability), 10)
    return major, minor


def ignore_report(level: int, text: str) -> None:
    """Nothing is started, so nobody needs to hear what was chosen."""


def find_gpu(text: str) -> dict[str, float]:
    """What GPUS has of a GPU. `text` is a name there, all of its numbers, or a name and the numbers
    that differ from it, as in `h200,link=1e11`. The capability may be missing."""
    gpu = {"capability": DEFAULT_CAPABILITY}
    try:
        for item in text.split(","):
            name, _, number = item.partition("=")
            if number:
                gpu[name] = float(number)
            else:
                gpu.update(GPUS[name])
    except (KeyError, ValueError):
        gpu = {}
    is_complete = gpu.keys() == GPUS["h100"].keys()
    is_possible = all(0 < number < math.inf for number in gpu.values())
    require(
        is_complete and is_possible,
        f"--gpu {text!r}: give {', '.join(GPUS)}, "
        "or all of memory=80e9,bandwidth=3e12,flops=790e12,link=350e9",
    )
    return gpu
