"""Rotary embedding of queries, in the rotate-half layout: a Triton kernel and its torch twin."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidcp.kernels import use_triton


def rotate(x: Tensor, cos_sin: Tensor, out: Tensor) -> None:
    """Rotate every head of x; computed in float32.

    Args:
        x: [T, H, R], contiguous R; may be a slice of a wider tensor.
        cos_sin: [T, R] float32, the cosines of R / 2 angles and then their sines.
        out: as x, to be written; may be x itself.
    """
    if not use_triton(x):
        out.copy_(rotate_ref(x, cos_sin))
        return
    tokens, heads, dim = x.shape
    assert x.stride(2) == 1 and out.stride(2) == 1 and cos_sin.is_contiguous()
    if tokens:
        block = triton.next_power_of_2(heads)
        rotate_kernel[(tokens,)](
            x, cos_sin, out, *x.stride()[:2], *out.stride()[:2], heads, dim // 2,
            HEADS=block, HALF=triton.next_power_of_2(dim // 2),
        )  # fmt: skip


def rotate_ref(x: Tensor, cos_sin: Tensor) -> Tensor:
    cos, sin = cos_sin[:, None].chunk(2, -1)
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@triton.jit
def rotate_kernel(x, cos_sin, out, x_t, x_h, out_t, out_h, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """One program rotates all heads of one token."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    mask = (h < heads) & (i < half)
    cos = tl.load(cos_sin + t * 2 * half + i, mask=i < half, other=0.0)
    sin = tl.load(cos_sin + t * 2 * half + half + i, mask=i < half, other=0.0)
    row = x + t * x_t + h * x_h + i
    first = tl.load(row, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(row + half, mask=mask, other=0.0).to(tl.float32)
    dst = out + t * out_t + h * out_h + i
    tl.store(dst, (first * cos - second * sin).to(out.dtype.element_ty), mask=mask)
    tl.store(dst + half, (second * cos + first * sin).to(out.dtype.element_ty), mask=mask)
