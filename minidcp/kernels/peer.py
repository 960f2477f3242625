"""Collectives that read peers' memory. Each is one kernel, which meets the same kernel of the other
ranks (`meeting.py`) and then reads what their buffers hold. There are no torch definitions, because
a CPU has no peer memory. `parallel/symmetric.py` uses them, and says when they are safe."""

from torch import Tensor

from minidcp.kernels.compiler import tl, triton
from minidcp.kernels.meeting import MAX_PROGRAMS as MAX_PROGRAMS
from minidcp.kernels.meeting import Meeting, begin, load_peer_pointer, meet
from minidcp.kernels.merge import add_partials, store_merged


@triton.jit(do_not_specialize=["tiles"])
def read_peers_kernel(
    pads, epochs, rank, tiles,
    pointers, out, num_sources, count, width, stride, offset,
    TILE: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile is TILE of the `count` elements that are read of one rank."""
    begin(EARLY)
    meet(pads, epochs, rank, RANKS, LANES, EARLY)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        n = tile % num_sources
        i = tl.cast(tile // num_sources, tl.int64) * TILE + tl.arange(0, TILE)
        row = i // width
        column = i % width
        source = load_peer_pointer(pointers, n, out)
        value = tl.load(source + row * stride + offset + column, mask=i < count)
        tl.store(out + (row * num_sources + n) * width + column, value, mask=i < count)


def read_peers(meeting: Meeting, pointers: Tensor, stride: int, offset: int, out: Tensor) -> None:
    """out[t, n] = elements [offset, offset + W) of row t of rank n's buffer.

    Args:
        pointers: [M] int64, the addresses of the buffers of M ranks, multiples of 16. A buffer is
            [T, stride] elements of out's dtype.
        out: [T, M, W], contiguous.
    """
    rows, num_sources, width = out.shape
    count = rows * width
    tile_size = choose_tile_size(count)
    tiles = triton.cdiv(count, tile_size) * num_sources
    meeting.launch(
        read_peers_kernel, tiles,
        pointers, out, num_sources, count, width, stride, offset,
        tile_size=tile_size, TILE=tile_size,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def sum_peers_kernel(
    pads, epochs, rank, tiles,
    pointers, out, count, width, stride, offset,
    TILE: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile is TILE of the `count` elements of the result."""
    begin(EARLY)
    meet(pads, epochs, rank, RANKS, LANES, EARLY)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = tl.cast(tile, tl.int64) * TILE + tl.arange(0, TILE)
        element = i // width * stride + offset + i % width  # in every rank's buffer
        total = tl.zeros([TILE], tl.float32)
        for n in tl.static_range(RANKS):
            source = load_peer_pointer(pointers, n, out)
            total += tl.load(source + element, mask=i < count, other=0.0).to(tl.float32)
        tl.store(out + i, total.to(out.dtype.element_ty), mask=i < count)


def sum_peers(meeting: Meeting, pointers: Tensor, stride: int, offset: int, out: Tensor) -> None:
    """out[t] = the sum over all ranks of elements [offset, offset + W) of row t of their buffers.

    The sum is in float32 and in the order of ranks, so every rank gets the same bits. Arguments are
    as in `read_peers`, except that out is [T, W].
    """
    rows, width = out.shape
    count = rows * width
    tile_size = choose_tile_size(count)
    tiles = triton.cdiv(count, tile_size)
    meeting.launch(
        sum_peers_kernel, tiles,
        pointers, out, count, width, stride, offset,
        tile_size=tile_size, TILE=tile_size,
    )  # fmt: skip


def choose_tile_size(count: int) -> int:
    """Elements of a tile. A small tensor has small tiles, so that many programs share it. A large
    one has larger tiles, so that each thread has several loads under way."""
    return int(min(16384, max(1024, triton.next_power_of_2(count) // 128)))


@triton.jit(do_not_specialize=["tiles", "tokens"])
def merge_peers_kernel(
    pads, epochs, rank, tiles,
    pointers, staged_lse, lse, out, merged_lse,
    tokens, heads, own_heads, dim, lse_t, lse_h, lse_offset,
    ROWS: tl.constexpr, DIM: tl.constexpr,
    RANKS: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile is ROWS (token, own head) pairs. Program p of every rank has the same tiles."""
    begin(EARLY)
    # Stage the LSEs that program p of each peer will read: those of the peer's heads.
    peer = tl.arange(0, LANES)[None, :]
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        t = row // own_heads
        h = row % own_heads
        head = peer * own_heads + h[:, None]
        mask = (peer < RANKS) & (row < tokens * own_heads)[:, None]
        value = tl.load(lse + t[:, None] * lse_t + head * lse_h, mask=mask)
        tl.store(staged_lse + t[:, None] * heads + head, value, mask=mask)

    meet(pads, epochs, rank, RANKS, LANES, EARLY)

    d = tl.arange(0, DIM)[None, :]
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        in_rows = row < tokens * own_heads
        peer_row = row // own_heads * heads + rank * own_heads + row % own_heads  # of [T, N * H]
        element = peer_row.to(tl.int64)[:, None] * dim + d

        # Load the partial outputs of all ranks.
        parts = ()
        for n in tl.static_range(RANKS):
            pointer = load_peer_pointer(pointers, n, out) + element
            part = tl.load(pointer, mask=in_rows[:, None] & (d < dim), other=0.0)
            parts += (part,)  # type: ignore[assignment]

        # All loads must be under way before one of them is waited for.
        tl.debug_barrier()

        # Load their LSEs, and merge.
        part_lses = ()
        for n in tl.static_range(RANKS):
            lse_pointer = load_peer_pointer(pointers, n, merged_lse) + lse_offset + peer_row
            part_lse = tl.load(lse_pointer, mask=in_rows, other=-float("inf"))
            part_lses += (part_lse,)  # type: ignore[assignment]
        max_lse = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        max_lse, total, acc = add_partials(max_lse, total, acc, parts, part_lses)
        store_merged(max_lse, total, acc, out, merged_lse, row, in_rows, d, dim)


def merge_peers(
    meeting: Meeting,
    pointers: Tensor,
    lse_offset: int,
    staged_lse: Tensor,
    lse: Tensor,
    out: Tensor,
    merged_lse: Tensor,
) -> None:
    """Attention over the union of all ranks' shards, for this rank's heads; see `merge.py`.

    Args:
        pointers: [N] int64, the addresses of the ranks' buffers, multiples of 16. A buffer begins
            with the rank's partial outputs, [T, N · H, D] in out's dtype; at byte `lse_offset` it
            has room for their LSEs, [T, N · H] float32.
        staged_lse: [T, N · H] float32, that room in this rank's own buffer.
        lse: [T, N · H] float32, this rank's LSEs. The kernel copies them to `staged_lse`, because
            attention back-ends write them where they like.
        out: [T, H, D], contiguous: the result.
        merged_lse: [T, H] float32, contiguous: its LSEs.
    """
    tokens, heads = lse.shape
    _, own_heads, dim = out.shape

    # Up to 4096 values a tile; fewer if there would be less tiles than programs.
    width = triton.next_power_of_2(dim)
    rows_per_program = triton.next_power_of_2(tokens * own_heads) // meeting.programs
    rows = max(1, min(4096 // width, triton.next_power_of_2(rows_per_program)))
    tiles = triton.cdiv(tokens * own_heads, rows)

    meeting.launch(
        merge_peers_kernel, tiles,
        pointers, staged_lse, lse, out, merged_lse,
        tokens, heads, own_heads, dim, *lse.stride(), lse_offset // 4,
        tile_size=rows * width, ROWS=rows, DIM=width,
    )  # fmt: skip
