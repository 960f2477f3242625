"""Small collectives in one trip: ranks write into each other's inboxes, and data is its own flag.

A meeting (`meeting.py`) takes two trips over NVLink: a flag goes out, then data comes. Here a rank
sends its data at once, and a reader polls its inbox until nothing is absent: as NCCL's LL protocol
does, and TensorRT-LLM's "Lamport" all-reduce. `parallel/symmetric.py` says when that is safe."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minidcp.kernels import launch_early
from minidcp.kernels.compiler import tl, triton
from minidcp.kernels.fp8 import BLOCK, Activations, Quantized, allocate_rows
from minidcp.kernels.meeting import begin
from minidcp.kernels.merge import add_partials, store_merged
from minidcp.kernels.norm import add_and_norm_row, sum_parts

# An inbox consists of words of 32 bits, each one float32 or two halves. A word that has not come
# has all bits set. That is a NaN in every float type, so it looks the same whatever comes next.
ABSENT = tl.constexpr(-1)
PRESENT_NAN = tl.constexpr(0x7FFF7FFF)  # is sent for data that looks absent: also a NaN in each

PLACE_BYTES = 512 << 10  # what one rank can send to another in a call
PLACE_WORDS = tl.constexpr(PLACE_BYTES // 4)
TILE_WORDS = 512  # of a program that copies or merges: 16 bytes for each thread of 4 warps


@dataclass(frozen=True)
class Mailbox:
    """One rank's view of all inboxes.

    An inbox has two regions, which calls use in turn. A region has a place for each sender.

    Attributes:
        rank: this rank.
        regions: for each of the two regions, its address in every rank's inbox, [N] int64. The
            addresses are multiples of 16. [N, PLACE_BYTES] lie there, all of it absent at first.
        programs: the largest number of programs of a kernel, the same on every rank. Where ranks
            share a GPU, the peers' programs must fit beside them.
    """

    rank: int
    regions: tuple[Tensor, Tensor]
    programs: int

    def count_programs(self, tiles: int) -> int:
        return min(self.programs, tiles)


@triton.jit
def load_inboxes(inboxes, rank, RANKS: tl.constexpr):
    """Every rank's inbox, a tuple that begins with the next rank's and ends with this rank's.

    So each rank begins to send somewhere else. The addresses never change: this may come before
    `begin`. All are loaded before the first store: the compiler moves no load ahead of a store.
    """
    found = ()
    for i in tl.static_range(RANKS):
        inbox = tl.load(inboxes + (rank + 1 + i) % RANKS).to(tl.pointer_type(tl.int32))
        found += (tl.multiple_of(inbox, 16),)  # type: ignore[assignment]
    return found


@triton.jit
def send(inbox, rank, offset, words, mask):
    """Write words to this rank's place in an inbox, from word `offset` of the place on."""
    words = tl.where(words == ABSENT, PRESENT_NAN, words)
    tl.store(inbox + rank * PLACE_WORDS + offset, words, mask=mask)


@triton.jit
def look(inbox, offset, mask, RANKS: tl.constexpr):
    """What is at `offset` of every sender's place now, by rank.

    Where there are fewer words than threads, several threads load the same word, and then one may
    find it absent and another not. So a kernel waits for tiles with a word or more for each thread.
    """
    words = ()
    for n in tl.static_range(RANKS):
        place = inbox + n * PLACE_WORDS
        found = tl.load(place + offset, mask=mask, other=0, volatile=True)
        words += (found,)  # type: ignore[assignment]
    return words


@triton.jit
def find_absent(words):
    """Where a word of any rank is absent."""
    is_absent = words[0] == ABSENT
    for n in tl.static_range(1, len(words)):
        is_absent |= words[n] == ABSENT
    return is_absent


@triton.jit
def is_any(flags):
    """Whether any flag is set. All threads get there before one of them goes on."""
    return tl.max(flags.to(tl.int32)) > 0


@triton.jit
def clear(inbox, offset, mask, RANKS: tl.constexpr):
    """Make absent what was read. All threads must have read it."""
    for n in tl.static_range(RANKS):
        tl.store(inbox + n * PLACE_WORDS + offset, ABSENT, mask=mask)


@triton.jit
def end_waiting(tile, tiles, EARLY: tl.constexpr):
    """Let the next kernel be launched if this was the last tile for which this program waited.

    Not earlier: where ranks share a GPU, the next kernel must not take the place of programs of a
    peer that have not sent yet what this one waits for.
    """
    if EARLY:
        next_tile = tile + tl.num_programs(0)
        if next_tile >= tiles:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def pack(row, like, SIZE: tl.constexpr):
    """[SIZE] values, rounded to the type that `like` points to, as words."""
    rounded = row.to(like.dtype.element_ty)
    if like.dtype.element_ty.primitive_bitwidth == 32:
        words = rounded.to(tl.int32, bitcast=True)
    else:
        low, high = tl.split(tl.reshape(rounded.to(tl.int16, bitcast=True), [SIZE // 2, 2]))
        words = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    return words


@triton.jit
def unpack(words, like):
    """Words as float32 [...], or if `like` points to halves, as their pairs [..., 2]."""
    if like.dtype.element_ty.primitive_bitwidth == 32:
        values = words.to(like.dtype.element_ty, bitcast=True)
    else:
        low = (words & 0xFFFF).to(tl.int16).to(like.dtype.element_ty, bitcast=True)
        high = (words >> 16).to(tl.int16).to(like.dtype.element_ty, bitcast=True)
        values = tl.join(low.to(tl.float32), high.to(tl.float32))
    return values


@triton.jit(do_not_specialize=["tiles"])
def gather_mail_kernel(
    inboxes, rank, tiles, x, out, count, width,
    TILE: tl.constexpr, RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile is TILE of the `count` words of every rank. x and out are of words, too."""
    all_inboxes = load_inboxes(inboxes, rank, RANKS)
    own_inbox = all_inboxes[RANKS - 1]
    begin(EARLY)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = tile * TILE + tl.arange(0, TILE)
        words = tl.load(x + i, mask=i < count)
        for peer in tl.static_range(RANKS):
            send(all_inboxes[peer], rank, i, words, i < count)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = tile * TILE + tl.arange(0, TILE)
        parts = look(own_inbox, i, i < count, RANKS)
        while is_any(find_absent(parts)):
            parts = look(own_inbox, i, i < count, RANKS)
        end_waiting(tile, tiles, EARLY)

        row = i // width * RANKS
        for n in tl.static_range(RANKS):
            tl.store(out + (row + n) * width + i % width, parts[n], mask=i < count)
        clear(own_inbox, i, i < count, RANKS)


def gather_mail(mailbox: Mailbox, inboxes: Tensor, x: Tensor, out: Tensor) -> None:
    """out[t, n] = row t of rank n's x.

    Args:
        inboxes: the region whose turn it is, one of `mailbox.regions`.
        x: [T, W] of floats of 2 or 4 bytes, contiguous, at most PLACE_BYTES. W is even, or the
            floats have 4 bytes.
        out: [T, N, W] in x's dtype, contiguous.
    """
    words = x.view(torch.int32)
    tiles = triton.cdiv(words.numel(), TILE_WORDS)
    gather_mail_kernel[(mailbox.count_programs(tiles),)](
        inboxes, mailbox.rank, tiles, words, out.view(torch.int32), words.numel(), words.shape[1],
        TILE=TILE_WORDS, RANKS=len(inboxes), num_warps=4, **launch_early(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def norm_mail_kernel(
    inboxes, rank, tiles,
    x, scales, residual, weight, out, total, fp8_values, fp8_scales,
    x_t, residual_t, dim, eps,
    TOP_K: tl.constexpr, DIM: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
    RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile is a token. Program p of every rank has the same tokens."""
    all_inboxes = load_inboxes(inboxes, rank, RANKS)
    own_inbox = all_inboxes[RANKS - 1]
    begin(EARLY)
    d = tl.arange(0, DIM)
    mask = d < dim
    words_per_row = dim // (DIM // WORDS)
    i = tl.arange(0, WORDS)
    in_row = i < words_per_row

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        t = tl.cast(tile, tl.int64)
        row = sum_parts(x, scales, out, t, x_t, dim, d, mask, TOP_K, DIM)
        words = pack(row, out, DIM)
        for peer in tl.static_range(RANKS):
            send(all_inboxes[peer], rank, tile * words_per_row + i, words, in_row)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offset = tile * words_per_row + i
        parts = look(own_inbox, offset, in_row, RANKS)
        while is_any(find_absent(parts)):
            parts = look(own_inbox, offset, in_row, RANKS)
        end_waiting(tile, tiles, EARLY)
        clear(own_inbox, offset, in_row, RANKS)

        # In the order of ranks, so every rank gets the same bits.
        row = tl.zeros([DIM], tl.float32)
        for n in tl.static_range(RANKS):
            row += tl.reshape(unpack(parts[n], out), [DIM])
        row = row.to(out.dtype.element_ty).to(tl.float32)
        add_and_norm_row(
            row, residual, weight, out, total, fp8_values, fp8_scales,
            tl.cast(tile, tl.int64), tiles, residual_t, dim, eps, d, mask, DIM, BLOCK,
        )  # fmt: skip


def norm_mail(
    mailbox: Mailbox,
    inboxes: Tensor,
    x: Tensor,
    scales: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    quantizes: bool,
) -> tuple[Activations, Tensor]:
    """What `norm_peers` does, to the bit. x, [T, D] or [T, K, D], may be anywhere.

    `inboxes` is one of `mailbox.regions`. A rank sends T · D values, at most PLACE_BYTES, of 2 or 4
    bytes; D is even, or they have 4 bytes.
    """
    tokens, dim = residual.shape
    out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    fp8 = allocate_rows(tokens, dim, x.device) if quantizes else None

    # A word or more for each thread; see `look`.
    values_per_word = 4 // x.element_size()
    words = max(128, triton.next_power_of_2(dim) // values_per_word)
    width = words * values_per_word
    # Measured for `norm_peers`.
    values_per_warp = 512 if scales is not None else 1024
    norm_mail_kernel[(mailbox.count_programs(tokens),)](
        inboxes, mailbox.rank, tokens,
        x, scales, residual, weight, out, total,
        None if fp8 is None else fp8.values, None if fp8 is None else fp8.scales,
        x.stride(0), residual.stride(0), dim, eps,
        TOP_K=1 if scales is None else scales.shape[1],
        DIM=width, WORDS=words, BLOCK=min(width, BLOCK), RANKS=len(inboxes),
        num_warps=max(4, min(16, width // values_per_warp)), **launch_early(),
    )  # fmt: skip
    return out if fp8 is None else Quantized(out, fp8), total


@triton.jit(do_not_specialize=["tiles", "tokens"])
def merge_mail_kernel(
    inboxes, rank, tiles,
    partial, partial_lse, out, merged_lse,
    tokens, own_heads, words_per_row, lse_t, lse_h,
    ROWS: tl.constexpr, WORDS: tl.constexpr, DIM: tl.constexpr,
    RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile is ROWS (token, own head) pairs. `partial` is of words.

    A place has the outputs of all pairs, and behind them their LSEs.
    """
    all_inboxes = load_inboxes(inboxes, rank, RANKS)
    own_inbox = all_inboxes[RANKS - 1]
    begin(EARLY)
    i = tl.arange(0, WORDS)[None, :]
    num_rows = tokens * own_heads
    lse_start = num_rows * words_per_row

    # Send each peer what is for its heads.
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        in_rows = row < num_rows
        mask = in_rows[:, None] & (i < words_per_row)
        t = row // own_heads
        parts = ()
        part_lses = ()
        for peer in tl.static_range(RANKS):
            head = (rank + 1 + peer) % RANKS * own_heads + row % own_heads
            source = partial + ((t * RANKS * own_heads + head) * words_per_row)[:, None] + i
            parts += (tl.load(source, mask=mask),)  # type: ignore[assignment]
            lse = tl.load(partial_lse + t * lse_t + head * lse_h, mask=in_rows)
            part_lses += (lse.to(tl.int32, bitcast=True),)  # type: ignore[assignment]
        for peer in tl.static_range(RANKS):
            send(all_inboxes[peer], rank, lse_start + row, part_lses[peer], in_rows)
            send(all_inboxes[peer], rank, row[:, None] * words_per_row + i, parts[peer], mask)

    # Merge what comes for this rank's heads.
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        in_rows = row < num_rows
        mask = in_rows[:, None] & (i < words_per_row)
        offset = row[:, None] * words_per_row + i
        parts = look(own_inbox, offset, mask, RANKS)
        part_lses = look(own_inbox, lse_start + row, in_rows, RANKS)
        while is_any(find_absent(parts) | find_absent(part_lses)[:, None]):
            parts = look(own_inbox, offset, mask, RANKS)
            part_lses = look(own_inbox, lse_start + row, in_rows, RANKS)
        end_waiting(tile, tiles, EARLY)

        # Several threads share an LSE. One of them found it; now the others find it, too.
        part_lses = look(own_inbox, lse_start + row, in_rows, RANKS)
        tl.debug_barrier()
        clear(own_inbox, offset, mask, RANKS)
        clear(own_inbox, lse_start + row, in_rows, RANKS)

        values = ()
        lses = ()
        for n in tl.static_range(RANKS):
            values += (tl.reshape(unpack(parts[n], out), [ROWS, DIM]),)  # type: ignore[assignment]
            lses += (part_lses[n].to(tl.float32, bitcast=True),)  # type: ignore[assignment]
        max_lse = tl.full([ROWS], -float("inf"), tl.float32)
        sum_of_weights = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        max_lse, sum_of_weights, acc = add_partials(max_lse, sum_of_weights, acc, values, lses)
        d = tl.arange(0, DIM)[None, :]
        dim = words_per_row * (DIM // WORDS)
        store_merged(max_lse, sum_of_weights, acc, out, merged_lse, row, in_rows, d, dim)


def merge_mail(
    mailbox: Mailbox,
    inboxes: Tensor,
    partial: Tensor,
    partial_lse: Tensor,
    out: Tensor,
    merged_lse: Tensor,
) -> None:
    """Attention over the union of all ranks' shards, for this rank's heads, as in `merge_peers`.

    Args:
        inboxes: the region whose turn it is, one of `mailbox.regions`.
        partial: [T, N · H, D], contiguous, this rank's partial outputs, in out's dtype. D is even,
            or the values have 4 bytes. What goes to one rank is at most PLACE_BYTES, with 4 bytes
            for each LSE.
        partial_lse: [T, N · H] float32, its LSEs.
        out: [T, H, D], contiguous: the result.
        merged_lse: [T, H] float32, contiguous: its LSEs.
    """
    tokens, own_heads, _ = out.shape
    words = partial.view(torch.int32)
    width = triton.next_power_of_2(words.shape[2])
    rows = max(1, TILE_WORDS // width)
    tiles = triton.cdiv(tokens * own_heads, rows)
    merge_mail_kernel[(mailbox.count_programs(tiles),)](
        inboxes, mailbox.rank, tiles,
        words, partial_lse, out, merged_lse,
        tokens, own_heads, words.shape[2], *partial_lse.stride(),
        ROWS=rows, WORDS=width, DIM=width * (4 // out.element_size()),
        RANKS=len(inboxes), num_warps=4, **launch_early(),
    )  # fmt: skip
