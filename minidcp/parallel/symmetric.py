"""Collectives over symmetric memory: every rank reads its peers' buffers itself, over NVLink.

The buffers are allocated once, with the same layout on every rank, so CUDA graphs can hold their
addresses. The contract is in `group.py`, the kernels are in `kernels/peer.py`.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from minidcp.kernels.peer import device_pointers, read_peers, sum_peers

BUFFER_BYTES = 64 << 20  # one half; larger tensors go in pieces
ONE_SHOT_BYTES = 512 << 10  # above it an all-reduce reads every value twice instead of N times


class SymmetricGroup:
    """Ranks whose GPUs can read each other's memory (several may share one GPU, for tests).

    A collective stages its input in the rank's own buffer, waits for the others, and reads theirs. Two
    halves are used in turn, so one barrier per collective is enough: a rank that stages for collective
    n + 2 has passed the barrier of n + 1, which all reach only after they have read what n staged.
    A CUDA graph repeats the halves it was captured with, so every step begins with `begin_step`.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.buffer = symm_mem.empty(2 * BUFFER_BYTES, dtype=torch.uint8, device=device)
        self.handle = symm_mem.rendezvous(self.buffer, group)
        self.pointers = [
            device_pointers([address + half * BUFFER_BYTES for address in self.handle.buffer_ptrs], device)
            for half in (0, 1)
        ]
        self.count = 0

    def begin_step(self) -> None:
        """Wait until all ranks have read all that earlier steps staged, and start with the first half."""
        self.handle.barrier(channel=0)
        self.count = 0

    def stage(self, x: Tensor) -> Tensor:
        """Put flat x where the peers can read it; their buffers' addresses once all have done so."""
        half = self.count % 2
        self.count += 1
        own = self.buffer[half * BUFFER_BYTES :][: x.nbytes].view(x.dtype)
        own.copy_(x)
        self.handle.barrier(channel=0)
        return self.pointers[half]

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.nbytes > ONE_SHOT_BYTES:
            flat = x.flatten()
            padded = torch.nn.functional.pad(flat, (0, -flat.numel() % self.size))
            parts = self.all_gather(self.reduce_scatter(padded.view(self.size, -1)))
            return parts.flatten()[: flat.numel()].view(x.shape)
        out = x.new_empty(x.shape)
        sum_peers(self.stage(x.flatten()), 0, x.numel(), out)
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        flat = x.flatten()
        pieces = []
        for piece in flat.split(BUFFER_BYTES // x.element_size()):
            out = x.new_empty(self.size, piece.numel())
            read_peers(self.stage(piece), 0, piece.numel(), out)
            pieces.append(out)
        return join(pieces).view(self.size, *x.shape)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        rows = x.reshape(self.size, -1)
        pieces = []
        for piece in rows.split(BUFFER_BYTES // x.element_size() // self.size, 1):
            width = piece.shape[1]
            out = x.new_empty(width)
            sum_peers(self.stage(piece.flatten()), self.rank * width, width, out)
            pieces.append(out)
        return join(pieces).view(x.shape[1:])

    def all_to_all(self, x: Tensor) -> Tensor:
        rows = x.reshape(self.size, -1)
        pieces = []
        for piece in rows.split(BUFFER_BYTES // x.element_size() // self.size, 1):
            width = piece.shape[1]
            out = x.new_empty(self.size, width)
            read_peers(self.stage(piece.flatten()), self.rank * width, width, out)
            pieces.append(out)
        return join(pieces).view(x.shape)

    def broadcast(self, x: Tensor) -> Tensor:
        assert x.nbytes <= BUFFER_BYTES
        out = x.new_empty(x.shape)
        read_peers(self.stage(x.flatten())[:1], 0, math.prod(x.shape), out)
        return out


def join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
