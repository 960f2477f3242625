"""Collectives between ranks: one contract, with implementations for processes and for threads.
Which ranks form which group is in `state.py`; what decode context parallelism sends through a
group is in `exchange.py`, which comes next."""

import threading
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from minidcp.kernels.experts import ExpertOutputs
from minidcp.kernels.fp8 import Activations
from minidcp.kernels.norm import rms_norm


class Group:
    """`size` ranks that call the same collectives in the same order.

    Dim 0 is tokens. Where a collective takes or gives something for every rank, the ranks are in
    dim 1, as the heads of a model are. Results that the contract calls the same on all ranks are
    equal bit for bit. Inputs are never changed. This class itself is the group of one rank.
    """

    rank = 0
    size = 1
    received_bytes = 0  # received from other ranks since the start

    def begin_step(self) -> None:
        """Every rank calls this before the first collective of a step, and of a CUDA graph.

        A group whose buffers take turns begins with the first one again.
        """

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory in which to build the input of the very next collective.

        A group that keeps inputs in memory of its own then need not copy it. Only one buffer may
        be outstanding: RuntimeError is raised if `empty` is called again before the collective, or
        if the collective then gets another tensor, because that would overwrite the memory.
        """
        return like.new_empty(shape)

    def count_received(self, x: Tensor, times: float) -> None:
        """Note that this rank received `times` as many bytes as x has."""
        self.received_bytes += round(x.nbytes * times)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks of x [T, D]; the same on all ranks."""
        return x

    def all_reduce_and_norm(
        self,
        x: Tensor,
        scales: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        quantizes: bool,
    ) -> tuple[Activations, Tensor]:
        """`rms_norm` of the sum over all ranks of x, with the residual added; see there.

        The sum with the residual, which is returned behind the normed rows, is the residual of the
        next call with as many tokens. Nothing else may be done with it: a group may keep only a
        part of its rows on each rank. The first call gets all rows, the same on all ranks.
        """
        if self.size > 1:
            if scales is not None:
                x = ExpertOutputs(x, scales).sum(self.empty(tuple(residual.shape), x))
                scales = None
            x = self.all_reduce(x)
        return rms_norm(x, weight, eps, residual, scales, quantizes)

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x [T, ...] -> [T, size, ...]. x may have any strides."""
        return x[:, None]

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """The sum over all ranks of their x[:, rank]: x [T, size, ...] -> [T, ...]."""
        return x[:, 0]

    def all_to_all(self, x: Tensor) -> Tensor:
        """Entry [:, i] of the result is rank i's x[:, rank]: [T, size, ...] -> [T, size, ...].

        x may have any strides.
        """
        return x


class TorchGroup(Group):
    """A torch.distributed process group: NCCL on GPUs, Gloo on CPUs.

    torch has the ranks in dim 0, hence the transposes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.size = group.size()

    def all_reduce(self, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=self.group)
        # Any algorithm receives at least this much.
        self.count_received(x, 2 * (self.size - 1) / self.size)
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.size, *x.shape)
        # Flat, because Gloo wants input and output to have equally many dims.
        all_gather_into(out.view(-1), x.reshape(-1), group=self.group)
        self.count_received(x, self.size - 1)
        return out.transpose(0, 1)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x), *x.shape[2:])
        by_rank = x.transpose(0, 1).reshape(-1)
        reduce_scatter_into(out.view(-1), by_rank, group=self.group)
        self.count_received(out, self.size - 1)
        return out

    def all_to_all(self, x: Tensor) -> Tensor:
        by_rank = x.transpose(0, 1).contiguous()
        out = torch.empty_like(by_rank)
        dist.all_to_all_single(out, by_rank, group=self.group)
        self.count_received(out[0], self.size - 1)
        return out.transpose(0, 1)


# torch 2.13 renames these two and deprecates the old names; torch 2.11 has only the old names.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ThreadGroup(Group):
    """Ranks that are threads of one process: on a CPU, where eight ranks start in a moment.

    All ranks share a barrier and two boards. A board has a place for each rank's tensor. The
    boards are used in turn, and then one barrier per collective is enough: a rank passes barrier
    n + 1 only after all ranks have read what barrier n published. So when it writes for collective
    n + 2, nobody reads the board of collective n any more.
    """

    def __init__(
        self, rank: int, barrier: threading.Barrier, boards: list[list[Tensor | None]]
    ) -> None:
        self.rank = rank
        self.size = barrier.parties
        self.barrier = barrier
        self.boards = boards
        self.num_calls = 0

    def publish(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, by rank. Raises BrokenBarrierError if another rank has failed."""
        board = self.boards[self.num_calls % 2]
        self.num_calls += 1
        board[self.rank] = x.clone()  # the caller may change x before all ranks have read it
        self.barrier.wait()
        return [cast(Tensor, tensor) for tensor in board]  # every rank has put one there

    def all_reduce(self, x: Tensor) -> Tensor:
        self.count_received(x, self.size - 1)
        # Every rank adds in the same order, so all get the same bits.
        return torch.stack(self.publish(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        self.count_received(x, self.size - 1)
        return torch.stack(self.publish(x), 1)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self.count_received(x, (self.size - 1) / self.size)
        return torch.stack([part[:, self.rank] for part in self.publish(x)]).sum(0)

    def all_to_all(self, x: Tensor) -> Tensor:
        self.count_received(x, (self.size - 1) / self.size)
        return torch.stack([part[:, self.rank] for part in self.publish(x)], 1)
