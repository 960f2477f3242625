"""Which groups a rank belongs to, and their exchange. It is built once per rank and handed to
constructors; there is no global. Next: `symmetric.py`."""

import os
import threading
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from minidcp.parallel.exchange import Exchange, make_exchange
from minidcp.parallel.group import Group, ThreadGroup, TorchGroup
from minidcp.parallel.symmetric import SymmetricGroup

# A rank may have to wait for a peer that still reads its weights. A dead peer is noticed by its
# closed socket, long before.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class ParallelState:
    """One rank's view of the others.

    `tp` are all ranks. `dcp` are the ranks that share one interleaved KV cache; each of them
    attends for the heads of all of them. Ranks [g * dcp_size, (g + 1) * dcp_size) form DCP group
    g. They have consecutive heads. Each group has the whole context, so tp_size / dcp_size copies
    of the cache are kept.
    """

    tp: Group
    dcp: Group
    exchange: Exchange

    def begin_step(self) -> None:
        """Every rank calls this before the first collective of a step."""
        self.tp.begin_step()
        if self.dcp is not self.tp:
            self.dcp.begin_step()

    @property
    def received_bytes(self) -> int:
        if self.dcp is self.tp:
            return self.tp.received_bytes
        return self.tp.received_bytes + self.dcp.received_bytes


def build_thread_states(
    tp_size: int, dcp_size: int, exchange: str = "a2a"
) -> tuple[list[ParallelState], list[threading.Barrier]]:
    """The states of `tp_size` ranks that are threads, by rank.

    Also returns the barriers, which must be aborted when one of the ranks fails.
    """
    barriers: list[threading.Barrier] = []
    tp_groups = make_thread_groups(tp_size, barriers)
    dcp_groups: list[Group] = []
    for _ in range(tp_size // dcp_size):
        dcp_groups += make_thread_groups(dcp_size, barriers)

    states = []
    for tp, dcp in zip(tp_groups, dcp_groups, strict=True):
        states.append(ParallelState(tp, dcp, make_exchange(exchange, dcp)))
    return states, barriers


def make_thread_groups(size: int, barriers: list[threading.Barrier]) -> list[Group]:
    """One group of `size` threads, as each of them has it. Its barrier is added to `barriers`."""
    if size == 1:
        return [Group()]
    barrier = threading.Barrier(size)
    barriers.append(barrier)
    boards: list[list[torch.Tensor | None]] = [[None] * size, [None] * size]
    return [ThreadGroup(rank, barrier, boards) for rank in range(size)]


def init_process_state(
    tp_size: int, dcp_size: int, comm: str, exchange: str, device: torch.device
) -> ParallelState:
    """Join the other processes and build this rank's groups.

    RANK, MASTER_ADDR and MASTER_PORT say how. torchrun or our own launcher has set them. `comm` is
    gloo, nccl or symmetric. The last needs Gloo only to find its peers.
    """
    if count_ranks_here(tp_size) == tp_size:
        # Left to themselves, Gloo and NCCL listen on the network, without authentication.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")

    max_programs = 0
    if comm == "symmetric":
        max_programs = prepare_symmetric_memory(tp_size, device)

    if not dist.is_initialized():
        backend = "nccl" if comm == "nccl" else "gloo"
        rank = int(os.environ["RANK"])
        dist.init_process_group(
            backend, "env://", COLLECTIVE_TIMEOUT, world_size=tp_size, rank=rank
        )

    def make_group(group: dist.ProcessGroup) -> Group:
        if group.size() == 1:
            return Group()
        if comm == "symmetric":
            return SymmetricGroup(group, device, max_programs)
        return TorchGroup(group)

    world = dist.group.WORLD
    assert world is not None
    tp = make_group(world)
    if dcp_size == tp_size:
        dcp = tp
    else:
        subgroup, _ = dist.new_subgroups(dcp_size, timeout=COLLECTIVE_TIMEOUT)
        dcp = make_group(subgroup)
    return ParallelState(tp, dcp, make_exchange(exchange, dcp))


def prepare_symmetric_memory(tp_size: int, device: torch.device) -> int:
    """Allow ranks to share GPUs where they must; how many programs a kernel may have that waits."""
    max_programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    sharing = count_ranks_per_gpu(tp_size)
    if sharing == 1:
        return max_programs
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    # Programs that wait must leave room for those of the ranks they wait for.
    return max(1, max_programs // (8 * sharing))


def count_ranks_per_gpu(tp_size: int) -> int:
    """Above 1 if there are more ranks on this node than GPUs, which is meant for tests."""
    return -(-count_ranks_here(tp_size) // torch.cuda.device_count())


def count_ranks_here(tp_size: int) -> int:
    """How many ranks are on this node. Only torchrun can have put some on others."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", tp_size))
