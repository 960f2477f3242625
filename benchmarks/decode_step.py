"""The decode step of one rank on a GPU, part by part, each compared with its floor.

    python benchmarks/decode_step.py deepseek-v2-lite
    python benchmarks/decode_step.py deepseek-v2 --emulate-rank-of 8 --context 4750

A floor is max(bytes / copy bandwidth, FLOPs / matmul rate). A part is timed as a CUDA graph that
runs it for all layers, with random weights. With --emulate-rank-of N the collectives of N ranks are
local copies of the same size, which says nothing about NVLink. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from emulation import emulate_state
from timing import BANDWIDTH, FLOPS, time_calls, time_graph
from torch import Tensor

from minidcp.batch import Admission, CacheQueries, StepPlan
from minidcp.config import EngineConfig
from minidcp.kernels.fp8 import Weight
from minidcp.kernels.linear import multiply_by_head
from minidcp.machine import detect_machine
from minidcp.model_config import ModelConfig
from minidcp.models.layers import MLP, MoE
from minidcp.models.query import LowRankQuery
from minidcp.request import SamplingParams
from minidcp.resolve import resolve
from minidcp.worker.model_runner import ModelRunner

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Part:
    """A part of the step: its time and its floor, in seconds."""

    seconds: float
    floor: float


def compute_floor(num_bytes: float, flops: float) -> float:
    return max(num_bytes / BANDWIDTH, flops / FLOPS)


class Step:
    """The decode step of one batch size at one context length, and the parts of it."""

    def __init__(self, runner: ModelRunner, batch: int, context: int) -> None:
        self.runner = runner
        self.batch = batch
        self.context = context
        self.config = runner.model_config
        self.layers = runner.model.layers
        self.tp = runner.state.tp
        self.dcp = runner.state.dcp
        self.group_heads = self.config.num_attention_heads * self.dcp.size // self.tp.size

        self.plan = self.make_plan()
        runner.tables.update(self.plan)
        rows = runner.build_batch(self.plan).decode
        assert rows is not None
        self.rows: CacheQueries = rows

    def make_plan(self) -> StepPlan:
        num_blocks = self.runner.interleave.num_blocks(self.context + 1)
        plan = StepPlan(num_decode=self.batch)
        for row in range(self.batch):
            plan.slots.append(row)
            plan.starts.append(self.context)
            plan.lengths.append(1)
            for index in range(num_blocks):
                plan.new_blocks.append((row, index, row * num_blocks + index))
            plan.sampling.append(row)
            plan.admitted.append(Admission(row, SamplingParams(temperature=0.0)))
        return plan

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.runner.dtype, device=self.runner.device)

    def measure_attention(self) -> Part:
        """Absorbed attention over this rank's shard."""
        config = self.config
        q = self.normal(self.batch, self.group_heads, config.kv_lora_rank)
        q_pe = self.normal(self.batch, self.group_heads, config.qk_rope_head_dim)
        cache = self.runner.cache
        backend = self.runner.attention
        assert cache is not None

        def work() -> None:
            backend.prepare(self.rows)
            for layer in range(len(self.layers)):
                backend.decode(q, q_pe, cache[layer], self.rows)

        tokens = self.batch * (self.context + 1) / self.dcp.size
        flops = 2 * tokens * self.group_heads * (config.latent_dim + config.kv_lora_rank)
        floor = compute_floor(tokens * config.latent_dim * 2, flops)
        return Part(time_graph(work), len(self.layers) * floor)

    def measure_experts(self) -> Part:
        """The experts, with the router and the shared experts."""
        x = self.normal(self.batch, self.config.hidden_size)
        moes = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]

        def work() -> None:
            for moe in moes:
                moe(x).sum()

        floor = 0.0
        for moe in moes:
            _, ids = moe.route(x)
            weights = (moe.gate_up_proj, moe.down_proj)
            num_experts = moe.down_proj.shape[0]
            expert_bytes = sum(weight.nbytes for weight in weights) / num_experts
            flops = 2 * sum(weight.shape.numel() for weight in weights) / num_experts
            floor += compute_floor(ids.unique().numel() * expert_bytes, ids.numel() * flops)
        return Part(time_graph(work), floor)

    def list_projection_weights(self) -> list[Weight]:
        weights: list[Weight] = [self.runner.model.lm_head.weight]
        for layer in self.layers:
            attn = layer.self_attn
            weights += [attn.down_proj.weight, attn.o_proj.weight]
            if self.rows.narrow:
                weights += [attn.group_w_uk, attn.group_w_uv]
            else:
                weights += [attn.w_uk, attn.w_uv]
            if isinstance(attn.query, LowRankQuery):
                weights.append(attn.query.q_b_proj.own.weight)
            if isinstance(layer.mlp, MLP):
                weights += [layer.mlp.gate_up_proj, layer.mlp.down_proj]
        return weights

    def measure_projections(self) -> Part:
        """All other products with weights.

        These are the q, kv and o projections, W_UK and W_UV, dense MLPs and the head.
        """
        config = self.config
        narrow = self.rows.narrow
        x = self.normal(self.batch, config.hidden_size)

        def work() -> None:
            for layer in self.layers:
                attn = layer.self_attn
                q_down = attn.down_proj(x)[:, : -config.latent_dim]
                q_input = attn.query.make_input(x, q_down)
                q = attn.query.project_own(q_input)[..., : config.qk_nope_head_dim]
                w_uk = attn.w_uk
                w_uv = attn.w_uv
                if narrow:
                    w_uk = attn.group_w_uk
                    w_uv = attn.group_w_uv
                    q = q.repeat(1, self.group_heads // attn.num_heads, 1)
                latent = multiply_by_head(q, w_uk.mT)
                out = multiply_by_head(latent, w_uv)[:, : attn.num_heads]
                attn.o_proj(out.flatten(1))
                if isinstance(layer.mlp, MLP):
                    layer.mlp(x)
            self.runner.model.lm_head(x)

        floor = 0.0
        for weight in self.list_projection_weights():
            floor += compute_floor(weight.nbytes, 2 * self.batch * weight.shape.numel())
        return Part(time_graph(work), floor)

    def measure_exchange(self) -> Part:
        """Two all-reduces a layer, and with DCP the q gather and the merge."""
        if self.tp.size == 1:
            return Part(0.0, 0.0)
        config = self.config
        q_width = config.latent_dim
        out_width = config.kv_lora_rank
        if self.rows.narrow:
            q_width = config.qk_head_dim
            out_width = config.v_head_dim
        own_heads = self.group_heads // self.dcp.size
        q = self.normal(self.batch, own_heads, q_width)
        out = self.normal(self.batch, self.group_heads, out_width)
        lse = torch.randn(self.batch, self.group_heads, device=self.runner.device)
        x = self.normal(self.batch, config.hidden_size)
        exchange = self.runner.state.exchange

        def work() -> None:
            for _ in self.layers:
                self.tp.all_reduce(x)
                self.tp.all_reduce(x)
                if self.dcp.size > 1:
                    exchange.gather_q(q)
                    exchange.merge(out, lse)

        values = 2 * x.numel()
        if self.dcp.size > 1:
            values += q.numel() * self.dcp.size + out.numel()
        num_bytes = values * 2
        # Each byte is read and written.
        return Part(time_graph(work), len(self.layers) * 2 * num_bytes / BANDWIDTH)

    def measure_whole(self) -> tuple[float, float]:
        """Seconds of a graph replay, and of a step when many are launched one after another."""
        graphs = self.runner.graphs
        assert graphs is not None
        graphs.replay(self.plan)
        size = next(size for size in graphs.sizes if size >= self.batch)
        replay = graphs.steps[size].graph.replay
        alone = statistics.median_high(time_calls(replay, repeats=20))

        num_steps = 30
        # A pending result owns the host memory that its step is copied to, so it must stay alive.
        pending = [self.runner.execute(self.plan) for _ in range(5)]  # warm-up
        torch.cuda.synchronize()
        start = time.perf_counter()
        pending += [self.runner.execute(self.plan) for _ in range(num_steps)]
        torch.cuda.synchronize()
        launched = (time.perf_counter() - start) / num_steps
        del pending
        return alone, launched


def measure(step: Step) -> dict[str, float]:
    """Measure and print all parts of a step."""
    parts = {
        "projections": step.measure_projections(),
        "attention": step.measure_attention(),
        "exchange": step.measure_exchange(),
        "experts": step.measure_experts(),
    }
    alone, launched = step.measure_whole()
    floor = sum(part.floor for part in parts.values())
    rest = alone - sum(part.seconds for part in parts.values())
    host_gap = launched - alone

    policy = "narrow" if step.rows.narrow else "wide"
    print(
        f"batch {step.batch} ({policy}): {alone * 1e3:.2f} ms, floor {floor * 1e3:.2f}, "
        f"ratio {alone / floor:.2f}"
    )
    for name, part in parts.items():
        ratio = f"{part.seconds / part.floor:6.2f}" if part.floor else "     -"
        print(
            f"    {name:12} {part.seconds * 1e3:8.3f} ms   floor {part.floor * 1e3:8.3f}   "
            f"ratio {ratio}"
        )
    print(f"    {'the rest':12} {rest * 1e3:8.3f} ms")
    print(f"    {'host gap':12} {host_gap * 1e3:8.3f} ms   {host_gap / launched:.1%} of a step")

    result = {
        "batch": step.batch,
        "step_ms": alone * 1e3,
        "floor_ms": floor * 1e3,
        "launched_ms": launched * 1e3,
    }
    for name, part in parts.items():
        result[f"{name}_ms"] = part.seconds * 1e3
    return result


def make_runner(args: argparse.Namespace, path: Path, max_batch: int) -> ModelRunner:
    """Rank 0 with random weights and a random cache."""
    num_ranks = args.emulate_rank_of
    config = EngineConfig(
        str(path),
        tp_size=num_ranks,
        dcp_size=num_ranks,
        dcp_comm_backend="a2a",
        device="cuda",
        dtype="bfloat16",
        load_format="dummy",
        attention_backend=args.attention_backend,
        exchange_policy=args.exchange_policy,
        max_model_len=args.context + 64,
        max_num_seqs=max_batch,
        max_num_batched_tokens=8192,
    )
    model_config = ModelConfig.from_hf(path)
    # The emulated ranks have a GPU each.
    machine = replace(detect_machine(config, model_config), num_gpus=num_ranks)
    resolved = resolve(config, model_config, machine)
    state = emulate_state(num_ranks, num_ranks, exchange=resolved.dcp_comm_backend)
    runner = ModelRunner(resolved, model_config, state, torch.device("cuda"))

    runner.allocate_cache(max_batch * runner.interleave.num_blocks(args.context + 1))
    assert runner.cache is not None
    runner.cache.normal_()
    return runner


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", help="deepseek-v2, deepseek-v2-lite, or a directory with a config.json"
    )
    parser.add_argument("--batch", default="1,8,32,128,256,512", help="batch sizes")
    parser.add_argument("--context", type=int, default=128, help="cached tokens per request")
    parser.add_argument(
        "--emulate-rank-of",
        type=int,
        default=1,
        metavar="N",
        help="measure rank 0 of N ranks, with tp and dcp size N",
    )
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--exchange-policy", default="auto")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")

    batches = [int(batch) for batch in args.batch.split(",")]
    path = CONFIGS / args.model
    if not path.is_dir():
        path = Path(args.model)
    torch.manual_seed(0)
    with torch.inference_mode():
        runner = make_runner(args, path, max(batches))
        gigabytes = runner.bytes_read / 1e9
        label = f"{path.name}, {gigabytes:.1f} GB of weights, context {args.context}"
        if args.emulate_rank_of > 1:
            label += f", rank 0 of {args.emulate_rank_of} EMULATED: collectives are local copies"
        print(f"{label}, {runner.attention.name}, {torch.cuda.get_device_name()}")
        results = [measure(Step(runner, batch, args.context)) for batch in batches]
    print(json.dumps({"label": label, "results": results}))


if __name__ == "__main__":
    main()
