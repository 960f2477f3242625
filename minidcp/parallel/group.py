"""Collectives between ranks: one contract, and its implementations for processes and for threads.

All of them put the ranks in a leading dim, so no call needs a dim argument. Which ranks form which
group is `state.py`'s; what is exchanged, `exchange.py`'s.
"""

from __future__ import annotations

import threading
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Group(Protocol):
    """`size` ranks that call the same collectives in the same order. Results are equal on all ranks,
    bit for bit, where the contract says they are the same tensor. Inputs are never changed."""

    rank: int
    size: int

    def begin_step(self) -> None:
        """To be called by every rank before a step's (and a CUDA graph's) first collective."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks of x [...]."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, ...]: every rank's x [...]."""

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """[...]: the sum over the ranks of their x[rank], from x [size, ...]."""

    def all_to_all(self, x: Tensor) -> Tensor:
        """[size, ...]: entry i is what rank i had at x[rank], from x [size, ...]."""

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x [...]; the others pass a tensor of the same shape and dtype."""


class SingleGroup:
    """The group of one rank: nothing moves."""

    rank, size = 0, 1

    def begin_step(self) -> None:
        pass

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x[0]

    def all_to_all(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        return x


class TorchGroup:
    """A torch.distributed process group: NCCL on GPUs, Gloo on CPUs."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.size = group.size()
        self.root = dist.get_global_rank(group, 0)

    def begin_step(self) -> None:
        pass

    def all_reduce(self, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=self.group)
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.size, *x.shape)
        all_gather_into(out.view(-1), x.reshape(-1), group=self.group)  # Gloo wants equal dims
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out = x.new_empty(x.shape[1:])
        reduce_scatter_into(out.view(-1), x.reshape(-1), group=self.group)
        return out

    def all_to_all(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=self.group)
        return out

    def broadcast(self, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(out, src=self.root, group=self.group)
        return out


# torch 2.13 renames these two and deprecates the old names; 2.11 has only the old ones.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Rendezvous:
    """What the threads of one ThreadGroup share: a barrier, and a place for each rank's tensor."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        # Two sets of places, used in turn. A rank can be at most one collective ahead of the slowest:
        # it passes barrier n + 1 only after all have read what barrier n published, so when it writes
        # for n + 2 nobody reads the places of n any more. Hence one barrier per collective is enough.
        self.places: list[list[Tensor | None]] = [[None] * size, [None] * size]


class ThreadGroup:
    """Ranks are threads of one process: for the CPU, where eight ranks then start in a moment."""

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        self.rendezvous = rendezvous
        self.rank = rank
        self.size = rendezvous.barrier.parties
        self.count = 0

    def publish(self, x: Tensor) -> list[Tensor]:
        """Every rank's x. A copy is published: its owner may go on and overwrite x before all have read."""
        places = self.rendezvous.places[self.count % 2]
        self.count += 1
        places[self.rank] = x.clone()
        try:
            self.rendezvous.barrier.wait()
        except threading.BrokenBarrierError:
            raise RuntimeError("another rank of this engine failed") from None
        return [place for place in places if place is not None]

    def begin_step(self) -> None:
        pass

    def all_reduce(self, x: Tensor) -> Tensor:
        # Summed by every rank in the same order, hence the same bits everywhere.
        return torch.stack(self.publish(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self.publish(x))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return torch.stack([part[self.rank] for part in self.publish(x)]).sum(0)

    def all_to_all(self, x: Tensor) -> Tensor:
        return torch.stack([part[self.rank] for part in self.publish(x)])

    def broadcast(self, x: Tensor) -> Tensor:
        return self.publish(x)[0].clone()
