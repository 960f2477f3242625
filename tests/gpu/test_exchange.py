"""Collectives over symmetric memory and the p2p exchange: eight ranks that share one GPU.

EXCHANGE_RANKS in the environment makes it another number of ranks, such as one for each GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import triton
import triton.language as tl
from test_parallel import check_collectives, use_every_collective

from minidcp.kernels.experts import ExpertOutputs
from minidcp.kernels.fp8 import Quantized, quantize, widen
from minidcp.kernels.norm import rms_norm
from minidcp.parallel.exchange import EXCHANGES
from minidcp.parallel.symmetric import BUFFER_BYTES, ONE_SHOT_BYTES, SymmetricGroup

pytestmark = pytest.mark.gpu
SIZE = int(os.environ.get("EXCHANGE_RANKS", "8"))
HEADS = 16
REPLAYS = 1000


def spawn(*work: Callable[[SymmetricGroup], None]) -> None:
    """Call these functions on every rank, one after the other."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(run_rank, (store.port, work), nprocs=SIZE)


def run_rank(rank: int, port: int, work: tuple[Callable[[SymmetricGroup], None], ...]) -> None:
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus)
    torch.cuda.set_device(device)
    torch.set_default_device(device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    group = SymmetricGroup(dist.group.WORLD, device, max_programs=4)
    for function in work:
        function(group)
    torch.cuda.synchronize()
    dist.barrier()


def test_collectives_and_exchanges() -> None:
    spawn(use_collectives, use_exchanges, use_reserved_memory, use_norms, use_norms_of_shared_rows)


def use_collectives(group: SymmetricGroup) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        group.begin_step()
        check_collectives(use_every_collective(group, dtype), group.rank, SIZE, dtype)
    # Larger than a buffer, so it goes in pieces. Each rank adds up a part of the all-reduce.
    rows = BUFFER_BYTES // (1 << 20) + 3
    x = torch.arange(rows * (1 << 18)).view(rows, -1).float() % 1000 + group.rank
    everyone = SIZE * (x - group.rank) + sum(range(SIZE))
    assert torch.equal(group.all_reduce(x), everyone)
    gathered = group.all_gather(x)
    assert all(torch.equal(gathered[:, r], x - group.rank + r) for r in range(SIZE))
    parts = x.view(rows, SIZE, -1)
    assert torch.equal(group.reduce_scatter(parts), everyone.view(rows, SIZE, -1)[:, group.rank])
    swapped = group.all_to_all(parts)
    assert all(
        torch.equal(swapped[:, r], parts[:, group.rank] - group.rank + r) for r in range(SIZE)
    )


def use_reserved_memory(group: SymmetricGroup) -> None:
    """Memory from `empty` is for the next collective. Another tensor is refused there."""
    group.begin_step()
    x = torch.ones(4, 8)
    reserved = group.empty(x.shape, x)
    with pytest.raises(RuntimeError, match=r"memory from Group.empty would be overwritten"):
        group.all_reduce(x)
    assert torch.equal(group.all_reduce(reserved.copy_(x)), SIZE * x)
    assert torch.equal(group.all_reduce(x), SIZE * x)


def use_norms(group: SymmetricGroup) -> None:
    """All-reduce and norm in one kernel give the bits of one after the other."""
    hidden = 5120
    most = ONE_SHOT_BYTES // (2 * hidden)  # tokens for which it is one kernel
    weight = torch.rand(hidden).bfloat16()
    for tokens in (1, 2, 7, most):
        group.begin_step()
        torch.manual_seed(tokens)
        residual = torch.randn(tokens, hidden).bfloat16()
        torch.manual_seed(100 * tokens + group.rank)
        parts = torch.randn(tokens, 8, hidden).bfloat16()
        outputs = ExpertOutputs(parts, torch.rand(tokens, 8))
        summand = outputs.sum()
        expected, expected_total = rms_norm(group.all_reduce(summand), weight, 1e-6, residual)
        fp8 = quantize(expected)

        in_place = group.empty(summand.shape, summand).copy_(summand)
        for x, scales in ((in_place, None), (summand, None), outputs):
            for quantizes in (False, True):
                if x is in_place and quantizes:
                    continue  # it was for one collective
                normed, total = group.all_reduce_and_norm(
                    x, scales, residual, weight, 1e-6, quantizes
                )
                assert torch.equal(widen(normed), expected)
                assert torch.equal(total, expected_total)
                if isinstance(normed, Quantized):
                    assert torch.equal(normed.fp8.values.float(), fp8.values.float())
                    assert torch.equal(normed.fp8.scales, fp8.scales)


def use_norms_of_shared_rows(group: SymmetricGroup) -> None:
    """Two layers, on ranks that are late at random, give the bits of one collective after the
    other; the ranks' rows of the residual are all rows."""
    hidden = 5120
    torch.manual_seed(0)  # the ranks have one weight
    weight = torch.rand(hidden).bfloat16()
    late = torch.Generator("cpu").manual_seed(group.rank)

    def be_late() -> None:
        cycles = int(torch.randint(0, 1_000_000, (1,), generator=late, device="cpu"))
        torch.cuda._sleep(cycles)

    for tokens in (52, 300, 301, 1023, 2048, 8191, 8192):
        torch.manual_seed(tokens)
        embedded = torch.randn(tokens, hidden).bfloat16()
        torch.manual_seed(100 * tokens + group.rank)
        summand = torch.randn(tokens, hidden).bfloat16()
        outputs = ExpertOutputs(torch.randn(tokens, 3, hidden).bfloat16(), torch.rand(tokens, 3))
        group.begin_step()
        first, residual = rms_norm(group.all_reduce(summand), weight, 1e-6, embedded)
        second, residual = rms_norm(group.all_reduce(outputs.sum()), weight, 1e-6, residual)
        expected = [(x, quantize(x)) for x in (first, second)]

        for quantizes in (False, True, False):
            group.begin_step()
            x = summand
            if not quantizes:
                x = group.empty(summand.shape, summand).copy_(summand)
            be_late()
            first, total = group.all_reduce_and_norm(x, None, embedded, weight, 1e-6, quantizes)
            be_late()
            second, total = group.all_reduce_and_norm(*outputs, total, weight, 1e-6, quantizes)
            group.own_half().fill_(255)  # NaN: nobody reads it any more
            be_late()
            for normed, (wanted, wanted_fp8) in zip((first, second), expected, strict=True):
                assert torch.equal(widen(normed), wanted), f"{tokens} tokens"
                assert isinstance(normed, Quantized) == quantizes
                if isinstance(normed, Quantized):
                    assert torch.equal(normed.fp8.values.float(), wanted_fp8.values.float())
                    assert torch.equal(normed.fp8.scales, wanted_fp8.scales)
            begin = group.rank * -(-tokens // SIZE)
            assert torch.equal(total, residual[begin : begin + len(total)])
            lengths = group.all_gather(torch.tensor([[len(total)]]))
            assert int(lengths.sum()) == tokens


def make_partial(rank: int, salt: int, tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's partial attention. About a third of the shards are empty and hold NaN."""
    generator = torch.Generator("cuda").manual_seed(1000 * salt + rank)
    out = torch.randn(tokens, HEADS, dim, generator=generator).bfloat16()
    lse = torch.randn(tokens, HEADS, generator=generator) * 4
    empty = torch.rand(tokens, HEADS, generator=generator) < 0.35
    empty[0, 0] = True  # empty on every rank
    return out.masked_fill(empty[..., None], torch.nan), lse.masked_fill(empty, -torch.inf)


def merge_in_fp64(salt: int, tokens: int, dim: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    own = slice(rank * HEADS // SIZE, (rank + 1) * HEADS // SIZE)
    parts = [make_partial(r, salt, tokens, dim) for r in range(SIZE)]
    outs = torch.stack([out[:, own] for out, _ in parts]).double()
    lses = torch.stack([lse[:, own] for _, lse in parts]).double()
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == -torch.inf, 0)).exp()
    return (outs.masked_fill((lses == -torch.inf)[..., None], 0) * weights[..., None]).sum(0), lse


def check(
    result: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    for actual, wanted, tolerance in zip(result, expected, (2e-2, 1e-4), strict=True):
        torch.testing.assert_close(actual.double(), wanted, atol=tolerance, rtol=tolerance)


def use_exchanges(group: SymmetricGroup) -> None:
    group.begin_step()
    for dim in (512, 128, 48):
        for tokens in (1, 3, 64, 513):
            expected = merge_in_fp64(tokens, tokens, dim, group.rank)
            out, lse = make_partial(group.rank, tokens, tokens, dim)
            before = group.received_bytes
            for name, exchange in EXCHANGES.items():
                check(exchange(group).merge(out, lse), expected)
                if name == "p2p":
                    per_peer = tokens * HEADS // SIZE * (dim * 2 + 4)
                    assert group.received_bytes - before == (SIZE - 1) * per_peer
                before = group.received_bytes
    # As much as fits into a buffer, built in place, and more than that.
    for tokens in (BUFFER_BYTES // (HEADS * 512 * 2), BUFFER_BYTES // (HEADS * 512 * 2) + 5):
        out, lse = make_partial(group.rank, 1, tokens, 512)
        placed = group.empty(out.shape, out).copy_(out)
        check(EXCHANGES["p2p"](group).merge(placed, lse), merge_in_fp64(1, tokens, 512, group.rank))


@triton.jit
def spin_kernel(turns, sink):
    x = tl.load(sink)
    for _ in range(tl.load(turns)):
        x = x * 0.5 + 1.0
    tl.store(sink, x)


@pytest.mark.timeout(200)
def test_replays_of_delayed_ranks() -> None:
    """Replay graphs of several shapes in random order, on ranks that are late at random points.

    The results are bit for bit those of eager steps, and close to fp64.
    """
    spawn(replay_delayed)


def replay_delayed(group: SymmetricGroup) -> None:
    shapes = [(1, 512), (5, 512), (16, 128), (96, 128)]
    turns = torch.zeros(8, dtype=torch.int32)
    sink = torch.zeros(1)
    graphs = []
    halves = torch.full((96, 2), 0.5)
    residual = torch.zeros(96, 4096).bfloat16()
    weight = torch.ones(4096).bfloat16()

    def step(out, lse, q, hidden):
        """Two layers of q gather, exchange and all-reduce, each after a delay."""
        group.begin_step()
        results = []
        for layer in range(2):
            spin_kernel[(1,)](turns[4 * layer :], sink)
            results.append(group.all_gather(group.empty(q.shape, q).copy_(q)))
            spin_kernel[(1,)](turns[4 * layer + 1 :], sink)
            partial = group.empty(out.shape, out).copy_(out)
            results += EXCHANGES["p2p"](group).merge(partial, lse)
            spin_kernel[(1,)](turns[4 * layer + 2 :], sink)
            results.append(group.all_reduce(hidden))
            outputs = hidden[:, None].repeat(1, 2, 1), halves[: len(hidden)]
            results += group.all_reduce_and_norm(
                *outputs, residual[: len(hidden)], weight, 0, False
            )
        # An odd number of collectives: only begin_step makes the halves right again.
        group.all_gather(hidden[:, 0])
        return results

    for tokens, dim in shapes:
        out, lse = make_partial(group.rank, 0, tokens, dim)
        inputs = (
            out,
            lse,
            torch.zeros(tokens, 2, 192).bfloat16(),
            torch.zeros(tokens, 4096).bfloat16(),
        )
        step(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(*inputs)
        graphs.append((graph, inputs, results))

    choice = torch.Generator("cpu").manual_seed(0)  # the same on all ranks
    late = torch.Generator("cpu").manual_seed(group.rank)
    for i in range(REPLAYS):
        which = int(torch.randint(len(shapes), (1,), generator=choice, device="cpu"))
        (tokens, dim), (graph, inputs, results) = shapes[which], graphs[which]
        out, lse, q, hidden = inputs
        for old, new in zip((out, lse), make_partial(group.rank, i, tokens, dim), strict=True):
            old.copy_(new)
        q.fill_(i % 251 + group.rank / 8)
        hidden.fill_(i % 31 + group.rank)
        delays = torch.randint(0, 4000, (8,), generator=late, device="cpu")
        delays *= torch.rand(8, generator=late, device="cpu") < 0.3
        turns.copy_(delays)
        graph.replay()
        if i % 10 == 0:
            torch.cuda.synchronize()
            kept = [x.clone() for x in results]
            eager = step(*inputs)
            assert all(torch.equal(a, b) for a, b in zip(kept, eager, strict=True)), f"replay {i}"
            results = kept
        expected = merge_in_fp64(i, tokens, dim, group.rank)
        gathered = (i % 251 + torch.arange(SIZE) / 8).bfloat16()
        summed = SIZE * (i % 31) + sum(range(SIZE))
        for layer in range(2):
            everyone, merged, merged_lse, total, normed, sums = results[6 * layer : 6 * layer + 6]
            check((merged, merged_lse), expected)
            assert torch.equal(everyone, gathered[None, :, None, None].expand_as(everyone)), (
                f"replay {i}"
            )
            assert (total == summed).all(), f"replay {i}"
            assert (sums == summed).all() and (normed == 1).all(), f"replay {i}"
