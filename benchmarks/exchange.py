"""The DCP exchange: bytes that cross, and time, for every exchange and policy.

    python benchmarks/exchange.py                  # bytes received, counted in a run on the CPU
    python benchmarks/exchange.py --ranks 8        # and time on GPUs: q gather + exchange, in CUDA graphs
    python benchmarks/exchange.py --ranks 8 --link-gb-per-s 350   # and where narrow begins to win

With fewer GPUs than ranks the ranks share them (start MPS first). All traffic is then within one GPU's
memory, so times tell of launches, copies and barriers, not of NVLink; the threshold is then computed from
the bytes and --link-gb-per-s. Shapes are DeepSeek-V2's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from minidcp.attention.reference import ReferenceBackend
from minidcp.batch import BlockTables, ContextPolicy, ForwardBatch, StepPlan
from minidcp.kernels.linear import multiply_by_head
from minidcp.kernels.peer import MAX_PROGRAMS, Meeting, merge_peers
from minidcp.kv_cache.interleave import Interleave
from minidcp.model_config import ModelConfig, RopeConfig
from minidcp.models.deepseek_v2 import Blueprint, MLAAttention
from minidcp.models.weights import RandomSource, Weights
from minidcp.parallel.exchange import EXCHANGES, gather_heads
from minidcp.parallel.group import Group
from minidcp.parallel.state import ParallelState, build_thread_states
from minidcp.parallel.symmetric import SymmetricGroup

HEADS, LATENT, ROPE, NOPE, V = 128, 512, 64, 128, 128
WIDTHS = {"wide": (LATENT + ROPE, LATENT), "narrow": (NOPE + ROPE, V)}  # of q and of the output, per head
LAYERS = 16  # in a graph
BATCHES = (1, 8, 16, 32, 64, 128, 256, 512)
# Per token and layer with tp=dcp=8; from minidcp's design notes.
PEERS = {"SGLang 0.5.23 ag_rs": 361_984, "vLLM 0.33 and SGLang a2a": 244_160}


def count_bytes(exchange: str, policy: str, q_proj: str, size: int = 8, tokens: int = 2) -> float:
    """Bytes that a rank receives per token in one layer's decode, counted on thread ranks."""
    config = make_config()
    states, _ = build_thread_states(size, size)
    received = [0] * size

    def run(state: ParallelState) -> None:
        blueprint = Blueprint(
            config,
            state,
            ReferenceBackend(config.softmax_scale),
            EXCHANGES[exchange],
            group_heads=policy == "narrow" or q_proj == "replicated",
            replicated_q=q_proj == "replicated",
        )
        cpu = torch.device("cpu")
        layer = MLAAttention(blueprint, Weights(RandomSource(torch.bfloat16, cpu)))
        plan = StepPlan(tokens, [*range(tokens)], [9] * tokens, [1] * tokens)
        tables = BlockTables(tokens, 1)
        tables.table[:, 0] = np.arange(tokens)
        context = ContextPolicy(config, HEADS // size, Interleave(size, 16))
        batch = ForwardBatch.build(plan, tables, context, state.tp.rank, lambda _: policy == "narrow", cpu)
        assert batch.decode is not None
        layer.attention.plan(batch.decode)
        kv = torch.randn(tokens, 16, config.latent_dim).bfloat16()
        x = torch.randn(tokens, 64).bfloat16()
        layer(x, torch.randn(tokens, ROPE), kv, batch)
        received[state.tp.rank] = state.dcp.received_bytes

    threads = [threading.Thread(target=run, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(received)) == 1
    return received[0] / tokens


def make_config() -> ModelConfig:
    """DeepSeek-V2's attention behind a small hidden dim."""
    whole = ModelConfig.from_dict(
        {
            "model_type": "deepseek_v2",
            "vocab_size": 8,
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "q_lora_rank": 64,
            "kv_lora_rank": LATENT,
            "qk_nope_head_dim": NOPE,
            "qk_rope_head_dim": ROPE,
            "v_head_dim": V,
            "intermediate_size": 8,
        }
    )
    assert whole.rope == RopeConfig()
    return whole


def time_graph(work: Callable[[], object], group: Group | None = None) -> float:
    """Median seconds of a layer; `work` does LAYERS of them. All ranks of `group` replay together."""

    def step() -> None:
        if group is not None:
            group.begin_step()
        work()

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if group is not None:
            group.begin_step()  # so that no rank's clock runs while another is late
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    median: float = sorted(times[2:])[5]
    return median / LAYERS


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def time_exchange(group: Group, exchange: str, policy: str, batch: int) -> float:
    """Seconds per layer of the q gather and the exchange, both from where the model's producers write; what
    those wrote there is not timed."""
    q_width, out_width = WIDTHS[policy]
    own = HEADS // group.size
    q = normal(batch, own, q_width)
    out, lse = normal(batch, HEADS, out_width), torch.randn(batch, HEADS, device="cuda")

    def work() -> None:
        for _ in range(LAYERS):
            gather_heads(group.empty(q.shape, q), group)
            partial = group.empty(out.shape, out) if exchange == "p2p" else out
            EXCHANGES[exchange](partial, lse, group)

    for _ in range(2):  # both halves hold numbers
        gather_heads(q, group)
        EXCHANGES["p2p"](out, lse, group)
    return time_graph(work, group)


def time_products(policy: str, batch: int, size: int) -> float:
    """Seconds per layer of absorption and W_UV, for the heads that the policy gives a rank."""
    heads = HEADS if policy == "narrow" else HEADS // size
    weights = [(normal(heads, NOPE, LATENT).mT, normal(heads, V, LATENT)) for _ in range(LAYERS)]
    q, latent = normal(batch, heads, NOPE), normal(batch, heads, LATENT)

    def work() -> None:
        for w_uk, w_uv in weights:
            multiply_by_head(q, w_uk)
            multiply_by_head(latent, w_uv)

    return time_graph(work)


def time_merge_alone(batch: int, dim: int, size: int = 8) -> tuple[float, float]:
    """Seconds of the p2p kernel with all ranks' buffers in this GPU's memory and nobody to wait for, and
    how many bytes it moves."""
    own = HEADS // size
    lse_offset = batch * HEADS * dim * 2
    stride = lse_offset + batch * HEADS * 4
    buffers = torch.zeros(LAYERS, size, stride, dtype=torch.uint8, device="cuda")
    buffers.view(torch.bfloat16)[:] = 0.5
    lse = torch.randn(batch, HEADS, device="cuda")
    out, merged = normal(batch, own, dim), torch.empty(batch, own, device="cuda")
    pads = torch.full((size, size, MAX_PROGRAMS.value), 1 << 30, dtype=torch.int32, device="cuda")
    meeting = Meeting(
        0,
        torch.tensor([pad.data_ptr() for pad in pads], device="cuda"),
        torch.zeros(MAX_PROGRAMS.value, dtype=torch.int32, device="cuda"),
        torch.cuda.get_device_properties(0).multi_processor_count * 2,
    )
    pointers = [torch.tensor([b.data_ptr() for b in layer], device="cuda") for layer in buffers]
    staged = [layer[0, lse_offset:].view(torch.float32).view(batch, HEADS) for layer in buffers]

    def work() -> None:
        for where, staged_lse in zip(pointers, staged, strict=True):
            merge_peers(meeting, where, lse_offset, staged_lse, lse, out, merged)

    seconds = time_graph(work)
    return seconds, batch * own * ((size + 1) * (dim * 2 + 4)) + 2 * lse.nbytes


def time_copy(moved: int) -> float:
    """Seconds of torch's copy that moves as many bytes, read and written: what a kernel of this size can reach."""
    source = torch.zeros(2 * LAYERS, moved // 2, dtype=torch.uint8, device="cuda").fill_(7)

    def work() -> None:
        for i in range(LAYERS):
            source[2 * i].copy_(source[2 * i + 1])

    return time_graph(work)


def run_rank(rank: int, size: int, port: int, results: Any) -> None:
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus)
    torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    if gpus < size:
        programs //= 2 * -(-size // gpus)  # nothing else runs here
    group = SymmetricGroup(dist.group.WORLD, device, programs)
    for policy in WIDTHS:
        for batch in BATCHES:
            for exchange in EXCHANGES:
                seconds = time_exchange(group, exchange, policy, batch)
                if rank == 0:
                    results[policy, batch, exchange] = seconds
    dist.barrier()
    os._exit(0)


def print_times(size: int, link_gb_per_s: float | None) -> dict[str, Any]:
    gpus = torch.cuda.device_count()
    where = f"{size} ranks on {gpus} × {torch.cuda.get_device_name()}"
    if gpus < size:
        where += ": they SHARE memory, so this is no measurement of NVLink"
    print(f"\nq gather + exchange, µs per layer, {where}")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(run_rank, (size, store.port, shared), nprocs=size)
        times = dict(shared)
    print(f"{'':8}{'batch':>6}" + "".join(f"{e:>9}" for e in EXCHANGES) + f"{'p2p/a2a':>9}")
    for policy in WIDTHS:
        for batch in BATCHES:
            row = [times[policy, batch, e] * 1e6 for e in EXCHANGES]
            ratio = times[policy, batch, "p2p"] / times[policy, batch, "a2a"]
            print(f"{policy:8}{batch:6}" + "".join(f"{t:9.1f}" for t in row) + f"{ratio:9.2f}")
    print_threshold(times, size, link_gb_per_s if gpus < size else None)
    return {f"{policy} {batch} {exchange}": t * 1e6 for (policy, batch, exchange), t in times.items()}


def print_threshold(times: dict[Any, float], size: int, link_gb_per_s: float | None) -> None:
    """From which batch narrow is faster: products, and what crosses."""
    source = f"{link_gb_per_s} GB/s" if link_gb_per_s else "measured p2p"
    print(f"\nwide against narrow, µs per layer: products + traffic ({source})")
    first = None
    for batch in BATCHES:
        totals = {}
        for policy, (q, out) in WIDTHS.items():
            crossing = (size - 1) * (HEADS // size) * ((q + out) * 2 + 4) * batch
            traffic = crossing / link_gb_per_s * 1e-9 if link_gb_per_s else times[policy, batch, "p2p"]
            totals[policy] = time_products(policy, batch, size) + traffic
        wins = totals["narrow"] < totals["wide"]
        first = first or (batch if wins else None)
        print(f"{batch:6}: wide {totals['wide'] * 1e6:8.1f}  narrow {totals['narrow'] * 1e6:8.1f}")
    print(f"narrow wins from a batch of {first} on (--narrow-threshold)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=0, help="time on GPUs with so many ranks")
    parser.add_argument("--link-gb-per-s", type=float, help="of NVLink, where the ranks share a GPU")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"bytes": {}}
    print("bytes received per rank, token and layer, DeepSeek-V2 with tp=dcp=8 (p2p reads what a2a sends)")
    with torch.inference_mode():
        for policy in WIDTHS:
            for q_proj in ("sharded", "replicated"):
                for exchange in ("ag_rs", "a2a"):
                    count = count_bytes(exchange, policy, q_proj)
                    result["bytes"][f"{policy} {q_proj} {exchange}"] = count
                    print(f"    {policy:7} q {q_proj:11} {exchange:6} {count:10,.0f}")
    for name, count in PEERS.items():
        print(f"    {name:26} {count:10,}")
    if args.ranks:
        result["us"] = print_times(args.ranks, args.link_gb_per_s)
        print("\nthe p2p kernel alone, 8 buffers in local memory")
        for dim in (LATENT, V):
            for batch in (1, 32, 128, 512):
                seconds, moved = time_merge_alone(batch, dim)
                rate = moved / seconds / 1e9
                copy = time_copy(int(moved))
                print(f"    {batch:4} × 16 × {dim}: {seconds * 1e6:7.2f} µs {rate:6.0f} GB/s;"
                      f" a copy of as many bytes {copy * 1e6:7.2f} µs")  # fmt: skip
                result[f"merge {batch} {dim}"] = seconds * 1e6
    print(json.dumps(result))


if __name__ == "__main__":
    main()
