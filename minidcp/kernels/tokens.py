"""The tokens that a step's decode rows begin with. Some are given by the driver, others only the
ranks know, because they have just sampled them."""

import torch
from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous
from minidcp.kernels.compiler import tl, triton


def read_tokens_ref(codes: Tensor, remembered: Tensor, slots: Tensor) -> Tensor:
    places = (-1 - codes).clamp(min=0)
    return torch.where(codes < 0, remembered[slots, places], codes)


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["codes", "slots"],  # they are parts of a larger tensor
)
def read_tokens_kernel(
    codes, remembered, slots, out,
    rows, slot_stride,
    ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program reads ROWS tokens."""
    wait_for_previous(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    code = tl.load(codes + row, mask=mask, other=0)
    slot = tl.load(slots + row, mask=mask, other=0).to(tl.int64)
    place = -1 - code
    known = tl.load(remembered + slot * slot_stride + place, mask=mask & (code < 0), other=0)
    tl.store(out + row, tl.where(code < 0, known, code.to(tl.int64)), mask=mask)


def read_tokens(codes: Tensor, remembered: Tensor, slots: Tensor) -> Tensor:
    """Token ids [T] int64.

    Args:
        codes: [T] int32, token ids, or what is remembered of the slot: -1 is its first token, -2
            the second, and so on.
        remembered: [S, N] int64, contiguous: N tokens of each slot.
        slots: [T] int32.
    """
    if not use_triton(codes):
        return read_tokens_ref(codes, remembered, slots)

    rows = len(codes)
    out = torch.empty(rows, dtype=torch.int64, device=codes.device)
    read_tokens_kernel[(triton.cdiv(rows, 128),)](
        codes, remembered, slots, out, rows, remembered.stride(0), ROWS=128, **launch_early()
    )
    return out
