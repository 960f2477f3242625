"""Which groups a rank belongs to. Built once per rank and handed to constructors; there is no global."""

import os
import threading
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from minidcp.parallel.group import Group, ThreadGroup, TorchGroup
from minidcp.parallel.symmetric import SymmetricGroup

# A rank may wait for a peer that still reads its weights; a dead peer is noticed by its closed socket.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class ParallelState:
    """One rank's view: `tp` are all ranks, `dcp` those that share an interleaved KV cache with this one and attend with
    the heads of all of them: ranks [g * dcp_size, (g + 1) * dcp_size) form DCP group g with consecutive heads."""

    tp: Group
    dcp: Group

    def begin_step(self) -> None:
        """To be called before a step's first collective."""
        for group in dict.fromkeys((self.tp, self.dcp)):  # in this order on every rank; they may be one
            group.begin_step()

    @property
    def received_bytes(self) -> int:
        return sum(group.received_bytes for group in {self.tp, self.dcp})


def build_thread_states(tp_size: int, dcp_size: int) -> tuple[list[ParallelState], list[threading.Barrier]]:
    """The states of `tp_size` ranks that are threads, and what must be aborted when one of them fails."""
    barriers: list[threading.Barrier] = []

    def join(size: int) -> list[Group]:
        """A group of so many, as each of them has it."""
        barriers.append(threading.Barrier(size))
        places: list[list[Tensor | None]] = [[None] * size, [None] * size]
        return [ThreadGroup(rank, barriers[-1], places) for rank in range(size)] if size > 1 else [Group()]

    tp, dcp = join(tp_size), [group for _ in range(tp_size // dcp_size) for group in join(dcp_size)]
    return [ParallelState(*groups) for groups in zip(tp, dcp, strict=True)], barriers


def init_process_state(tp_size: int, dcp_size: int, comm: str, device: torch.device) -> ParallelState:
    """Join the other processes as RANK, MASTER_ADDR and MASTER_PORT say, which torchrun or our own launcher has set,
    and build this rank's groups. `comm` is "gloo", "nccl", or "symmetric", which needs Gloo only to find its peers."""
    if comm == "symmetric":
        sharing = count_ranks_per_gpu(tp_size)
        programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
        if sharing > 1:
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
            programs = max(1, programs // (8 * sharing))  # the late ones need room
    if not dist.is_initialized():
        kind, mine = "nccl" if comm == "nccl" else "gloo", int(os.environ["RANK"])
        dist.init_process_group(kind, "env://", COLLECTIVE_TIMEOUT, world_size=tp_size, rank=mine)
    world = dist.group.WORLD
    assert world is not None

    def wrap(group: dist.ProcessGroup) -> Group:
        if group.size() == 1:
            return Group()
        return SymmetricGroup(group, device, programs) if comm == "symmetric" else TorchGroup(group)

    tp = wrap(world)
    if dcp_size == tp_size:
        return ParallelState(tp, tp)
    dcp, _ = dist.new_subgroups(dcp_size, timeout=COLLECTIVE_TIMEOUT)
    return ParallelState(tp, wrap(dcp))


def count_ranks_per_gpu(tp_size: int) -> int:
    """Above 1 when there are more ranks on this node than GPUs, which is meant for tests."""
    return -(-int(os.environ.get("LOCAL_WORLD_SIZE", tp_size)) // torch.cuda.device_count())
