"""Collectives by mail give the bits of those that meet: eight ranks, which may share one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from test_exchange import HEADS, make_partial, spawn, spin_kernel

from minidcp.kernels.mailbox import ABSENT, PLACE_BYTES
from minidcp.parallel import symmetric
from minidcp.parallel.symmetric import SymmetricGroup

pytestmark = pytest.mark.gpu
REPLAYS = 2000
HIDDEN = 5120
DTYPES = (torch.bfloat16, torch.float32)
TOKENS = (1, 2, 7, 16)


@contextmanager
def mail_up_to(limit: int) -> Iterator[None]:
    """Set how many bytes go by mail: with 0, every collective meets."""
    before = symmetric.MAIL_BYTES
    symmetric.MAIL_BYTES = limit
    yield
    symmetric.MAIL_BYTES = before


def assert_same(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Equal to the bit, but for the kind of NaN."""
    for ours, wanted in zip(actual, expected, strict=True):
        integers = torch.int16 if wanted.element_size() == 2 else torch.int32
        is_nan = wanted.isnan()
        assert torch.equal(ours.isnan(), is_nan)
        zero = torch.zeros((), dtype=wanted.dtype)
        both = [torch.where(is_nan, zero, x).view(integers) for x in (ours, wanted)]
        assert torch.equal(*both)


def check(group: SymmetricGroup, call: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    with mail_up_to(0):
        before = group.num_mails
        expected = call()
        assert group.num_mails == before
    for _ in range(3):  # either region is used, and used again
        with mail_up_to(PLACE_BYTES):
            actual = call()
        assert_same(actual, expected)
    assert group.num_mails == before + 3


def test_mail_gives_the_bits_of_meetings() -> None:
    spawn(gather, reduce_and_norm, merge, use_reserved_memory, leave_nothing)


def list_cases(group: SymmetricGroup) -> Iterator[tuple[int, torch.dtype]]:
    """Numbers of tokens and types, each in a step of its own on ranks with seeds of their own."""
    for tokens in TOKENS:
        for dtype in DTYPES:
            group.begin_step()
            torch.manual_seed(100 * tokens + group.rank)
            # A rank that is late: up to 0.2 ms.
            torch.cuda._sleep(int(torch.randint(400_000, (1,), device="cpu")))
            yield tokens, dtype


def gather(group: SymmetricGroup) -> None:
    for tokens, dtype in list_cases(group):
        x = torch.randn(tokens, 4, 576).to(dtype)
        x[:, 0, :64] = -0.0
        x.view(torch.int32)[:, 1, :7] = ABSENT.value
        check(group, lambda x=x: (group.all_gather(x),))
        check(group, lambda x=x: (group.all_gather(x[:, 1:3, 32:]),))


def reduce_and_norm(group: SymmetricGroup) -> None:
    for tokens, dtype in list_cases(group):
        parts = torch.randn(tokens, 8, HIDDEN).to(dtype)
        parts[-1, 0, :9] = torch.inf
        weights = torch.rand(tokens, 8)
        summand = torch.randn(tokens, HIDDEN).to(dtype)
        summand[0, :64] = -0.0
        torch.manual_seed(tokens)  # what all ranks have
        residual = torch.randn(tokens, HIDDEN).to(dtype)
        norm_weight = torch.rand(HIDDEN).to(dtype)
        for x, scales in ((summand, None), (parts, weights)):
            check(
                group,
                lambda x=x, scales=scales, residual=residual, weight=norm_weight: (
                    group.all_reduce_and_norm(x, scales, residual, weight, 1e-6, False)
                ),
            )


def merge(group: SymmetricGroup) -> None:
    """With shards that are empty and hold NaN, and with LSEs that look absent."""
    for tokens, dtype in list_cases(group):
        for dim in (512, 128, 48):
            out, lse = make_partial(group.rank, tokens, tokens, dim)
            out = out.to(dtype)
            check(group, lambda out=out, lse=lse: group.merge(out, lse))
            check(
                group, lambda out=out, lse=lse: group.merge(out.mT.contiguous().mT, lse.T.clone().T)
            )
            lse.view(torch.int32)[-1, -1] = ABSENT.value  # a NaN: so is what comes of it
            check(group, lambda out=out, lse=lse: group.merge(out, lse))


def use_reserved_memory(group: SymmetricGroup) -> None:
    """Memory from `empty` may go by mail. Another tensor is refused in its place."""
    group.begin_step()
    x = torch.randn(4, 8)
    reserved = group.empty(x.shape, x)
    with pytest.raises(RuntimeError, match=r"memory from Group.empty would be overwritten"):
        group.all_gather(x)
    by_mail = group.all_gather(reserved.copy_(x))
    again = group.empty(x.shape, x).copy_(x)
    with mail_up_to(0):
        assert torch.equal(group.all_gather(again), by_mail)
    assert torch.equal(by_mail[:, group.rank], x)
    assert group.num_mails == 1 and group.num_calls == 1


def leave_nothing(group: SymmetricGroup) -> None:
    """After a barrier nothing is left in the inboxes."""
    group.begin_step()
    assert (group.inbox == ABSENT.value).all()
    group.begin_step()


@pytest.mark.timeout(280)
def test_replays_of_changing_sizes() -> None:
    """Graphs of mail and meetings, in random order on late ranks, give the bits of meetings."""
    spawn(replay, leave_nothing)


def replay(group: SymmetricGroup) -> None:
    torch.manual_seed(group.rank)
    turns = torch.zeros(6, dtype=torch.int32)
    sink = torch.zeros(1)
    weight = torch.rand(HIDDEN, generator=torch.Generator("cuda").manual_seed(0)).bfloat16()

    def step(
        q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, parts: torch.Tensor
    ) -> list[torch.Tensor]:
        """Two layers, each collective after a delay, and then another gather."""
        group.begin_step()
        residual = torch.zeros_like(parts[:, 0])
        scales = torch.full(parts.shape[:2], 0.5)
        results = []
        for layer in range(2):
            spin_kernel[(1,)](turns[3 * layer :], sink)
            results.append(group.all_gather(group.empty(q.shape, q).copy_(q)))
            spin_kernel[(1,)](turns[3 * layer + 1 :], sink)
            results += group.merge(group.empty(out.shape, out).copy_(out), lse)
            results.append(group.all_reduce(parts[:, layer].contiguous()))
            spin_kernel[(1,)](turns[3 * layer + 2 :], sink)
            x, x_scales = (parts, scales) if layer == 0 else (parts[:, 1].contiguous(), None)
            normed, residual = group.all_reduce_and_norm(x, x_scales, residual, weight, 1e-6, False)
            results += [normed, residual]
        # An odd number of calls by mail: only begin_step makes the regions right again.
        results.append(group.all_gather(q))
        return results

    graphs = []
    for tokens in (1, 2, 7, 16, 40):
        inputs = (
            torch.zeros(tokens, 4, 192).bfloat16(),
            torch.zeros(tokens, HEADS, 128).bfloat16(),
            torch.zeros(tokens, HEADS),
            torch.zeros(tokens, 3, HIDDEN).bfloat16(),
        )
        graph = torch.cuda.CUDAGraph()
        with mail_up_to(128 << 10):  # of 40 tokens only a part goes by mail then
            step(*inputs)
            assert group.num_mails % 2 == 1
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                results = step(*inputs)
        graphs.append((graph, inputs, results))

    choice = torch.Generator("cpu").manual_seed(0)  # the same on all ranks
    late = torch.Generator("cpu").manual_seed(group.rank)
    for i in range(REPLAYS):
        which = int(torch.randint(len(graphs), (1,), generator=choice, device="cpu"))
        graph, inputs, results = graphs[which]
        for x in inputs:
            x.normal_()
        inputs[2][inputs[2] < -1] = -torch.inf  # empty shards
        delays = torch.randint(0, 4000, (6,), generator=late, device="cpu")
        delays *= torch.rand(6, generator=late, device="cpu") < 0.3
        turns.copy_(delays)
        graph.replay()
        if i % 3 == 0:
            graph.replay()
        turns.zero_()
        with mail_up_to(0):
            expected = step(*inputs)
        same = [torch.equal(ours, wanted) for ours, wanted in zip(results, expected, strict=True)]
        assert all(same), f"replay {i} of graph {which}: {same}"
