"""RMSNorm, alone or with the residual added first. x may also be the outputs of several experts:
then their weighted sum comes first of all. The result may be wanted in FP8, too."""

import torch
from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous
from minidcp.kernels.compiler import tl, triton
from minidcp.kernels.fp8 import (
    BLOCK,
    Activations,
    Quantized,
    allocate_rows,
    find_scale,
    quantize_ref,
)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if scales is not None:
        x = sum_scaled_ref(x, scales)
    if residual is not None:
        x = x + residual

    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), x


def sum_scaled_ref(x: Tensor, scales: Tensor) -> Tensor:
    """x [T, K, D], scales [T, K] float32 -> [T, D], the sum over K, in x's dtype."""
    return torch.einsum("tkd,tk->td", x.float(), scales).to(x.dtype)


@triton.jit
def sum_parts(x, scales, out, t, x_t, dim, d, mask, TOP_K: tl.constexpr, DIM: tl.constexpr):
    """Row t of x, or the weighted sum of its TOP_K parts: [DIM] float32, rounded to out's type."""
    row = tl.zeros([DIM], tl.float32)
    for i in tl.static_range(TOP_K):
        part = tl.load(x + t * x_t + i * dim + d, mask=mask, other=0.0).to(tl.float32)
        if scales is not None:
            part *= tl.load(scales + t * TOP_K + i)
        row += part
    return row.to(out.dtype.element_ty).to(tl.float32)


@triton.jit
def norm_row(row, weight, dim, eps, like):
    """row / rms(row) · weight, both in float32. Rounded to like's type before the product with the
    weight, and after it."""
    normed = row * tl.rsqrt(tl.sum(row * row, 0) / dim + eps)
    normed = normed.to(like.dtype.element_ty).to(tl.float32) * weight
    return normed.to(like.dtype.element_ty)


@triton.jit
def quantize_row(
    row, values, scales, t, tokens, dim, d, mask, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Store row t of `tokens` in FP8."""
    by_block = tl.reshape(row.to(tl.float32), [DIM // BLOCK, BLOCK])
    scale = find_scale(by_block, 1)
    by_block = (by_block / scale[:, None]).to(values.dtype.element_ty)
    tl.store(values + t * dim + d, tl.reshape(by_block, [DIM]), mask=mask)
    block = tl.arange(0, DIM // BLOCK)
    tl.store(scales + block * tokens + t, scale, mask=block * BLOCK < dim)


@triton.jit
def add_and_norm_row(
    row, residual, weight, out, total, fp8_values, fp8_scales,
    t, tokens, residual_t, dim, eps, d, mask,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the residual to row t and norm it; quantise it if there is room for that."""
    # What is normalised is the rounded sum, which is also stored.
    if residual is not None:
        row += tl.load(residual + t * residual_t + d, mask=mask, other=0.0).to(tl.float32)
        rounded = row.to(total.dtype.element_ty)
        tl.store(total + t * dim + d, rounded, mask=mask)
        row = rounded.to(tl.float32)

    scale = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    normed = norm_row(row, scale, dim, eps, out)
    tl.store(out + t * dim + d, normed, mask=mask)

    if fp8_values is not None:
        quantize_row(normed, fp8_values, fp8_scales, t, tokens, dim, d, mask, DIM, BLOCK)


@triton.jit(do_not_specialize=["tokens"])
def rms_norm_kernel(
    x, residual, scales, weight, out, total, fp8_values, fp8_scales,
    tokens, x_t, residual_t, dim, eps,
    TOP_K: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program normalises one token."""
    wait_for_previous(EARLY)
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DIM)
    mask = d < dim
    row = sum_parts(x, scales, out, t, x_t, dim, d, mask, TOP_K, DIM)
    add_and_norm_row(
        row, residual, weight, out, total, fp8_values, fp8_scales,
        t, tokens, residual_t, dim, eps, d, mask, DIM, BLOCK,
    )  # fmt: skip


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    quantizes: bool = False,
) -> tuple[Activations, Tensor]:
    """y / rms(y) · weight, and y itself, where y = x + residual (or x if there is no residual).

    It is computed in float32 and rounded before the product with the weight, as in DeepSeek's code.

    Args:
        x: [T, D], contiguous in D. With `scales`: [T, K, D], contiguous, and x stands for its
            sum over K, weighted by the scales.
        weight: [D].
        eps: added to the mean square.
        residual: [T, D], contiguous in D.
        scales: [T, K] float32; needs a residual.
        quantizes: the normed rows are wanted in FP8, too.

    Returns:
        Two tensors [T, D] in x's dtype.
    """
    tokens = len(x)
    if not use_triton(x):
        normed, total = rms_norm_ref(x, weight, eps, residual, scales)
        return Quantized(normed, quantize_ref(normed)) if quantizes else normed, total

    dim = x.shape[-1]
    assert x.stride(-1) == 1
    out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device)

    total = x
    residual_stride = 0
    if residual is not None:
        total = torch.empty_like(out)
        residual_stride = residual.stride(0)

    fp8 = allocate_rows(tokens, dim, x.device) if quantizes else None

    width = triton.next_power_of_2(dim)
    top_k = 1
    num_warps = 4 if width <= 2048 else 8
    if scales is not None:
        top_k = x.shape[1]
        num_warps = 16

    rms_norm_kernel[(tokens,)](
        x, residual, scales, weight, out, total,
        None if fp8 is None else fp8.values, None if fp8 is None else fp8.scales,
        tokens, x.stride(0), residual_stride, dim, eps,
        TOP_K=top_k, DIM=width, BLOCK=min(width, BLOCK), num_warps=num_warps, **launch_early(),
    )  # fmt: skip
    return out if fp8 is None else Quantized(out, fp8), total
