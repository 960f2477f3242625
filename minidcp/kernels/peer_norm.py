"""All-reduce, residual and norm in one kernel over peers' memory: of a few tokens, with the sum of
each token's experts before them, or of many, whose rows are shared among the ranks. `norm.py` has
the norm, `meeting.py` says how ranks wait for each other, `parallel/symmetric.py` when that is
safe. There are no torch definitions: a CPU has no peer memory."""

import torch
from torch import Tensor

from minidcp.kernels.compiler import tl, triton
from minidcp.kernels.fp8 import BLOCK, Activations, Quantized, allocate_rows
from minidcp.kernels.meeting import Meeting, begin, load_peer_pointer, meet
from minidcp.kernels.norm import add_and_norm_row, quantize_row, sum_parts


@triton.jit(do_not_specialize=["tiles"])
def norm_peers_kernel(
    pads, epochs, rank, tiles,
    pointers, x, scales, staged, residual, weight, out, total, fp8_values, fp8_scales,
    x_t, residual_t, dim, eps,
    TOP_K: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    RANKS: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile is a token. Program p of every rank has the same tokens."""
    begin(EARLY)
    d = tl.arange(0, DIM)
    mask = d < dim

    if staged is not None:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            t = tl.cast(tile, tl.int64)
            row = sum_parts(x, scales, out, t, x_t, dim, d, mask, TOP_K, DIM)
            tl.store(staged + t * dim + d, row.to(staged.dtype.element_ty), mask=mask)

    meet(pads, epochs, rank, RANKS, LANES, EARLY)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        t = tl.cast(tile, tl.int64)
        row = tl.zeros([DIM], tl.float32)
        for n in tl.static_range(RANKS):
            source = load_peer_pointer(pointers, n, out)
            row += tl.load(source + t * dim + d, mask=mask, other=0.0).to(tl.float32)
        row = row.to(out.dtype.element_ty).to(tl.float32)
        add_and_norm_row(
            row, residual, weight, out, total, fp8_values, fp8_scales,
            t, tiles, residual_t, dim, eps, d, mask, DIM, BLOCK,
        )  # fmt: skip


def norm_peers(
    meeting: Meeting,
    pointers: Tensor,
    x: Tensor,
    scales: Tensor | None,
    staged: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    quantizes: bool,
) -> tuple[Activations, Tensor]:
    """`rms_norm` of the sum of all ranks' x. Every rank gets the same bits: those of the sum of a
    token's experts, an all-reduce and `rms_norm` one after the other.

    Args:
        pointers: [N] int64, the addresses of the ranks' buffers, multiples of 16.
        x: [T, D], contiguous in D, or with `scales` [T, K, D], contiguous.
        scales: [T, K] float32, or None.
        staged: [T, D], this rank's buffer, to which the kernel copies the sum of x's parts. None if
            x is there already.
        residual, weight, eps, quantizes: as in `rms_norm`.
    """
    tokens, dim = residual.shape
    out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    fp8 = allocate_rows(tokens, dim, x.device) if quantizes else None
    width = triton.next_power_of_2(dim)
    # Measured with 5,120 columns: 16 warps for the sum of a token's experts, else 8.
    values_per_program = width if scales is not None else width // 2
    meeting.launch(
        norm_peers_kernel, tokens,
        pointers, x, scales, staged, residual, weight, out, total,
        None if fp8 is None else fp8.values, None if fp8 is None else fp8.scales,
        x.stride(0), residual.stride(0), dim, eps,
        tile_size=values_per_program,
        TOP_K=1 if scales is None else scales.shape[1], DIM=width, BLOCK=min(width, BLOCK),
    )  # fmt: skip
    return out if fp8 is None else Quantized(out, fp8), total


@triton.jit(do_not_specialize=["tiles", "tokens"])
def norm_shared_rows_kernel(
    pads, epochs, rank, tiles,
    pointers, normed_pointers, residual, weight, staged, total, out, fp8_values, fp8_scales,
    tokens, residual_t, dim, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
    RANKS: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile is a row of each rank's run. Program p of every rank has the same tiles.

    It meets its peers twice: before it norms its rows of this rank's run, and before it gathers
    its rows of all runs.
    """
    begin(EARLY)
    d = tl.arange(0, DIM)
    mask = d < dim

    # The next kernel must not be launched before the second meeting.
    meet(pads, epochs, rank, RANKS, LANES, False)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = tl.cast(tile, tl.int64)
        t = rank * tl.cast(tiles, tl.int64) + i
        if t < tokens:
            row = tl.zeros([DIM], tl.float32)
            for n in tl.static_range(RANKS):
                source = load_peer_pointer(pointers, n, out)
                row += tl.load(source + t * dim + d, mask=mask, other=0.0).to(tl.float32)
            row = row.to(out.dtype.element_ty).to(tl.float32)
            add_and_norm_row(
                row, residual, weight, staged, total, None, None,
                i, tiles, residual_t, dim, eps, d, mask, DIM, BLOCK,
            )  # fmt: skip

    tl.debug_barrier()  # every thread reads the epoch that the first meeting has written
    meet(pads, epochs, rank, RANKS, LANES, EARLY)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = tl.cast(tile, tl.int64)
        # Load this row of every run, which has room for it even where it has fewer rows. All loads
        # must be under way before the first store.
        rows = ()
        for n in tl.static_range(RANKS):
            source = load_peer_pointer(normed_pointers, n, out)
            row = tl.load(source + i * dim + d, mask=mask, other=0.0)
            rows += (row,)  # type: ignore[assignment]

        for n in tl.static_range(RANKS):
            t = n * tl.cast(tiles, tl.int64) + i
            if t < tokens:
                tl.store(out + t * dim + d, rows[n], mask=mask)
                if fp8_values is not None:
                    quantize_row(
                        rows[n], fp8_values, fp8_scales, t, tokens, dim, d, mask, DIM, BLOCK
                    )


def norm_shared_rows(
    meeting: Meeting,
    pointers: Tensor,
    normed_pointers: Tensor,
    staged: Tensor,
    residual: Tensor,
    tokens: int,
    weight: Tensor,
    eps: float,
    quantizes: bool,
) -> tuple[Activations, Tensor]:
    """`rms_norm` of the sum of all ranks' x, [T, D] for T tokens, of which each rank norms a run.

    Rank n's run is rows [n · R, (n + 1) · R) of the T. The last runs may be shorter, or empty. The
    bits are those of an all-reduce and `rms_norm` one after the other.

    Args:
        pointers: [N] int64, the addresses of the ranks' x, multiples of 16.
        normed_pointers: [N] int64, the addresses of memory where each rank's normed rows go on
            their way to the others, multiples of 16.
        staged: [R, D] in x's dtype, that memory of this rank.
        residual: this rank's rows of it, up to R, contiguous in D.
        tokens: T.
        weight, eps, quantizes: as in `rms_norm`.

    Returns:
        All normed rows [T, D], and this rank's rows of the sum with the residual.
    """
    rows, dim = staged.shape
    out = torch.empty(tokens, dim, dtype=staged.dtype, device=staged.device)
    total = torch.empty(len(residual), dim, dtype=staged.dtype, device=staged.device)
    fp8 = allocate_rows(tokens, dim, staged.device) if quantizes else None
    width = triton.next_power_of_2(dim)
    meeting.launch(
        norm_shared_rows_kernel, rows,
        pointers, normed_pointers, residual, weight, staged, total, out,
        None if fp8 is None else fp8.values, None if fp8 is None else fp8.scales,
        tokens, residual.stride(0), dim, eps,
        tile_size=width // 2, DIM=width, BLOCK=min(width, BLOCK),
    )  # fmt: skip
    return out if fp8 is None else Quantized(out, fp8), total
