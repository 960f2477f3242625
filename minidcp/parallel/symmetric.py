"""Collectives over symmetric memory: each rank reads its peers' buffers over NVLink, or for small
tensors writes into their inboxes. Both are allocated once, alike on every rank, so CUDA graphs can
hold their addresses. The contract is in `group.py`, the kernels are in `kernels/peer.py` and
`kernels/mailbox.py`. Next: `attention/base.py`."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from minidcp.batch import OutAndLse
from minidcp.kernels.experts import ExpertOutputs
from minidcp.kernels.fp8 import Activations
from minidcp.kernels.mailbox import ABSENT, PLACE_BYTES, Mailbox, gather_mail, merge_mail, norm_mail
from minidcp.kernels.meeting import MAX_PROGRAMS, Meeting
from minidcp.kernels.peer import merge_peers, read_peers, sum_peers
from minidcp.kernels.peer_norm import norm_peers, norm_shared_rows
from minidcp.parallel.group import Group

# Of one half of the buffer; larger tensors are copied there in pieces. The activations of 8,192
# tokens of DeepSeek-V3 fit, which have 7,168 values in bf16.
BUFFER_BYTES = 112 << 20
# Behind it in each half is room for the LSEs of partial outputs, 4 bytes for each head. That is
# enough if a head's output takes 64 bytes or more.
LSE_BYTES = BUFFER_BYTES // 16
HALF_BYTES = BUFFER_BYTES + LSE_BYTES
# A larger all-reduce is a reduce-scatter and an all-gather: it reads each value twice, not N times.
# If a norm follows, it is between the two.
ONE_SHOT_BYTES = 512 << 10

# Up to so many bytes from one rank to another go by mail. That is one trip instead of two, but the
# data is written to memory once more. Of what fits into an inbox, mail was always faster, with two
# ranks (`benchmarks/NOTES.md`).
MAIL_BYTES = PLACE_BYTES


class SymmetricGroup(Group):
    """Ranks whose GPUs can read each other's memory. Several may share one GPU, for tests.

    A collective has its input in this rank's buffer. Either it was built there, in memory from
    `empty`, or it is copied there. Then one kernel waits for the peers and reads their buffers.

    The buffer has two halves, which are used in turn, so that one meeting per collective is
    enough: a rank that writes for collective n + 2 has met all peers in collective n + 1, and they
    came there only after their kernels of collective n had read what the half held. A CUDA graph
    repeats the halves that it was captured with, so each step begins with `begin_step`.

    Small tensors go by mail instead (`kernels/mailbox.py`): each rank writes what a peer needs into
    the peer's inbox, and the peer clears what it has read. An inbox has two regions, which the
    calls by mail use in turn. Two are enough: a rank that writes for call n + 2 has got every
    peer's mail of call n + 1, and that was sent after the peer's kernel of call n had ended, which
    left its region clear. This needs nothing of the meetings in between. So each kind of call takes
    turns by itself, and which kind a call is must depend only on what is the same on all ranks.
    `begin_step` is a barrier behind all earlier calls: then either kind starts anew.

    At most `max_programs` programs of a kernel wait at the same time. Where ranks share a GPU,
    they must leave room for the programs that they wait for.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, max_programs: int) -> None:
        self.rank = group.rank()
        self.size = group.size()
        self.num_calls = 0
        self.num_mails = 0
        self.is_reserved = False  # `empty` has handed out the half of the next collective

        self.buffer = symm_mem.empty(2 * HALF_BYTES, dtype=torch.uint8, device=device)
        self.handle = symm_mem.rendezvous(self.buffer, group)
        addresses = torch.tensor(self.handle.buffer_ptrs, dtype=torch.int64, device=device)
        self.half_addresses = [addresses, addresses + HALF_BYTES]  # by half: of every rank's

        self.meeting = self.make_meeting(group, device, max_programs)
        self.mailbox = self.make_mailbox(group, device, self.meeting.programs)
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody meets or sends before all pads are zero and all inboxes clear

    def make_meeting(
        self, group: dist.ProcessGroup, device: torch.device, max_programs: int
    ) -> Meeting:
        """Pads and counters, and a number of programs that all ranks agree on."""
        limit = MAX_PROGRAMS.value
        # The ranks' GPUs may differ: take the smallest.
        num_programs = torch.tensor(min(max_programs, limit), device="cpu")
        dist.all_reduce(num_programs, dist.ReduceOp.MIN, group)

        self.pads = symm_mem.empty(self.size * limit, dtype=torch.int32, device=device).zero_()
        pad_addresses = symm_mem.rendezvous(self.pads, group).buffer_ptrs
        return Meeting(
            rank=self.rank,
            pads=torch.tensor(pad_addresses, dtype=torch.int64, device=device),
            epochs=torch.zeros(limit, dtype=torch.int32, device=device),
            programs=int(num_programs),
        )

    def make_mailbox(
        self, group: dist.ProcessGroup, device: torch.device, programs: int
    ) -> Mailbox:
        """Inboxes in which nothing has come yet."""
        region_bytes = self.size * PLACE_BYTES
        self.inbox = symm_mem.empty(2 * region_bytes // 4, dtype=torch.int32, device=device)
        self.inbox.fill_(ABSENT.value)
        pointers = symm_mem.rendezvous(self.inbox, group).buffer_ptrs
        addresses = torch.tensor(pointers, dtype=torch.int64, device=device)
        return Mailbox(self.rank, (addresses, addresses + region_bytes), programs)

    def begin_step(self) -> None:
        """Wait until all ranks have read what earlier steps staged or sent; start with the first
        half, and the first region."""
        self.handle.barrier(channel=0)
        self.num_calls = 0
        self.num_mails = 0
        self.is_reserved = False

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        nbytes = math.prod(shape) * like.element_size()
        if nbytes > BUFFER_BYTES:
            return super().empty(shape, like)
        if self.is_reserved:
            raise RuntimeError("memory from Group.empty is still waiting for its collective")
        self.is_reserved = True
        return self.place(shape, like)

    def own_half(self) -> Tensor:
        """This rank's half of the buffer for the next collective: [HALF_BYTES] uint8."""
        return self.buffer[self.num_calls % 2 * HALF_BYTES :][:HALF_BYTES]

    def is_staged(self, x: Tensor) -> bool:
        """Whether x is where the peers look for it. Raises RuntimeError if another tensor is, that
        is still waiting for its collective."""
        is_in_place = x.data_ptr() == self.own_half().data_ptr() and x.is_contiguous()
        if self.is_reserved and not is_in_place:
            raise RuntimeError(
                "memory from Group.empty would be overwritten: another tensor came to the next "
                "collective"
            )
        return is_in_place

    def place(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Where the peers look for a tensor of the next collective."""
        nbytes = math.prod(shape) * like.element_size()
        return self.own_half()[:nbytes].view(like.dtype).view(shape)

    def end_turn(self) -> Tensor:
        """The next collective takes the other half. Returns where the peers find this one."""
        addresses = self.half_addresses[self.num_calls % 2]
        self.num_calls += 1
        self.is_reserved = False
        return addresses

    def stage(self, x: Tensor) -> Tensor:
        """See to it that x is where the peers look for it. Returns the addresses of all buffers."""
        if not self.is_staged(x):
            self.place(tuple(x.shape), x).copy_(x)
        return self.end_turn()

    def stage_pieces(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Stage runs of x's rows that fit into a half, one after the other.

        Gives each run's rows and the addresses of all ranks' buffers. The caller launches the
        kernel that reads them before it asks for the next run.
        """
        rows_per_piece = BUFFER_BYTES // x[0].nbytes
        for start in range(0, len(x), rows_per_piece):
            piece = slice(start, start + rows_per_piece)
            yield piece, self.stage(x[piece])

    def goes_by_mail(self, x: Tensor, width: int, nbytes: int) -> bool:
        """Whether rows of x, of `width` values, are fit for the inboxes.

        `nbytes` is what a rank sends to each peer. Rows must be whole words of floats, because a
        word that looks absent is sent as another NaN.
        """
        consists_of_words = x.dtype == torch.float32 or (
            x.dtype in (torch.bfloat16, torch.float16) and width % 2 == 0
        )
        return consists_of_words and 0 < nbytes <= MAIL_BYTES

    def open_region(self, x: Tensor) -> Tensor:
        """Begin a call by mail, which reads x wherever it is. Returns where the region is.

        If x is memory from `empty`, that is free again. No peer reads it, so the half stays the one
        for the next meeting.
        """
        self.is_staged(x)  # raises if x came in place of what is reserved
        self.is_reserved = False
        inboxes = self.mailbox.regions[self.num_mails % 2]
        self.num_mails += 1
        return inboxes

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.nbytes > ONE_SHOT_BYTES and x.shape[1] % self.size == 0:
            part = self.reduce_scatter(x.reshape(len(x), self.size, -1))
            return self.all_gather(part).view(x.shape)

        out = x.new_empty(x.shape)
        width = x.shape[1]
        for piece, addresses in self.stage_pieces(x):
            sum_peers(self.meeting, addresses, width, 0, out[piece])
        self.count_received(x, self.size - 1)
        return out

    def all_reduce_and_norm(
        self,
        x: Tensor,
        scales: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        quantizes: bool,
    ) -> tuple[Activations, Tensor]:
        shape = (len(x), residual.shape[1])
        summand_bytes = math.prod(shape) * x.element_size()
        if summand_bytes > BUFFER_BYTES:
            return super().all_reduce_and_norm(x, scales, residual, weight, eps, quantizes)
        if summand_bytes > ONE_SHOT_BYTES:
            if scales is not None:
                x = ExpertOutputs(x, scales).sum(self.empty(shape, x))
            return self.all_reduce_and_norm_runs(x, residual, weight, eps, quantizes)

        if self.goes_by_mail(x, residual.shape[1], residual.nbytes):
            inboxes = self.open_region(x)
            self.count_received(residual, self.size - 1)
            return norm_mail(self.mailbox, inboxes, x, scales, residual, weight, eps, quantizes)
        is_staged = self.is_staged(x)
        place = None if is_staged else self.place(tuple(residual.shape), x)
        addresses = self.end_turn()
        self.count_received(residual, self.size - 1)
        return norm_peers(
            self.meeting, addresses, x, scales, place, residual, weight, eps, quantizes
        )

    def all_reduce_and_norm_runs(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, quantizes: bool
    ) -> tuple[Activations, Tensor]:
        """Each rank norms a run of x's rows, of which it keeps the residual.

        The normed rows go through the other half: its last readers are done when all ranks have
        met. So this counts as two collectives.
        """
        rows_per_rank = -(-len(x) // self.size)
        if len(residual) == len(x):  # all ranks have all of it: the step has just begun
            residual = residual[self.rank * rows_per_rank :][:rows_per_rank]
        addresses = self.stage(x)
        staged = self.place((rows_per_rank, x.shape[1]), x)
        normed_addresses = self.end_turn()
        normed, total = norm_shared_rows(
            self.meeting, addresses, normed_addresses, staged, residual, len(x), weight, eps,
            quantizes,
        )  # fmt: skip
        self.count_received(total, self.size - 1)
        self.count_received(x[len(total) :], 1)
        return normed, total

    def all_gather(self, x: Tensor) -> Tensor:
        width = math.prod(x.shape[1:])
        if self.goes_by_mail(x, width, x.nbytes):
            out = x.new_empty(len(x), self.size, *x.shape[1:])
            inboxes = self.open_region(x)
            gather_mail(self.mailbox, inboxes, x.reshape(len(x), width).contiguous(), out)
            self.count_received(x, self.size - 1)
            return out
        return self.read_columns(x, width, 0).view(len(x), self.size, *x.shape[1:])

    def all_to_all(self, x: Tensor) -> Tensor:
        width = math.prod(x.shape[2:])
        return self.read_columns(x, width, self.rank * width).view(x.shape)

    def read_columns(self, x: Tensor, width: int, offset: int) -> Tensor:
        """Elements [offset, offset + width) of every rank's rows of x [T, ...]: [T, N, width]."""
        out = x.new_empty(len(x), self.size, width)
        stride = x[0].numel()
        for piece, addresses in self.stage_pieces(x):
            read_peers(self.meeting, addresses, stride, offset, out[piece])
        self.count_received(out[:, 0], self.size - 1)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        width = math.prod(x.shape[2:])
        out = x.new_empty(len(x), width)
        for piece, addresses in self.stage_pieces(x):
            sum_peers(self.meeting, addresses, self.size * width, self.rank * width, out[piece])
        self.count_received(out, self.size - 1)
        return out.view(len(x), *x.shape[2:])

    def merge(self, out: Tensor, lse: Tensor) -> OutAndLse:
        """The p2p exchange in one kernel; `parallel/exchange.py` has its contract.

        Where it meets, the kernel itself puts the LSEs behind the outputs, because attention
        back-ends write them where they like.
        """
        tokens, all_heads, dim = out.shape
        own_heads = all_heads // self.size
        merged = out.new_empty(tokens, own_heads, dim)
        merged_lse = lse.new_empty(tokens, own_heads)
        self.count_received(merged, self.size - 1)
        self.count_received(merged_lse, self.size - 1)
        sent_bytes = merged.nbytes + merged_lse.nbytes
        if self.goes_by_mail(out, dim, sent_bytes):
            inboxes = self.open_region(out)
            merge_mail(self.mailbox, inboxes, out.contiguous(), lse, merged, merged_lse)
            return merged, merged_lse

        for piece, addresses in self.stage_pieces(out):
            lse_piece = lse[piece]
            half_start = (self.num_calls - 1) % 2 * HALF_BYTES  # the half that was just staged
            lse_memory = self.buffer[half_start + BUFFER_BYTES :][: lse_piece.nbytes]
            staged_lse = lse_memory.view(torch.float32).view(lse_piece.shape)
            merge_peers(
                self.meeting,
                addresses,
                BUFFER_BYTES,
                staged_lse,
                lse_piece,
                merged[piece],
                merged_lse[piece],
            )
        return merged, merged_lse
