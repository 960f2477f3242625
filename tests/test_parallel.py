"""Groups, and the exchange compared with attention over the whole context."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from exchange import count_bytes

from minidcp.parallel.exchange import EXCHANGES
from minidcp.parallel.group import Group, TorchGroup
from minidcp.parallel.state import ParallelState, build_thread_states


def run_threads(tp_size: int, dcp_size: int, work: Callable[[ParallelState], Any]) -> list[Any]:
    """Run work(state) on every rank of a thread group. Returns the results by rank."""
    states, _ = build_thread_states(tp_size, dcp_size)
    results: list[Any] = [None] * len(states)

    def run(rank: int) -> None:
        results[rank] = work(states[rank])

    threads = [threading.Thread(target=run, args=(r,)) for r in range(len(states))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def inputs(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Small whole numbers, for which sums are exact in any order and dtype."""
    return [
        torch.arange(3 * size * 2).view(3, size, 2).to(dtype) % 7 + rank for rank in range(size)
    ]


def use_every_collective(group: Group, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    xs = inputs(group.size, dtype)
    mine, kept = xs[group.rank], xs[group.rank].clone()
    strided = mine.transpose(1, 2)
    flat = mine.flatten(1)
    results = {}
    for _ in range(3):  # more than the number of buffers
        results = {
            "all_reduce": group.all_reduce(flat),
            "all_gather": group.all_gather(mine),
            "all_gather strided": group.all_gather(strided),
            "reduce_scatter": group.reduce_scatter(mine),
            "all_to_all": group.all_to_all(mine),
        }
    assert torch.equal(mine, kept), "an input was changed"
    return results


def check_collectives(
    results: dict[str, torch.Tensor], rank: int, size: int, dtype: torch.dtype
) -> None:
    xs = inputs(size, dtype)
    expected = {
        "all_reduce": sum(xs[1:], xs[0]).flatten(1),
        "all_gather": torch.stack(xs, 1),
        "all_gather strided": torch.stack([x.transpose(1, 2) for x in xs], 1),
        "reduce_scatter": sum((x[:, rank] for x in xs[1:]), xs[0][:, rank]),
        "all_to_all": torch.stack([x[:, rank] for x in xs], 1),
    }
    for name, value in expected.items():
        assert results[name].dtype == dtype
        assert torch.equal(results[name], value), f"{name} on rank {rank} of {size}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_thread_group(size: int, dtype: torch.dtype) -> None:
    results = run_threads(size, 1, lambda state: use_every_collective(state.tp, dtype))
    for rank in range(size):
        check_collectives(results[rank], rank, size, dtype)


def run_process(rank: int, size: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    group = TorchGroup(dist.group.WORLD)
    for dtype in (torch.float32, torch.bfloat16):
        check_collectives(use_every_collective(group, dtype), rank, size, dtype)
    # Groups that do not begin at rank 0.
    pairs = [dist.new_group([i, i + 1]) for i in range(0, size, 2)]
    pair = TorchGroup(pairs[rank // 2])
    assert pair.all_gather(torch.tensor([rank])).tolist() == [[rank // 2 * 2, rank // 2 * 2 + 1]]
    dist.destroy_process_group()


def test_torch_group() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(run_process, (4, store.port), nprocs=4)


def test_a_failed_rank_does_not_leave_its_peers_waiting() -> None:
    states, barriers = build_thread_states(2, 1)
    failures = []

    def wait() -> None:
        try:
            states[0].tp.all_reduce(torch.ones(1))
        except threading.BrokenBarrierError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    barriers[0].abort()
    thread.join(10)
    assert len(failures) == 1


def test_dcp_groups_are_consecutive_ranks() -> None:
    gathered = run_threads(
        8,
        4,
        lambda s: (s.tp.rank // s.dcp.size, s.dcp.all_gather(torch.tensor([s.tp.rank])).tolist()),
    )
    assert gathered == [(r // 4, [list(range(r // 4 * 4, r // 4 * 4 + 4))]) for r in range(8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", ["ag_rs", "a2a"])  # p2p needs GPUs: tests/gpu/test_exchange.py
def test_exchange_is_attention_over_the_union(name: str, size: int, dtype: torch.dtype) -> None:
    """Random scores and values, unevenly split over ranks, some of which get nothing."""
    torch.manual_seed(0)
    tokens, heads, dim, context = 5, 2 * size, 16, 11
    scores = torch.randn(tokens, heads, context) * 4
    values = torch.randn(tokens, heads, context, dim)
    owner = torch.randint(0, size, (tokens, context))
    owner[0] = size - 1  # only the last rank has tokens of request 0
    whole = (scores.double().softmax(-1)[..., None] * values.double()).sum(2)
    q = torch.randn(tokens, heads, 8).to(dtype)

    def work(state: ParallelState) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mine = scores.masked_fill((owner != state.tp.rank)[:, None], -torch.inf)
        lse = mine.logsumexp(-1)
        # NaN where the shard is empty.
        out = (mine.softmax(-1)[..., None] * values).sum(2).to(dtype)
        heads_each = heads // size
        own = q[:, state.tp.rank * heads_each :][:, :heads_each]
        exchange = EXCHANGES[name](state.dcp)
        return *exchange.merge(out, lse), exchange.gather_q(own)

    results = run_threads(size, size, work)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    merged = torch.cat([out for out, _, _ in results], 1)
    torch.testing.assert_close(merged.double(), whole, atol=tolerance, rtol=tolerance)
    lse = torch.cat([lse for _, lse, _ in results], 1)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(gathered, q) for _, _, gathered in results)


@pytest.mark.parametrize(
    ("exchange", "policy", "q_proj", "expected"),
    [
        ("a2a", "wide", "sharded", 244_160),
        ("a2a", "narrow", "sharded", 72_128),
        ("a2a", "narrow", "replicated", 29_120),
        ("ag_rs", "wide", "sharded", 247_296),
    ],
)
def test_bytes_received_per_token_and_layer(
    exchange: str, policy: str, q_proj: str, expected: int
) -> None:
    """DeepSeek-V2 at tp=dcp=8. p2p reads what a2a sends; tests/gpu has it."""
    assert count_bytes(exchange, policy, q_proj) == expected
