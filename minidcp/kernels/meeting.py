"""How kernels of several ranks wait for each other through peer memory.

The collectives that do so are in `peer.py`; `parallel/symmetric.py` says when it is safe. There are
no torch definitions: a CPU has no peer memory."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minidcp.kernels import launch_early
from minidcp.kernels.compiler import tl, triton

MAX_PROGRAMS = tl.constexpr(512)  # of a kernel that meets


@dataclass(frozen=True)
class Meeting:
    """What a kernel needs to meet the same kernel on the other ranks.

    Program p of a rank goes on when program p of every peer has come as far. It waits for no other
    program, and programs start in the order of their numbers, so a kernel may have more programs
    than run at once. Where ranks share a GPU, `programs` must be so small that the peers' programs
    fit beside them.

    Attributes:
        rank: this rank.
        pads: [N] int64, the addresses of every rank's pad, [N, MAX_PROGRAMS] int32, zero at first.
            Entry [n, p] of a pad is how many meetings program p of rank n has come to. Rank n
            itself writes it, into the pads of all ranks.
        epochs: [MAX_PROGRAMS] int32, how many meetings program p of this rank has been through.
        programs: the largest number of programs of a kernel, the same on every rank, at most
            MAX_PROGRAMS.
    """

    rank: int
    pads: Tensor
    epochs: Tensor
    programs: int

    def launch(
        self, kernel: Any, tiles: int, *args: object, tile_size: int, **constants: int
    ) -> None:
        """Run a kernel over `tiles` tiles of `tile_size` elements."""
        num_peers = len(self.pads)
        num_programs = max(1, min(self.programs, tiles))
        kernel[(num_programs,)](
            self.pads, self.epochs, self.rank, tiles, *args, **constants,
            RANKS=num_peers, LANES=triton.next_power_of_2(num_peers),
            num_warps=max(4, min(16, tile_size // 512)), **launch_early(),
        )  # fmt: skip


@triton.jit
def begin(EARLY: tl.constexpr):
    """Wait until all earlier kernels of this rank are done. A kernel that meets begins with it."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def meet(pads, epochs, rank, RANKS: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr):
    """Tell program p of every peer that this one is here, and wait until all of them are.

    Only then the next kernel may be launched: where ranks share a GPU, it must not take the place
    of a program that a peer waits for.
    """
    p = tl.program_id(0)
    n = tl.arange(0, LANES)
    epoch = tl.load(epochs + p) + 1
    tl.debug_barrier()  # every thread has read the epoch and written what peers may read

    # Write the epoch into the pads of all ranks.
    peer_pads = tl.load(pads + n, mask=n < RANKS, other=0).to(tl.pointer_type(tl.int32))
    here = tl.zeros([LANES], tl.int32) + epoch
    own_entries = peer_pads + rank * MAX_PROGRAMS + p
    tl.atomic_xchg(own_entries, here, mask=n < RANKS, sem="release", scope="sys")

    # Read this rank's pad until all peers have come as far.
    own_pad = tl.load(pads + rank).to(tl.pointer_type(tl.int32))
    peer_entries = own_pad + n * MAX_PROGRAMS + p
    num_missing = RANKS
    while num_missing > 0:
        zeros = tl.zeros([LANES], tl.int32)
        seen = tl.atomic_add(peer_entries, zeros, mask=n < RANKS, sem="acquire", scope="sys")
        is_missing = (seen - epoch < 0) & (n < RANKS)  # a difference survives overflow
        num_missing = tl.sum(is_missing.to(tl.int32), 0)

    tl.debug_barrier()
    tl.store(epochs + p, epoch)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_peer_pointer(pointers, n, like):
    """Rank n's buffer, as a pointer to the elements that `like` points to."""
    pointer = tl.load(pointers + n).to(tl.pointer_type(like.dtype.element_ty))
    return tl.multiple_of(pointer, 16)
