"""Collectives by reading peers' memory: each kernel meets the other ranks' and then reads what they hold.
`parallel/symmetric.py` says when that is safe. No torch twins: a CPU has no peer memory."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from minidcp.kernels.merge import add_partials, store_merged

MAX_PROGRAMS = tl.constexpr(512)  # of a kernel that meets


@dataclass(frozen=True)
class Meeting:
    """What kernels need to wait for each other: program p of a rank goes on when program p of every peer has come as
    far. It waits for no other, and programs start in the order of their numbers, so a kernel may have more of them than
    run at once; where ranks share a GPU, fewer must leave room for the peers.

    Attributes:
        programs: the most that a kernel has, on every rank the same, at most MAX_PROGRAMS.
        pads: [N] int64, addresses of every rank's [N, MAX_PROGRAMS] int32, zero at first. Entry [n, p] is how many
            meetings program p of rank n has come to; rank n itself writes it everywhere.
        epochs: [MAX_PROGRAMS] int32, how many meetings this rank's program p has been through."""

    rank: int
    pads: Tensor
    epochs: Tensor
    programs: int

    def launch(self, kernel, tiles: int, *args, tile: int, **constants) -> None:
        """Run a kernel over `tiles` tiles of `tile` elements."""
        peers = len(self.pads)
        kernel[(max(1, min(self.programs, tiles)),)](
            self.pads, self.epochs, self.rank, tiles, *args, **constants,
            PEERS=peers, LANES=triton.next_power_of_2(peers), num_warps=max(4, min(16, tile // 512)),
        )  # fmt: skip


@triton.jit
def meet(pads, epochs, rank, PEERS: tl.constexpr, LANES: tl.constexpr):
    """Tell program p of every peer that this one is here, and wait until all are."""
    p = tl.program_id(0)
    n = tl.arange(0, LANES)
    epoch = tl.load(epochs + p) + 1
    tl.debug_barrier()  # every thread has read the epoch and written what peers may read
    theirs = tl.load(pads + n, mask=n < PEERS, other=0).to(tl.pointer_type(tl.int32))
    here = tl.zeros([LANES], tl.int32) + epoch
    tl.atomic_xchg(theirs + rank * MAX_PROGRAMS + p, here, mask=n < PEERS, sem="release", scope="sys")
    own = tl.load(pads + rank).to(tl.pointer_type(tl.int32)) + n * MAX_PROGRAMS + p
    missing = PEERS
    while missing > 0:
        seen = tl.atomic_add(own, tl.zeros([LANES], tl.int32), mask=n < PEERS, sem="acquire", scope="sys")
        missing = tl.sum(((seen - here < 0) & (n < PEERS)).to(tl.int32), 0)  # differences survive overflow
    tl.debug_barrier()
    tl.store(epochs + p, epoch)


@triton.jit
def peer_pointer(pointers, n, like):
    """Rank n's buffer, as a pointer to the elements that `like` points to."""
    return tl.multiple_of(tl.load(pointers + n).to(tl.pointer_type(like.dtype.element_ty)), 16)


def read_peers(meeting: Meeting, pointers: Tensor, stride: int, offset: int, out: Tensor) -> None:
    """out[t, n] = elements [offset, offset + W) of row t of rank n's buffer, for all ranks in `pointers`: [M] int64,
    addresses of [T, stride] elements of out's dtype, multiples of 16. out is [T, M, W], contiguous."""
    rows, peers, width = out.shape
    tile = choose_tile(rows * width)
    tiles = triton.cdiv(rows * width, tile) * peers
    meeting.launch(read_kernel, tiles, pointers, out, peers, rows * width, width, stride, offset, tile=tile, TILE=tile)


@triton.jit(do_not_specialize=["tiles"])
def read_kernel(
    pads, epochs, rank, tiles, pointers, out, sources, count, width, stride, offset,
    TILE: tl.constexpr, PEERS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    meet(pads, epochs, rank, PEERS, LANES)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        n = tile % sources
        i = tl.cast(tile // sources, tl.int64) * TILE + tl.arange(0, TILE)
        row, column = i // width, i % width
        source = peer_pointer(pointers, n, out)
        value = tl.load(source + row * stride + offset + column, mask=i < count)
        tl.store(out + (row * sources + n) * width + column, value, mask=i < count)


def sum_peers(meeting: Meeting, pointers: Tensor, stride: int, offset: int, out: Tensor) -> None:
    """out[t] = the sum over the ranks of elements [offset, offset + W) of row t of their buffers, added in their order
    and in float32: the same bits on every rank. As `read_peers`, with out [T, W]."""
    rows, width = out.shape
    tile = choose_tile(rows * width)
    tiles = triton.cdiv(rows * width, tile)
    meeting.launch(sum_kernel, tiles, pointers, out, rows * width, width, stride, offset, tile=tile, TILE=tile)


@triton.jit(do_not_specialize=["tiles"])
def sum_kernel(
    pads, epochs, rank, tiles, pointers, out, count, width, stride, offset,
    TILE: tl.constexpr, PEERS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    meet(pads, epochs, rank, PEERS, LANES)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = tl.cast(tile, tl.int64) * TILE + tl.arange(0, TILE)
        place = i // width * stride + offset + i % width
        total = tl.zeros([TILE], tl.float32)
        for n in tl.static_range(PEERS):
            part = tl.load(peer_pointer(pointers, n, out) + place, mask=i < count, other=0.0)
            total += part.to(tl.float32)
        tl.store(out + i, total.to(out.dtype.element_ty), mask=i < count)


def merge_peers(
    meeting: Meeting, pointers: Tensor, lse_offset: int, staged_lse: Tensor, lse: Tensor, out: Tensor, merged: Tensor
) -> None:
    """Attention over the union of the ranks' shards, for this rank's heads; see `merge.py`. Every rank's buffer holds
    its partial outputs [T, N * H, dim] at its begin, and at byte `lse_offset` there is room for their LSEs. This rank's
    `lse` is put there here, into staged_lse [T, N * H] float32: attention back-ends write it where they like. Writes
    out [T, H, dim], contiguous, of the partial outputs' dtype, and merged [T, H] float32."""
    tokens, heads = lse.shape
    own, dim = out.shape[1:]
    width = triton.next_power_of_2(dim)
    rows = max(1, min(4096 // width, triton.next_power_of_2(triton.next_power_of_2(tokens * own) // meeting.programs)))
    meeting.launch(
        merge_kernel, triton.cdiv(tokens * own, rows), pointers, staged_lse, lse, out, merged, tokens, heads, own, dim,
        *lse.stride(), lse_offset // 4, tile=rows * width, ROWS=rows, DIM=width,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "tokens"])
def merge_kernel(
    pads, epochs, rank, tiles, pointers, staged_lse, lse, out, merged, tokens, heads, own, dim, lse_t, lse_h, offset,
    ROWS: tl.constexpr, DIM: tl.constexpr, PEERS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A tile is ROWS (token, own head) pairs; program p of every rank does the same tiles."""
    peer = tl.arange(0, LANES)[None, :]
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        t, h = row // own, row % own
        head = peer * own + h[:, None]  # those that this program's like will read
        mask = (peer < PEERS) & (row < tokens * own)[:, None]
        value = tl.load(lse + t[:, None] * lse_t + head * lse_h, mask=mask)
        tl.store(staged_lse + t[:, None] * heads + head, value, mask=mask)
    meet(pads, epochs, rank, PEERS, LANES)
    d = tl.arange(0, DIM)[None, :]
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        there = row < tokens * own
        place = row // own * heads + rank * own + row % own  # in the peers' [T, N * H]
        begin = place.to(tl.int64)[:, None] * dim + d
        parts, lses = (), ()
        for i in tl.static_range(PEERS):
            part = peer_pointer(pointers, i, out) + begin
            parts += (tl.load(part, mask=there[:, None] & (d < dim), other=0.0),)  # type: ignore[assignment]
        tl.debug_barrier()  # so that all loads are under way before one is waited for
        for i in tl.static_range(PEERS):
            part_lse = peer_pointer(pointers, i, merged) + offset + place
            lses += (tl.load(part_lse, mask=there, other=-float("inf")),)  # type: ignore[assignment]
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        top, total, acc = add_partials(top, total, acc, parts, lses)
        store_merged(top, total, acc, out, merged, row, there, d, dim)


def choose_tile(count: int) -> int:
    """Elements: few for a small tensor, so that many programs share it; more keep a thread's loads under way."""
    return int(min(16384, max(1024, triton.next_power_of_2(count) // 128)))
