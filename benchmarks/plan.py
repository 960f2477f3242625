"""What a deployment would hold and how fast it would decode, from config.json alone.

    python benchmarks/plan.py deepseek-ai/DeepSeek-V2 --gpu h100 --tp-size 8 --dcp-size 1,2,4,8 --context 4750 \\
        --concurrency 1..512 --plot plan.png

Memory is counted as the engine counts it; a step takes its floor and what measured ones took beyond theirs. Prompts are
left out. All of the engine's flags are here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import Any

from minidcp.attention.reference import ReferenceBackend
from minidcp.cli import add_engine_flags, engine_config
from minidcp.config import EngineConfig, divisors, flag, require
from minidcp.engine.model_runner import GRAPH_BYTES
from minidcp.kv_cache.interleave import Interleave
from minidcp.model_config import ModelConfig
from minidcp.models.deepseek_v2 import Blueprint, DeepseekV2ForCausalLM
from minidcp.models.weights import RecordingSource, Weights, find_model
from minidcp.parallel.exchange import EXCHANGES
from minidcp.parallel.group import Group
from minidcp.parallel.state import ParallelState
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
PROCESS_BYTES, PREFILL_WIDTHS = 750 << 20, 8


def find_gpu(text: str) -> dict[str, float]:
    """A name of GPUS, or a GPU's numbers, or a name and some numbers."""
    gpu: dict[str, float] = {}
    try:
        for item in text.split(","):
            name, _, number = item.partition("=")
            gpu |= {name: float(number)} if name in GPUS["h100"] else GPUS[item]
    except (KeyError, ValueError):
        gpu = {}
    ok = all(0 < gpu.get(name, 0) < float("inf") for name in GPUS["h100"])
    require(ok, f"--gpu {text!r}: give {', '.join(GPUS)}, or all of memory=80e9,bandwidth=3e12,flops=790e12,link=350e9")
    return gpu


class Plan:
    """One rank, and requests of `context` tokens in the mean. Raises ValueError, saying why, if they do not fit."""

    def __init__(self, config: EngineConfig, gpu: dict[str, float], context: int) -> None:
        c = self.model = ModelConfig.from_hf(find_model(config.model, ("config.json",)))
        tp, heads, longest = config.tp_size, c.num_attention_heads, c.max_position_embeddings
        require(heads % tp == 0, f"--tp-size {tp} must divide the model's {heads} heads; possible: {divisors(heads)}")
        self.config, self.gpu, self.context, self.itemsize = config, gpu, context, 4 if config.dtype == "float32" else 2
        self.exchange = "p2p" if config.dcp_comm_backend == "auto" else config.dcp_comm_backend
        layout, max_len = Interleave(config.dcp_size, config.block_size), config.max_model_len or longest
        require(1 <= context <= max_len, f"--context {context}: must be in 1..{max_len}, which a request can have")
        state, source = ParallelState(Group(), Group()), RecordingSource()
        state.tp.size, state.dcp.size = tp, config.dcp_size
        held_heads = config.needs_group_heads, config.replicates_q
        blueprint = Blueprint(c, state, ReferenceBackend(1.0), EXCHANGES[self.exchange], *held_heads)
        DeepseekV2ForCausalLM(blueprint, Weights(source), max_len)
        self.values: Counter[str] = Counter()
        for name, count in source.sizes.items():
            self.values[next((kind for kind in KINDS if kind in name), "others")] += count
        weight_bytes = self.values.total() * self.itemsize + max_len * c.qk_rope_head_dim * 4  # rotary: float32
        budget = config.max_num_batched_tokens or max(8192, config.max_num_seqs)
        widths = c.num_experts_per_tok + c.n_shared_experts + PREFILL_WIDTHS
        buffers = 2 * HALF_BYTES * ((tp > 1) + (1 < config.dcp_size < tp)) * (config.comm != "nccl")
        other = GRAPH_BYTES + PROCESS_BYTES + budget * widths * c.hidden_size * self.itemsize + buffers
        room = int(gpu["memory"] * config.gpu_memory_utilization) - other - weight_bytes
        block_bytes = c.num_hidden_layers * config.block_size * c.latent_dim * self.itemsize
        blocks = config.num_blocks or min(room // block_bytes, config.max_num_seqs * layout.num_blocks(max_len))
        require(blocks > 0, f"--tp-size {tp}: {weight_bytes / 1e9:.1f} GB of weights leave no room for KV; raise it")
        capacity = blocks * layout.tokens_per_block
        self.memory = {"dcp_size": config.dcp_size, "weight_bytes": weight_bytes, "kv_bytes": blocks * block_bytes}
        self.memory |= {"capacity": capacity, "longest": min(capacity, max_len)}
        self.memory["requests"] = min(blocks // layout.num_blocks(context), config.max_num_seqs)

    def count_received(self, rows: int) -> tuple[float, int]:
        """In a decode step: bytes that this rank receives from others, and collectives."""
        c, tp, dcp, layers = self.model, self.config.tp_size, self.config.dcp_size, self.model.num_hidden_layers
        x, replicated, ag_rs = rows * c.hidden_size * self.itemsize, self.config.replicates_q, self.exchange == "ag_rs"
        reduced = x * (tp - 1) * (1 if x <= ONE_SHOT_BYTES and self.config.comm != "nccl" else 2 / tp)
        q, out = (c.qk_head_dim, c.v_head_dim) if self.config.exchanges_narrow(rows) else (c.latent_dim, c.kv_lora_rank)
        by_head = (out + q * (not replicated)) * self.itemsize + 4 * (dcp if ag_rs else 1)
        received = rows * (dcp - 1) * c.num_attention_heads // tp * by_head
        return layers * (2 * reduced + received), layers * (2 * (tp > 1) + (dcp > 1) * (2 + ag_rs - replicated))

    def time_step(self, concurrency: int) -> dict[str, Any]:
        """A decode step of so many requests, as far as they fit."""
        c, config, values, layers = self.model, self.config, self.values, self.model.num_hidden_layers
        experts, shared, router, kv_b, embedding = (values[kind] for kind in KINDS)
        rows = min(concurrency, self.memory["requests"])

        def bound(read: float, products: float) -> float:
            return max(read * self.itemsize / self.gpu["bandwidth"], 2 * products / self.gpu["flops"])

        seen = layers * rows * self.context / config.dcp_size  # by all heads of the group
        width = (c.latent_dim + c.kv_lora_rank) * c.num_attention_heads * config.dcp_size // config.tp_size
        chosen, every = c.num_experts_per_tok / max(1, c.n_routed_experts), shared + router
        if config.needs_group_heads and not config.exchanges_narrow(rows) and not config.replicates_q:
            kv_b //= config.dcp_size
        others = values["others"] + kv_b + embedding * c.tie_word_embeddings
        received, collectives = self.count_received(rows)
        touched = experts * (1 - (1 - chosen) ** rows) + every  # if each is as likely to be chosen
        floors = {
            "attention": (bound(seen * c.latent_dim, seen * width), layers),
            "experts": (bound(touched, rows * (experts * chosen + every)), sum(map(c.is_moe_layer, range(layers)))),
            "projections": (bound(others, rows * others), layers),
            "exchange": (received / self.gpu["link"], collectives),
            "rest": (0.0, layers),
        }
        parts = {}
        for part, (seconds, count) in floors.items():
            times_floor, us, us_by_row = COSTS[part]
            parts[part] = 1e3 * seconds * times_floor + 1e-3 * count * (us + us_by_row * rows)
        step, floor = sum(parts.values()), 1e3 * sum(seconds for seconds, _ in floors.values())
        counts = {"dcp_size": config.dcp_size, "concurrency": concurrency, "running": rows, "received_bytes": received}
        return counts | {"parts_ms": parts, "step_ms": step, "floor_ms": floor, "tokens_per_s": 1e3 * rows / step}


def describe(title: str, memory: list[dict[str, int]], steps: list[dict[str, Any]]) -> str:
    """Markdown."""

    def table(heads: list[str], rows: list[list[Any]]) -> str:
        cells = [[f"{x:,.1f}" if isinstance(x, float) else f"{x:,}" for x in row] for row in rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells))

    heads = ["dcp", "weights per rank (GB)", "KV cache per rank (GB)", "tokens in all", "longest context that fits"]
    sizes = [[m["dcp_size"], m["weight_bytes"] / 1e9, m["kv_bytes"] / 1e9, *[*m.values()][3:]] for m in memory]
    lines = [title, table([*heads, "most requests that fit: the plateau of tok/s"], sizes)]
    heads = [
        "dcp",
        "requests",
        *(f"{part} (ms)" for part in COSTS),
        "step (ms)",
        "floor (ms)",
        "received (MB)",
        "tok/s",
    ]
    times = [
        [s["dcp_size"], s["concurrency"], *s["parts_ms"].values(), s["step_ms"], s["floor_ms"],
         s["received_bytes"] / 1e6, round(s["tokens_per_s"])] for s in steps
    ]  # fmt: skip
    return "\n\n".join([*lines, table(heads, times)])


def draw(title: str, steps: list[dict[str, Any]], file: str) -> None:
    """Tokens/s over concurrency."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"--plot {file}: needs matplotlib: pip install 'minidcp[bench]' ({error})") from None
    figure = Figure(figsize=(9, 5), constrained_layout=True)
    axis = figure.subplots()
    for dcp in dict.fromkeys(s["dcp_size"] for s in steps):
        points = [(s["concurrency"], s["tokens_per_s"]) for s in steps if s["dcp_size"] == dcp]
        axis.plot(*zip(*points, strict=True), marker="o", label=f"dcp {dcp}")
    axis.set(title=title, xlabel="concurrent requests", ylabel="output tokens per second, estimated")
    levels = sorted({s["concurrency"] for s in steps})
    axis.set_xscale("log", base=2)
    axis.set_xticks(levels, [str(level) for level in levels])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file)


def parse_counts(name: str, text: str) -> list[int]:
    """Integers by commas, or 1..512 for the powers of two in it and its ends."""
    first, dots, last = text.partition("..")
    try:
        counts = [int(n) for n in ((first, last) if dots else text.split(","))]
    except ValueError:
        counts = [0]
    right = min(counts) >= 1 and counts == sorted(counts)
    require(right, f"{flag(name)} {text!r}: must be rising integers, such as 1,8,64 or 1..512")
    return sorted({*counts, *(1 << i for i in range(31) if dots and counts[0] < 1 << i < counts[1])})


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    add_engine_flags(parser)  # --dcp-size is declared anew
    add = parser.add_argument
    add("--dcp-size", "--decode-context-parallel-size", "-dcp", default="1", help="one or several: 1,2,4,8")
    add("--gpu", required=True, help=f"{', '.join(GPUS)}, or memory=…,bandwidth=…,flops=…,link=… (in bytes)")
    add("--context", type=int, default=4096, help="tokens of a request, in the mean while it decodes")
    add("--concurrency", default="1..512", help="requests at once: a range, or several by commas")
    add("--json", action="store_true", help="print JSON")
    add("--plot", metavar="FILE", help="chart of tokens/s, .png or .svg")
    return parser


def plan(args: argparse.Namespace) -> None:
    concurrency, sizes = (parse_counts(name, getattr(args, name)) for name in ("concurrency", "dcp_size"))
    args.max_num_seqs = max(args.max_num_seqs, *concurrency)
    configs = [engine_config(argparse.Namespace(**vars(args) | {"dcp_size": size})) for size in sizes]
    plans = [Plan(config, find_gpu(args.gpu), args.context) for config in configs]
    title = f"{configs[0].model}, tp {args.tp_size}, {args.gpu}, {args.context:,} tokens per request"
    memory, steps = [p.memory for p in plans], [p.time_step(n) for p in plans for n in concurrency]
    result = {"title": title, "memory": memory, "steps": steps}
    print(json.dumps(result) if args.json else describe(title, memory, steps))
    if args.plot:
        draw(title, steps, args.plot)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 2 for a user's error."""
    try:
        plan(build_parser().parse_args(argv))
    except ValueError as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
