"""Mail between ranks in Triton's interpreter: processes, with inboxes in shared memory."""

from __future__ import annotations

import random
import time

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from minidcp.kernels import mailbox
from minidcp.kernels.mailbox import (
    ABSENT,
    PLACE_BYTES,
    Mailbox,
    gather_mail,
    merge_mail,
    norm_mail,
)

HEADS, DIM, WIDTH = 2, 32, 48
ROUNDS = 4
SIZE = 3
PROGRAMS = 2  # fewer than tiles: a program has several


class Rank:
    """One rank of a group, which sleeps at random."""

    def __init__(self, rank: int, inboxes: torch.Tensor) -> None:
        self.rank = rank
        self.size = len(inboxes)
        addresses = torch.tensor([inbox.data_ptr() for inbox in inboxes])
        region_bytes = inboxes[0, 0].nbytes
        self.mailbox = Mailbox(rank, (addresses, addresses + region_bytes), PROGRAMS)
        self.num_calls = 0
        self.delays = random.Random(rank)

    def next_region(self) -> torch.Tensor:
        if self.delays.random() < 0.3:
            time.sleep(0.05 * self.delays.random())
        self.num_calls += 1
        return self.mailbox.regions[(self.num_calls - 1) % 2]

    def gather(self, xs: list[torch.Tensor]) -> None:
        """The bits of each rank's x arrive, except that a NaN that looks absent is another NaN."""
        for x in xs:
            x[0, :2] = -0.0
            x.view(torch.int32)[-1, 2] = ABSENT.value
        out = xs[0].new_empty(len(xs[0]), self.size, WIDTH)
        gather_mail(self.mailbox, self.next_region(), xs[self.rank], out)
        torch.testing.assert_close(out, torch.stack(xs, 1), atol=0, rtol=0, equal_nan=True)
        assert out[0, :, :2].signbit().all()

    def reduce_and_norm(
        self, xs: list[torch.Tensor], scales: list[torch.Tensor], tolerance: dict[str, float]
    ) -> None:
        residual = xs[0][:, 0].clone()
        weight = torch.ones(WIDTH, dtype=residual.dtype)
        expected = residual.float()
        for x, scale in zip(xs, scales, strict=True):
            expected = expected + (x.float() * scale[..., None]).sum(1)
        own = xs[self.rank], scales[self.rank]
        normed, total = norm_mail(
            self.mailbox, self.next_region(), *own, residual, weight, 1e-6, False
        )
        torch.testing.assert_close(total.float(), expected, **tolerance)
        torch.testing.assert_close(
            normed.float(), F.rms_norm(expected, (WIDTH,), eps=1e-6), **tolerance
        )

    def merge(
        self, outs: list[torch.Tensor], lses: list[torch.Tensor], tolerance: dict[str, float]
    ) -> None:
        """Where a shard is empty its output is NaN."""
        for out, lse in zip(outs, lses, strict=True):
            is_empty = lse < -2
            is_empty[0, ::HEADS] = True  # on every rank
            out[is_empty] = torch.nan
            lse[is_empty] = -torch.inf
        tokens = len(outs[0])
        merged = outs[0].new_empty(tokens, HEADS, DIM)
        merged_lse = torch.empty(tokens, HEADS)
        own = outs[self.rank], lses[self.rank]
        merge_mail(self.mailbox, self.next_region(), *own, merged, merged_lse)

        heads = slice(self.rank * HEADS, (self.rank + 1) * HEADS)
        all_lses = torch.stack(lses)[:, :, heads]
        parts = torch.stack(outs)[:, :, heads].float()
        parts = parts.masked_fill((all_lses == -torch.inf)[..., None], 0)
        weights = torch.where(all_lses == -torch.inf, 0, all_lses.softmax(0))
        torch.testing.assert_close(merged_lse, all_lses.logsumexp(0), atol=1e-5, rtol=1e-5)
        expected = (parts * weights[..., None]).sum(0)
        torch.testing.assert_close(merged.float(), expected, **tolerance)


def run_rank(rank: int, inboxes: torch.Tensor) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # every rank knows what all of them send
    group = Rank(rank, inboxes)

    # A rank may also be late to clear what it has found: with one region its peers would be ahead.
    def be_late(*arguments: object) -> None:
        time.sleep(0.2 * (group.delays.random() < 0.2))

    mailbox.end_waiting = be_late

    def make(dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
        return [torch.randn(shape).to(dtype) for _ in range(group.size)]

    for i in range(ROUNDS):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        tokens = (1, 3, 24)[i * 2 % 3]
        # The interpreter rounds to bf16 by truncation.
        close = 1e-5 if dtype == torch.float32 else 4 * 2**-7
        tolerance = {"atol": close, "rtol": close}
        group.gather(make(dtype, tokens, WIDTH))
        scales = make(torch.float32, 3, 2)
        group.reduce_and_norm(make(dtype, 3, 2, WIDTH), scales, tolerance)
        outs = make(dtype, tokens, group.size * HEADS, DIM)
        lses = make(torch.float32, tokens, group.size * HEADS)
        group.merge(outs, [4 * lse for lse in lses], tolerance)


def test_mail() -> None:
    """Calls of changing sizes on ranks that are late at random. All that is sent is cleared."""
    region_words = SIZE * PLACE_BYTES // 4
    inboxes = torch.full((SIZE, 2, region_words), ABSENT.value, dtype=torch.int32)
    inboxes.share_memory_()
    mp.spawn(run_rank, (inboxes,), nprocs=SIZE)
    assert (inboxes == ABSENT.value).all()
