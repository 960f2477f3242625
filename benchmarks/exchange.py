"""The DCP exchange: the bytes and the time of every exchange and policy, with DeepSeek-V2's shapes.

    python benchmarks/exchange.py                                # bytes, in a run on the CPU
    python benchmarks/exchange.py --ranks 8                      # and times of CUDA graphs on GPUs
    python benchmarks/exchange.py --ranks 8 --link-gb-per-s 350  # if the ranks share GPUs

Start MPS first if ranks share GPUs. All traffic is then within one GPU's memory, so the times are
those of launches, copies and barriers, not of NVLink. The batch from which narrow wins is then
computed from the bytes and --link-gb-per-s. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import normal, time_graph

from minidcp.attention.reference import ReferenceBackend
from minidcp.batch import BlockTables, ForwardBatch, StepPlan
from minidcp.config import EngineConfig
from minidcp.kernels.linear import multiply_by_head
from minidcp.kernels.meeting import MAX_PROGRAMS, Meeting
from minidcp.kernels.peer import merge_peers
from minidcp.kv_cache.interleave import Interleave
from minidcp.machine import Machine
from minidcp.model_config import ModelConfig
from minidcp.models.mla import MLAAttention
from minidcp.models.weights import RandomSource, Weights
from minidcp.parallel.exchange import EXCHANGES, PeerToPeer, make_exchange
from minidcp.parallel.group import Group
from minidcp.parallel.state import ParallelState, build_thread_states
from minidcp.parallel.symmetric import SymmetricGroup
from minidcp.resolve import resolve
from minidcp.rope_config import RopeConfig

HEADS = 128
LATENT_DIM = 512
ROPE_DIM = 64
NOPE_DIM = 128
V_DIM = 128
# What crosses for each head: the widths of q and of the output.
WIDTHS = {"wide": (LATENT_DIM + ROPE_DIM, LATENT_DIM), "narrow": (NOPE_DIM + ROPE_DIM, V_DIM)}

LAYERS = 16  # in a graph
BATCHES = (1, 8, 16, 32, 64, 128, 256, 512)

# Bytes per token and layer of other engines with tp=dcp=8, computed from what they send.
OTHER_ENGINES = {"SGLang 0.5.23 ag_rs": 361_984, "vLLM 0.33 and SGLang a2a": 244_160}

Times = dict[tuple[str, int, str], float]  # seconds per layer, by policy, batch and exchange


def make_config() -> ModelConfig:
    """DeepSeek-V2's attention behind a small hidden dim."""
    config = ModelConfig.from_dict(
        {
            "model_type": "deepseek_v2",
            "vocab_size": 8,
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "q_lora_rank": 64,
            "kv_lora_rank": LATENT_DIM,
            "qk_nope_head_dim": NOPE_DIM,
            "qk_rope_head_dim": ROPE_DIM,
            "v_head_dim": V_DIM,
            "intermediate_size": 8,
        }
    )
    assert config.rope == RopeConfig()
    return config


def count_bytes(exchange: str, policy: str, q_proj: str, size: int = 8, tokens: int = 2) -> float:
    """Count the bytes that a rank receives per token when one layer decodes, on thread ranks."""
    config = make_config()
    engine_config = EngineConfig(
        "none",
        tp_size=size,
        dcp_size=size,
        dcp_comm_backend=exchange,
        exchange_policy=policy,
        q_proj=q_proj,
        device="cpu",
    )
    options = resolve(engine_config, config, Machine(), report=lambda level, text: None)
    states, _ = build_thread_states(size, size, exchange)
    received = [0] * size

    def run(state: ParallelState) -> None:
        device = torch.device("cpu")
        attention = ReferenceBackend(config.softmax_scale)
        weights = Weights(RandomSource(torch.bfloat16, device))
        layer = MLAAttention(config, options, state, attention, weights)

        plan = StepPlan(
            num_decode=tokens,
            slots=list(range(tokens)),
            starts=[9] * tokens,
            lengths=[1] * tokens,
        )
        tables = BlockTables(tokens, 1)
        tables.table[:, 0] = np.arange(tokens)
        batch = ForwardBatch.build(
            plan, tables, Interleave(size, 16), state.dcp.rank, options.exchanges_narrow, device
        )
        assert batch.decode is not None
        attention.prepare(batch.decode)

        x = torch.randn(tokens, config.hidden_size).bfloat16()
        kv = torch.randn(tokens, 16, config.latent_dim).bfloat16()
        layer(x, torch.randn(tokens, ROPE_DIM), kv, batch)
        received[state.tp.rank] = state.dcp.received_bytes

    threads = [threading.Thread(target=run, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(received)) == 1
    return received[0] / tokens


def time_exchange(group: Group, name: str, policy: str, batch: int) -> float:
    """Seconds per layer of the q gather and the exchange.

    Both start from where the model writes q and the partial outputs. Writing them is not timed.
    """
    exchange = make_exchange(name, group)
    q_width, out_width = WIDTHS[policy]
    q = normal(batch, HEADS // group.size, q_width)
    out = normal(batch, HEADS, out_width)
    lse = torch.randn(batch, HEADS, device="cuda")

    # Fill both halves of the group's buffer with numbers.
    for _ in range(2):
        group.all_gather(q)
        PeerToPeer(group).merge(out, lse)

    def step() -> None:
        group.begin_step()
        for _ in range(LAYERS):
            exchange.gather_q(exchange.q_buffer(q.shape, q))
            partial = out
            if name == "p2p":
                partial = exchange.out_buffer(out.shape, out)
            exchange.merge(partial, lse)

    # The ranks meet before each replay, so that no rank's clock runs while another one is late.
    return time_graph(step, before=group.begin_step) / LAYERS


def time_products(policy: str, batch: int, size: int) -> float:
    """Seconds per layer of the products with W_UK and W_UV, for a rank's heads with this policy."""
    heads = HEADS if policy == "narrow" else HEADS // size
    weights = []
    for _ in range(LAYERS):
        w_uk = normal(heads, NOPE_DIM, LATENT_DIM).mT
        w_uv = normal(heads, V_DIM, LATENT_DIM)
        weights.append((w_uk, w_uv))
    q = normal(batch, heads, NOPE_DIM)
    latent = normal(batch, heads, LATENT_DIM)

    def work() -> None:
        for w_uk, w_uv in weights:
            multiply_by_head(q, w_uk)
            multiply_by_head(latent, w_uv)

    return time_graph(work) / LAYERS


def time_merge_alone(batch: int, dim: int, size: int = 8) -> tuple[float, float]:
    """Time the p2p kernel where it waits for nobody and all buffers are in this GPU's memory.

    Returns:
        Its seconds, and the bytes that it moves.
    """
    own_heads = HEADS // size
    lse_offset = batch * HEADS * dim * 2
    buffer_bytes = lse_offset + batch * HEADS * 4
    buffers = torch.zeros(LAYERS, size, buffer_bytes, dtype=torch.uint8, device="cuda")
    buffers.view(torch.bfloat16)[:] = 0.5
    lse = torch.randn(batch, HEADS, device="cuda")
    out = normal(batch, own_heads, dim)
    merged_lse = torch.empty(batch, own_heads, device="cuda")

    # The pads say that all peers have come to more meetings than there will be.
    num_pads = MAX_PROGRAMS.value
    pads = torch.full((size, size, num_pads), 1 << 30, dtype=torch.int32, device="cuda")
    meeting = Meeting(
        rank=0,
        pads=torch.tensor([pad.data_ptr() for pad in pads], device="cuda"),
        epochs=torch.zeros(num_pads, dtype=torch.int32, device="cuda"),
        programs=torch.cuda.get_device_properties(0).multi_processor_count * 2,
    )
    addresses = []
    staged_lses = []
    for layer in buffers:
        addresses.append(torch.tensor([buffer.data_ptr() for buffer in layer], device="cuda"))
        staged_lses.append(layer[0, lse_offset:].view(torch.float32).view(batch, HEADS))

    def work() -> None:
        for pointers, staged_lse in zip(addresses, staged_lses, strict=True):
            merge_peers(meeting, pointers, lse_offset, staged_lse, lse, out, merged_lse)

    seconds = time_graph(work) / LAYERS
    # Every rank's partials are read and the result is written; the LSEs are also staged.
    moved = batch * own_heads * (size + 1) * (dim * 2 + 4) + 2 * lse.nbytes
    return seconds, moved


def time_copy(moved: int) -> float:
    """Seconds of torch's copy that moves as many bytes, read and written.

    This is what a kernel of that size can reach.
    """
    data = torch.zeros(2 * LAYERS, moved // 2, dtype=torch.uint8, device="cuda").fill_(7)

    def work() -> None:
        for i in range(LAYERS):
            data[2 * i].copy_(data[2 * i + 1])

    return time_graph(work) / LAYERS


def run_rank(rank: int, size: int, port: int, results: Any) -> None:
    """Time all exchanges as one rank. Rank 0 writes the times to `results`."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    num_gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank % num_gpus)
    torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    assert dist.group.WORLD is not None

    max_programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    if num_gpus < size:
        # Ranks that share a GPU must fit on it together. Half of it is enough, as nothing else runs
        # here.
        ranks_per_gpu = -(-size // num_gpus)
        max_programs //= 2 * ranks_per_gpu
    group = SymmetricGroup(dist.group.WORLD, device, max_programs)
    for policy in WIDTHS:
        for batch in BATCHES:
            for exchange in EXCHANGES:
                seconds = time_exchange(group, exchange, policy, batch)
                if rank == 0:
                    results[policy, batch, exchange] = seconds
    dist.barrier()
    os._exit(0)


def print_times(size: int, link_gb_per_s: float | None) -> dict[str, float]:
    """Time all exchanges on `size` ranks and print the times. Returns them in µs."""
    num_gpus = torch.cuda.device_count()
    is_shared = num_gpus < size
    where = f"{size} ranks on {num_gpus} × {torch.cuda.get_device_name()}"
    if is_shared:
        where += ": they SHARE memory, so this is no measurement of NVLink"
    print(f"\nq gather + exchange, µs per layer, {where}")

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(run_rank, (size, store.port, shared), nprocs=size)
        times: Times = dict(shared)

    titles = "".join(f"{exchange:>9}" for exchange in EXCHANGES)
    print(f"{'':8}{'batch':>6}{titles}{'p2p/a2a':>9}")
    for policy in WIDTHS:
        for batch in BATCHES:
            row = "".join(f"{times[policy, batch, name] * 1e6:9.1f}" for name in EXCHANGES)
            ratio = times[policy, batch, "p2p"] / times[policy, batch, "a2a"]
            print(f"{policy:8}{batch:6}{row}{ratio:9.2f}")

    # Where ranks share memory, the measured traffic would say nothing of the link.
    print_threshold(times, size, link_gb_per_s if is_shared else None)
    return {
        f"{policy} {batch} {exchange}": seconds * 1e6
        for (policy, batch, exchange), seconds in times.items()
    }


def print_threshold(times: Times, size: int, link_gb_per_s: float | None) -> None:
    """Print from which batch on narrow is faster, counting products and traffic.

    The traffic takes the measured time of p2p, or, with `link_gb_per_s`, the time of its bytes on
    such a link.
    """
    source = f"{link_gb_per_s} GB/s" if link_gb_per_s else "measured p2p"
    print(f"\nwide against narrow, µs per layer: products + traffic ({source})")
    threshold = None
    for batch in BATCHES:
        seconds = {}
        for policy, (q_width, out_width) in WIDTHS.items():
            traffic = times[policy, batch, "p2p"]
            if link_gb_per_s:
                bytes_per_head = (q_width + out_width) * 2 + 4
                received = (size - 1) * (HEADS // size) * bytes_per_head * batch
                traffic = received / link_gb_per_s * 1e-9
            seconds[policy] = time_products(policy, batch, size) + traffic
        if threshold is None and seconds["narrow"] < seconds["wide"]:
            threshold = batch
        wide_us = seconds["wide"] * 1e6
        narrow_us = seconds["narrow"] * 1e6
        print(f"{batch:6}: wide {wide_us:8.1f}  narrow {narrow_us:8.1f}")
    print(f"narrow wins from a batch of {threshold} on (--narrow-threshold)")


def print_bytes() -> dict[str, float]:
    """Count the bytes of every exchange and policy, and print them beside other engines'."""
    print(
        "bytes received per rank, token and layer, DeepSeek-V2 with tp=dcp=8 "
        "(p2p reads what a2a sends)"
    )
    counts = {}
    for policy in WIDTHS:
        for q_proj in ("sharded", "replicated"):
            for exchange in ("ag_rs", "a2a"):
                count = count_bytes(exchange, policy, q_proj)
                counts[f"{policy} {q_proj} {exchange}"] = count
                print(f"    {policy:7} q {q_proj:11} {exchange:6} {count:10,.0f}")
    for name, count in OTHER_ENGINES.items():
        print(f"    {name:26} {count:10,}")
    return counts


def print_merge_alone() -> dict[str, float]:
    """Time the p2p kernel beside a copy, and print the times. Returns them in µs."""
    print("\nthe p2p kernel alone, 8 buffers in local memory")
    times = {}
    for dim in (LATENT_DIM, V_DIM):
        for batch in (1, 32, 128, 512):
            seconds, moved = time_merge_alone(batch, dim)
            rate = moved / seconds / 1e9
            copy_seconds = time_copy(int(moved))
            print(
                f"    {batch:4} × 16 × {dim}: {seconds * 1e6:7.2f} µs {rate:6.0f} GB/s;"
                f" a copy of as many bytes {copy_seconds * 1e6:7.2f} µs"
            )
            times[f"merge {batch} {dim}"] = seconds * 1e6
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=0, help="measure times on this many ranks")
    parser.add_argument(
        "--link-gb-per-s",
        type=float,
        help="where ranks share a GPU, compute the traffic's time for a link of this bandwidth",
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    with torch.inference_mode():
        result["bytes"] = print_bytes()
    if args.ranks:
        result["us"] = print_times(args.ranks, args.link_gb_per_s)
        result.update(print_merge_alone())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
