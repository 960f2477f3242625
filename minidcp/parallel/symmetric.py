"""Collectives over symmetric memory: every rank reads its peers' buffers itself, over NVLink. They are
allocated once, alike on every rank, so CUDA graphs can hold their addresses. See `group.py` and `kernels/peer.py`."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from minidcp.kernels.peer import MAX_PROGRAMS, Meeting, merge_peers, read_peers, sum_peers
from minidcp.parallel.group import Group

BUFFER_BYTES = 64 << 20  # of one half; larger tensors go in pieces
LSE_BYTES = BUFFER_BYTES // 16  # behind it, for the LSEs of partial outputs with 64 bytes or more per head
HALF_BYTES = BUFFER_BYTES + LSE_BYTES
ONE_SHOT_BYTES = 512 << 10  # above it an all-reduce reads every value twice instead of N times


class SymmetricGroup(Group):
    """Ranks whose GPUs can read each other's memory (several may share one GPU, for tests). A collective has its input
    in this rank's buffer, put there by `empty`'s user or else by a copy, and one kernel that waits for the peers and
    reads theirs. Two halves are used in turn, so that one meeting per collective is enough: a rank that writes for
    collective n + 2 has met all peers in n + 1, and they came there only after their kernels of n had read what n's
    half held. A CUDA graph repeats the halves it was captured with: a step begins with `begin_step`. At most `programs`
    of a kernel wait at once: where ranks share a GPU they leave room for whatever they wait for."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, programs: int) -> None:
        self.rank, self.size, self.calls = group.rank(), group.size(), 0
        self.buffer = symm_mem.empty(2 * HALF_BYTES, dtype=torch.uint8, device=device)
        self.handle = symm_mem.rendezvous(self.buffer, group)
        buffers = torch.tensor(self.handle.buffer_ptrs, dtype=torch.int64, device=device)
        self.halves = [buffers, buffers + HALF_BYTES]
        most = MAX_PROGRAMS.value
        least = torch.tensor(min(programs, most), device="cpu")  # GPUs may differ
        dist.all_reduce(least, dist.ReduceOp.MIN, group)
        self.pads = symm_mem.empty(self.size * most, dtype=torch.int32, device=device).zero_()
        pads = torch.tensor(symm_mem.rendezvous(self.pads, group).buffer_ptrs, dtype=torch.int64, device=device)
        self.meeting = Meeting(self.rank, pads, torch.zeros(most, dtype=torch.int32, device=device), int(least))
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody comes to a meeting before all pads are zero

    def begin_step(self) -> None:
        """Wait until all ranks have read all that earlier steps staged, and start with the first half."""
        self.handle.barrier(channel=0)
        self.calls = 0

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        nbytes = math.prod(shape) * like.element_size()
        if nbytes > BUFFER_BYTES:
            return super().empty(shape, like)
        return self.own_half()[:nbytes].view(like.dtype).view(shape)

    def own_half(self) -> Tensor:
        return self.buffer[self.calls % 2 * HALF_BYTES :][:HALF_BYTES]

    def stage(self, x: Tensor) -> Tensor:
        """See that x is where the peers look for it; the addresses of their buffers."""
        half = self.own_half()
        if x.data_ptr() != half.data_ptr() or not x.is_contiguous():
            half[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        self.calls += 1
        return self.halves[(self.calls - 1) % 2]

    def stage_pieces(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Runs of x's rows that fit into a half, and where they then are."""
        rows = BUFFER_BYTES // x[0].nbytes
        for first in range(0, len(x), rows):
            piece = slice(first, first + rows)
            yield piece, self.stage(x[piece])

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.nbytes > ONE_SHOT_BYTES and x.shape[1] % self.size == 0:
            part = self.reduce_scatter(x.reshape(len(x), self.size, -1))
            return self.all_gather(part).view(x.shape)
        out = x.new_empty(x.shape)
        for piece, pointers in self.stage_pieces(x):
            sum_peers(self.meeting, pointers, x.shape[1], 0, out[piece])
        self.count(x, self.size - 1)
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        return self.read(x, math.prod(x.shape[1:]), 0).view(len(x), self.size, *x.shape[1:])

    def all_to_all(self, x: Tensor) -> Tensor:
        width = math.prod(x.shape[2:])
        return self.read(x, width, self.rank * width).view(x.shape)

    def read(self, x: Tensor, width: int, offset: int) -> Tensor:
        """[T, N, width]: elements [offset, offset + width) of every rank's rows of x [T, ...]."""
        out = x.new_empty(len(x), self.size, width)
        for piece, pointers in self.stage_pieces(x):
            read_peers(self.meeting, pointers, x[0].numel(), offset, out[piece])
        self.count(out[:, 0], self.size - 1)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        width = math.prod(x.shape[2:])
        out = x.new_empty(len(x), width)
        for piece, pointers in self.stage_pieces(x):
            sum_peers(self.meeting, pointers, self.size * width, self.rank * width, out[piece])
        self.count(out, self.size - 1)
        return out.view(len(x), *x.shape[2:])

    def merge(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """The exchange in one kernel: from this rank's partial attention for the heads of all ranks (out [T, N * H, D]
        and lse [T, N * H]) to that over all shards for its own ([T, H, D], [T, H])."""
        tokens, heads, dim = out.shape
        own = heads // self.size
        merged, merged_lse = out.new_empty(tokens, own, dim), lse.new_empty(tokens, own)
        for piece, pointers in self.stage_pieces(out):
            rows = lse[piece]
            begin = (self.calls - 1) % 2 * HALF_BYTES + BUFFER_BYTES
            staged = self.buffer[begin:][: rows.nbytes].view(torch.float32).view(rows.shape)
            merge_peers(self.meeting, pointers, BUFFER_BYTES, staged, rows, merged[piece], merged_lse[piece])
        self.count(merged, self.size - 1)
        self.count(merged_lse, self.size - 1)
        return merged, merged_lse
