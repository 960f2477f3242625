"""What a deployment would hold and how fast it would decode, from config.json alone. Memory is counted as the engine
counts it; a step takes its floor and what measured ones took beyond theirs. Prompts are left out."""

import math
import re
from collections import Counter
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from minidcp.attention.reference import ReferenceBackend
from minidcp.config import EngineConfig, flag, require
from minidcp.engine.engine import fit
from minidcp.engine.model_runner import GRAPH_BYTES
from minidcp.kv_cache.interleave import Interleave
from minidcp.model_config import ModelConfig
from minidcp.models.deepseek_v2 import Blueprint, DeepseekV2ForCausalLM
from minidcp.models.weights import RecordingSource, Weights, find_model
from minidcp.parallel.exchange import exchange_a2a
from minidcp.parallel.state import build_thread_states
from minidcp.parallel.symmetric import HALF_BYTES, ONE_SHOT_BYTES

# Bytes that CUDA reports; bytes/s of a copy, bf16 FLOP/s, bytes/s from peers. Measured on H100 and H200 but for the
# link; the others are shares of their data sheets (2.0 TB/s, 312 TFLOP/s, 300 GB/s and 8.0, 2250, 900).
GPUS = {
    "h100": dict(memory=79.1 * 2**30, bandwidth=3.0e12, flops=790e12, link=350e9),
    "h200": dict(memory=139.8 * 2**30, bandwidth=4.3e12, flops=790e12, link=350e9),
    "a100": dict(memory=79.1 * 2**30, bandwidth=1.7e12, flops=270e12, link=240e9),
    "b200": dict(memory=178.3 * 2**30, bandwidth=6.8e12, flops=1.7e15, link=700e9),
}
# What the parts of a decode step take: a multiple of their floors, µs a layer, and µs a layer and row. Fitted to a rank
# of V2 on an H200 in README and benchmarks/NOTES.md; each of a layer's collectives is the README's p2p kernel alone.
COSTS = {
    "attention": (1.84, 14.0, 0.0),
    "experts": (1.0, 16.0, 0.16),  # with the router and the shared ones
    "projections": (1.3, 25.0, 0.0),  # with absorption, W_UV, dense MLPs and the head
    "exchange": (1.0, 4.0, 0.0),  # all-reduces, q gather, exchange of outputs
    "rest": (0.0, 3.0, 0.03),
}
KINDS = (".mlp.experts.", ".mlp.shared_experts.", ".mlp.gate.", ".kv_b_proj.", ".embed_tokens.")  # of weights
# Estimates: a process with its kernels; tensors as wide as the hidden dim, beside the experts' outputs, in a prefill.
PROCESS_BYTES, PREFILL_WIDTHS = 1200 << 20, 8


def find_gpu(text: str) -> dict[str, float]:
    """A name of GPUS, or a GPU's numbers, or a name and some numbers."""
    gpu: dict[str, float] = {}
    try:
        for name, _, number in (item.partition("=") for item in text.split(",")):
            gpu |= {name: float(number)} if number else GPUS[name]
    except (KeyError, ValueError):
        gpu = {}
    ok = gpu.keys() == GPUS["h100"].keys() and all(0 < number < math.inf for number in gpu.values())
    require(ok, f"--gpu {text!r}: give {', '.join(GPUS)}, or all of memory=80e9,bandwidth=3e12,flops=790e12,link=350e9")
    return gpu


def parse_counts(name: str, text: str) -> list[int]:
    """Integers by commas, or 1..512 for the powers of two in it and its ends; `name` is the option's."""
    counts = [int(number) for number in re.findall(r"\d+", text)]
    right = re.fullmatch(r"\d+(\.\.\d+|(,\d+)*)", text) and counts[0] >= 1 and counts == sorted(counts)
    require(right, f"{flag(name)} {text!r}: must be rising integers, such as 1,8,64 or 1..512")
    return sorted({*counts, *(1 << i for i in range(31) if ".." in text and counts[0] < 1 << i < counts[1])})


class Plan:
    """One rank, and requests of `context` tokens in the mean. Raises ValueError, saying why, if they do not fit."""

    def __init__(self, config: EngineConfig, gpu: dict[str, float], context: int) -> None:
        c = self.model = ModelConfig.from_hf(find_model(config.model, ("config.json",)))
        config = self.config = fit(replace(config, device="cuda"), c)
        self.gpu, self.context, self.itemsize = gpu, context, int(getattr(torch, config.dtype).itemsize)
        tp, dcp, max_len, budget = config.tp_size, config.dcp_size, config.max_model_len, config.max_num_batched_tokens
        assert max_len is not None and budget is not None
        require(1 <= context <= max_len, f"--context {context}: must be in 1..{max_len}, which a request can have")
        layout, source, states = Interleave(dcp, config.block_size), RecordingSource(), build_thread_states(tp, dcp)[0]
        heads = config.needs_group_heads, config.replicates_q
        blueprint = Blueprint(c, states[0], ReferenceBackend(1.0), exchange_a2a, *heads)
        DeepseekV2ForCausalLM(blueprint, Weights(source), max_len)
        self.values: Counter[str] = Counter()
        for name, count in source.sizes.items():
            self.values[next((kind for kind in KINDS if kind in name), "others")] += count
        weight_bytes = self.values.total() * self.itemsize + max_len * c.qk_rope_head_dim * 4  # rotary: float32
        widths = c.num_experts_per_tok + c.n_shared_experts + PREFILL_WIDTHS
        buffers = 2 * HALF_BYTES * ((tp > 1) + (1 < dcp < tp)) * (config.comm != "nccl")
        other = GRAPH_BYTES + PROCESS_BYTES + budget * widths * c.hidden_size * self.itemsize + buffers
        room = int(gpu["memory"] * config.gpu_memory_utilization) - other - weight_bytes
        block_bytes = c.num_hidden_layers * config.block_size * c.latent_dim * self.itemsize
        most, weights = room // block_bytes, f"--tp-size {tp}: {weight_bytes / 1e9:.1f} GB of weights"
        require(most > 0, f"{weights} leave no room for KV; raise it, or --gpu-memory-utilization")
        blocks = config.num_blocks or min(most, config.max_num_seqs * layout.num_blocks(max_len))
        require(blocks <= most, f"--num-blocks {blocks}: {most} fit")
        capacity = blocks * layout.tokens_per_block
        require(context <= capacity, f"--context {context}: the KV cache holds {capacity} tokens; raise --dcp-size")
        requests = min(blocks // layout.num_blocks(context), config.max_num_seqs)
        self.memory = {"dcp_size": dcp, "weight_bytes": weight_bytes, "kv_bytes": blocks * block_bytes}
        self.memory |= {"capacity": capacity, "longest_context": min(capacity, max_len), "most_requests": requests}

    def count_received(self, rows: int) -> tuple[float, int]:
        """In a decode step: bytes that this rank receives from others, and collectives."""
        c, tp, dcp, layers = self.model, self.config.tp_size, self.config.dcp_size, self.model.num_hidden_layers
        replicated, ag_rs = self.config.replicates_q, self.config.dcp_comm_backend == "ag_rs"
        x = rows * c.hidden_size * self.itemsize
        reduced = x * (tp - 1) * (1 if x <= ONE_SHOT_BYTES and self.config.comm != "nccl" else 2 / tp)
        q, out = (c.qk_head_dim, c.v_head_dim) if self.config.exchanges_narrow(rows) else (c.latent_dim, c.kv_lora_rank)
        by_head = (out + q * (not replicated)) * self.itemsize + 4 * (dcp if ag_rs else 1)
        received = rows * (dcp - 1) * c.num_attention_heads // tp * by_head
        return layers * (2 * reduced + received), layers * (2 * (tp > 1) + (dcp > 1) * (2 + ag_rs - replicated))

    def time_step(self, concurrency: int) -> dict[str, Any]:
        """A decode step of so many requests, as far as they fit."""
        c, config, layers = self.model, self.config, self.model.num_hidden_layers
        experts, shared, router, kv_b, embedding = (self.values[kind] for kind in KINDS)
        rows = min(concurrency, self.memory["most_requests"])

        def bound(read: float, products: float) -> float:
            return max(read * self.itemsize / self.gpu["bandwidth"], 2 * products / self.gpu["flops"])

        seen = layers * rows * self.context / config.dcp_size  # by all heads of the group
        width = (c.latent_dim + c.kv_lora_rank) * c.num_attention_heads * config.dcp_size // config.tp_size
        chosen, every = c.num_experts_per_tok / max(1, c.n_routed_experts), shared + router
        touched = experts * (1 - (1 - chosen) ** rows) + every  # if each is as likely to be chosen
        if config.needs_group_heads and not config.exchanges_narrow(rows) and not config.replicates_q:
            kv_b //= config.dcp_size
        others = self.values["others"] + kv_b + embedding * c.tie_word_embeddings
        received, collectives = self.count_received(rows)
        floors = {
            "attention": (bound(seen * c.latent_dim, seen * width), layers),
            "experts": (bound(touched, rows * (experts * chosen + every)), sum(map(c.is_moe_layer, range(layers)))),
            "projections": (bound(others, rows * others), layers),
            "exchange": (received / self.gpu["link"], collectives),
            "rest": (0.0, layers),
        }
        parts = {}
        for (part, (seconds, count)), (times_floor, us, us_by_row) in zip(floors.items(), COSTS.values(), strict=True):
            parts[part] = 1e3 * seconds * times_floor + 1e-3 * count * (us + us_by_row * rows)
        step, floor = sum(parts.values()), 1e3 * sum(seconds for seconds, _ in floors.values())
        counts = {"dcp_size": config.dcp_size, "concurrency": concurrency, "running": rows, "received_bytes": received}
        return counts | {"parts_ms": parts, "step_ms": step, "floor_ms": floor, "tokens_per_s": 1e3 * rows / step}


def describe(title: str, memory: list[dict[str, Any]], steps: list[dict[str, Any]]) -> str:
    """Markdown: a table of what `Plan.memory` says, and one of `Plan.time_step`; bytes in GB."""
    lines = [title]
    for rows in (memory, [step | {f"{part}_ms": ms for part, ms in step["parts_ms"].items()} for step in steps]):
        units = {name: 1e9 if name.endswith("_bytes") else 1 for name in rows[0] if name != "parts_ms"}
        heads = [name.replace("_bytes", "_GB").replace("_", " ") for name in units]
        cells = [[row[name] if unit == 1 else row[name] / unit for name, unit in units.items()] for row in rows]
        texts = [[f"{x:,.2f}" if isinstance(x, float) else f"{x:,}" for x in row] for row in cells]
        lines.append("\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *texts)))
    return "\n\n".join(lines)


def draw(title: str, steps: list[dict[str, Any]], file: str) -> None:
    """A chart of tokens/s over concurrency, in the format of the file's suffix."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"--plot {file}: needs matplotlib: pip install 'minidcp[bench]' ({error})") from None
    figure = Figure(figsize=(9, 5), constrained_layout=True)
    axis = figure.subplots()
    for dcp, some in groupby(steps, lambda step: step["dcp_size"]):
        levels, rates = zip(*((s["concurrency"], s["tokens_per_s"]) for s in some), strict=True)
        axis.semilogx(levels, rates, base=2, marker="o", label=f"dcp {dcp}")
    axis.set(xlabel="concurrent requests", ylabel="output tokens per second, estimated")
    axis.set(title=title, xticks=levels, xticklabels=levels)
    axis.grid(alpha=0.3)
    axis.legend()
    try:
        figure.savefig(file)
    except OSError as error:
        raise ValueError(f"--plot {file}: cannot be written ({error})") from None
