"""Collectives between ranks: one contract, and its implementations for processes and for threads. Where a collective
takes or gives something of every rank, the ranks are in dim 1, behind the tokens, as the heads of a model are. Which
ranks form which group is `state.py`'s; what is exchanged, `exchange.py`'s."""

import threading

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """`size` ranks that call the same collectives in the same order. Results are equal on all ranks, bit for bit, where
    the contract says they are the same tensor. Inputs are never changed. This class is the group of one rank."""

    rank, size = 0, 1
    received_bytes = 0  # from other ranks, since the start

    def begin_step(self) -> None:
        """To be called by every rank before a step's (and a CUDA graph's) first collective."""

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory of like's kind for the very next collective's input, which may then lie where it must, uncopied."""
        return like.new_empty(shape)

    def count(self, x: Tensor, peers: float = 1) -> None:
        """Note that as many bytes as x has came from each of so many other ranks."""
        self.received_bytes += round(x.nbytes * peers)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks of x [T, D]."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[T, size, ...]: every rank's x [T, ...]; any strides."""
        return x[:, None]

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """[T, ...]: the sum over the ranks of their x[:, rank], from x [T, size, ...]."""
        return x[:, 0]

    def all_to_all(self, x: Tensor) -> Tensor:
        """[T, size, ...]: entry [:, i] is rank i's x[:, rank], from x [T, size, ...]; any strides."""
        return x


class TorchGroup(Group):
    """A torch.distributed process group: NCCL on GPUs, Gloo on CPUs. It has the ranks first, hence the transposing."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def all_reduce(self, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=self.group)
        self.count(x, 2 * (self.size - 1) / self.size)  # at least, by any algorithm
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.size, *x.shape)
        all_gather_into(out.view(-1), x.reshape(-1), group=self.group)  # Gloo wants equal dims
        self.count(x, self.size - 1)
        return out.transpose(0, 1)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x), *x.shape[2:])
        reduce_scatter_into(out.view(-1), x.transpose(0, 1).reshape(-1), group=self.group)
        self.count(out, self.size - 1)
        return out

    def all_to_all(self, x: Tensor) -> Tensor:
        by_rank = x.transpose(0, 1).contiguous()
        out = torch.empty_like(by_rank)
        dist.all_to_all_single(out, by_rank, group=self.group)
        self.count(out[0], self.size - 1)
        return out.transpose(0, 1)


# torch 2.13 renames these two and deprecates the old names; 2.11 has only the old ones.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ThreadGroup(Group):
    """Ranks are threads of one process: for the CPU, where eight ranks then start in a moment. They share the barrier,
    and two sets of places for each rank's tensor, used in turn. A rank can be at most one collective ahead of the
    slowest: it passes barrier n + 1 only after all have read what barrier n published, so when it writes for n + 2
    nobody reads the places of n any more. Hence one barrier per collective is enough."""

    def __init__(self, rank: int, barrier: threading.Barrier, places: list[list[Tensor | None]]) -> None:
        self.rank, self.size = rank, barrier.parties
        self.barrier, self.places, self.calls = barrier, places, 0

    def publish(self, x: Tensor, peers: float) -> list[Tensor]:
        """Every rank's x; `peers` is what `count` takes. A copy: its owner may change x before all have read."""
        self.count(x, peers)
        places = self.places[self.calls % 2]
        self.calls += 1
        places[self.rank] = x.clone()
        self.barrier.wait()  # BrokenBarrierError: another rank has failed
        return [place for place in places if place is not None]

    def all_reduce(self, x: Tensor) -> Tensor:
        # Summed by every rank in the same order, hence the same bits everywhere.
        return torch.stack(self.publish(x, self.size - 1)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self.publish(x, self.size - 1), 1)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return torch.stack([part[:, self.rank] for part in self.publish(x, 1 - 1 / self.size)]).sum(0)

    def all_to_all(self, x: Tensor) -> Tensor:
        return torch.stack([part[:, self.rank] for part in self.publish(x, 1 - 1 / self.size)], 1)
