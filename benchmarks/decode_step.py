"""One rank's decode step on a GPU, part by part, each against its floor. Random weights of std 0.02.

    python benchmarks/decode_step.py deepseek-v2-lite
    python benchmarks/decode_step.py deepseek-v2 --emulate-rank-of 8 --context 4750 --batch 1,32,128,512

A floor is max(bytes / copy bandwidth, FLOPs / matmul rate). A part's time is that of a CUDA graph which
runs it for all layers. With --emulate-rank-of N the collectives of N ranks are local copies of the same
size, which says nothing of NVLink. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from emulation import emulate_state
from torch import Tensor

from minidcp.batch import Admission, CacheRows, StepPlan
from minidcp.config import EngineConfig
from minidcp.engine.model_runner import ModelRunner
from minidcp.kernels.linear import multiply_by_head
from minidcp.model_config import ModelConfig
from minidcp.models.layers import MLP, MoE
from minidcp.parallel.exchange import gather_heads
from minidcp.parallel.group import Group
from minidcp.plan import GPUS
from minidcp.request import SamplingParams

BANDWIDTH, FLOPS = GPUS["h200"]["bandwidth"], GPUS["h200"]["flops"]
CONFIGS = Path(__file__).parent / "configs"


def time_graph(work: Callable[[], object], repeats: int = 10) -> float:
    """Median seconds of a replay."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return time_replays(graph.replay, repeats)


def time_replays(replay: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    median: float = sorted(times[2:])[repeats // 2]
    return median


def floor(weights: float, moved: float, flops: float) -> float:
    return max((weights + moved) / BANDWIDTH, flops / FLOPS)


class Step:
    """One batch size at one context length: the parts of its decode step and their floors."""

    def __init__(self, runner: ModelRunner, batch_size: int, context: int) -> None:
        self.runner, self.b, self.context = runner, batch_size, context
        self.c, self.layers = runner.model_config, runner.model.layers
        blocks = runner.interleave.num_blocks(context + 1)
        self.plan = StepPlan(num_decode=batch_size)
        for row in range(batch_size):
            self.plan.slots.append(row)
            self.plan.starts.append(context)
            self.plan.lengths.append(1)
            self.plan.new_blocks += [(row, i, row * blocks + i) for i in range(blocks)]
            self.plan.sampling.append(row)
            self.plan.admitted.append(Admission(row, SamplingParams(temperature=0.0)))
        runner.tables.update(self.plan)
        rows = runner.build_batch(self.plan).decode
        assert rows is not None
        self.rows: CacheRows = rows
        self.dcp: Group = runner.state.dcp
        self.group_heads = self.c.num_attention_heads * self.dcp.size // runner.state.tp.size

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.runner.dtype, device=self.runner.device)

    def attention(self) -> tuple[float, float]:
        q, q_pe = self.normal(self.b, self.group_heads, 512), self.normal(self.b, self.group_heads, 64)
        cache, backend = self.runner.cache, self.runner.attention
        assert cache is not None

        def work() -> None:
            backend.plan(self.rows)
            for i in range(len(self.layers)):
                backend.decode(q, q_pe, cache[i], self.rows)

        tokens = self.b * (self.context + 1) / self.dcp.size
        flops = 2 * tokens * self.group_heads * (self.c.latent_dim + self.c.kv_lora_rank)
        return time_graph(work), len(self.layers) * floor(0, tokens * self.c.latent_dim * 2, flops)

    def experts(self) -> tuple[float, float]:
        """With the router and the shared experts."""
        x = self.normal(self.b, self.c.hidden_size)
        moes = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]

        def work() -> None:
            for moe in moes:
                moe(x).sum()

        total = 0.0
        for moe in moes:
            ids = moe.route(x)[1]
            per_expert = (moe.gate_up_proj[0].numel() + moe.down_proj[0].numel()) * 2
            total += floor(ids.unique().numel() * per_expert, 0, ids.numel() * per_expert)
        return time_graph(work), total

    def projections(self) -> tuple[float, float]:
        """Every other product with a weight: q, kv and o projections, absorption and W_UV, dense MLPs, head."""
        x, narrow = self.normal(self.b, self.c.hidden_size), self.rows.narrow
        head = self.runner.model.lm_head
        weights = [head.weight]
        for layer in self.layers:
            a = layer.self_attn
            weights += [a.a_proj.weight, a.o_proj.weight]
            weights += (a.group_w_uk, a.group_w_uv) if narrow else (a.w_uk, a.w_uv)
            if a.q_b_proj is not None:
                weights.append(a.q_b_proj.weight)
            if isinstance(layer.mlp, MLP):
                weights += [layer.mlp.gate_up_proj, layer.mlp.down_proj]
        total = sum(floor(w.numel() * 2, 0, 2 * self.b * w.numel()) for w in weights)

        def work() -> None:
            for layer in self.layers:
                a = layer.self_attn
                first = a.a_proj(x)[:, : -self.c.latent_dim]
                q = a.project_q(first, group=False)[..., : self.c.qk_nope_head_dim]
                if narrow:
                    q = q.repeat(1, self.group_heads // a.num_heads, 1)
                w_uk, w_uv = (a.group_w_uk, a.group_w_uv) if narrow else (a.w_uk, a.w_uv)
                out = multiply_by_head(multiply_by_head(q, w_uk.mT), w_uv)[:, : a.num_heads]
                a.o_proj(out.flatten(1))
                if isinstance(layer.mlp, MLP):
                    layer.mlp(x)
            head(x)

        return time_graph(work), total

    def exchange(self) -> tuple[float, float]:
        own, dims = self.group_heads // self.dcp.size, ((192, 128) if self.rows.narrow else (576, 512))
        q, x = self.normal(self.b, own, dims[0]), self.normal(self.b, self.c.hidden_size)
        out = self.normal(self.b, self.group_heads, dims[1])
        lse = torch.randn(self.b, self.group_heads, device=x.device)
        tp = self.runner.state.tp

        def work() -> None:
            for layer in self.layers:
                tp.all_reduce(x)
                tp.all_reduce(x)
                if self.dcp.size > 1:
                    gather_heads(q, self.dcp)
                    layer.self_attn.exchange(out, lse, self.dcp)

        if tp.size == 1:
            return 0.0, 0.0
        moved = (q.numel() * self.dcp.size + out.numel()) * 2 * (self.dcp.size > 1) + 2 * x.nbytes
        return time_graph(work), len(self.layers) * 2 * moved / BANDWIDTH

    def whole(self) -> tuple[float, float]:
        """Seconds of a graph replay, and of a step when many are launched one after another."""
        graphs = self.runner.graphs
        assert graphs is not None
        graphs.replay(self.plan)
        size = next(s for s in graphs.sizes if s >= self.b)
        alone = time_replays(graphs.steps[size][0].replay, 20)
        pending = [self.runner.execute(self.plan) for _ in range(5)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        pending = [self.runner.execute(self.plan) for _ in range(30)]
        torch.cuda.synchronize()
        assert len(pending) == 30
        return alone, (time.perf_counter() - start) / 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="deepseek-v2, deepseek-v2-lite, or a directory with a config.json")
    parser.add_argument("--batch", default="1,8,32,128,256,512", help="batch sizes")
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache per request")
    parser.add_argument("--emulate-rank-of", type=int, default=1, help="tp and dcp size whose rank 0 to be")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--exchange-policy", default="auto")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    sizes = [int(b) for b in args.batch.split(",")]
    path = CONFIGS / args.model if (CONFIGS / args.model).is_dir() else Path(args.model)
    n = args.emulate_rank_of
    config = EngineConfig(
        str(path),
        tp_size=n,
        dcp_size=n,
        dcp_comm_backend="a2a",
        device="cuda",
        dtype="bfloat16",
        load_format="dummy",
        attention_backend=args.attention_backend,
        exchange_policy=args.exchange_policy,
        max_model_len=args.context + 64,
        max_num_seqs=max(sizes),
        max_num_batched_tokens=8192,
    )
    torch.manual_seed(0)
    with torch.inference_mode():
        runner = ModelRunner(config, ModelConfig.from_hf(path), emulate_state(n, n), torch.device("cuda"))
        runner.allocate_cache(max(sizes) * runner.interleave.num_blocks(args.context + 1))
        assert runner.cache is not None
        runner.cache.normal_()
        label = f"{path.name}, {runner.bytes_read / 1e9:.1f} GB of weights, context {args.context}"
        if n > 1:
            label += f", rank 0 of {n} EMULATED: collectives are local copies"
        print(f"{label}, {type(runner.attention).__name__}, {torch.cuda.get_device_name()}")
        results = [measure(Step(runner, size, args.context)) for size in sizes]
    print(json.dumps({"label": label, "results": results}))


def measure(step: Step) -> dict[str, float]:
    parts = {name: getattr(step, name)() for name in ("projections", "attention", "exchange", "experts")}
    alone, launched = step.whole()
    bound = sum(part[1] for part in parts.values())
    rest = alone - sum(part[0] for part in parts.values())
    policy = "narrow" if step.rows.narrow else "wide"
    print(f"batch {step.b} ({policy}): {alone * 1e3:.2f} ms, floor {bound * 1e3:.2f}, ratio {alone / bound:.2f}")
    for name, (seconds, least) in parts.items():
        ratio = f"{seconds / least:6.2f}" if least else "     -"
        print(f"    {name:12} {seconds * 1e3:8.3f} ms   floor {least * 1e3:8.3f}   ratio {ratio}")
    print(f"    {'the rest':12} {rest * 1e3:8.3f} ms")
    gap = launched - alone
    print(f"    {'host gap':12} {gap * 1e3:8.3f} ms   {gap / launched:.1%} of a step")
    result = {"batch": step.b, "step_ms": alone * 1e3, "floor_ms": bound * 1e3, "launched_ms": launched * 1e3}
    return result | {f"{name}_ms": part[0] * 1e3 for name, part in parts.items()}


if __name__ == "__main__":
    main()
