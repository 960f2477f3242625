"""RMSNorm, alone or with the residual added first: a Triton kernel and its torch twin."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y = x + residual (or x), normalised: y / rms(y) · weight, and y itself. x and residual [T, D] with contiguous D,
    weight [D] -> both [T, D] in x's dtype; eps is added to the mean square. Computed in float32 and rounded before the
    product with the weight, as DeepSeek's code does. With scales [T, K] in float32 there is a residual, and
    x [T, K, D], contiguous, stands for its sum over K by these."""
    if not use_triton(x):
        return rms_norm_ref(x, weight, eps, residual, scales)
    tokens, dim = len(x), x.shape[-1]
    assert x.stride(-1) == 1
    out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    width = triton.next_power_of_2(dim)
    warps = 16 if scales is not None else 4 if width <= 2048 else 8
    rms_norm_kernel[(tokens,)](
        x, residual, scales, weight, out, total, x.stride(0), 0 if residual is None else residual.stride(0), dim,
        eps, TOP_K=1 if scales is None else x.shape[1], DIM=width, num_warps=warps, **launch_early(),
    )  # fmt: skip
    return out, total


def rms_norm_ref(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if scales is not None:
        x = sum_ref(x, scales)
    if residual is not None:
        x = x + residual
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), x


def sum_ref(x: Tensor, scales: Tensor) -> Tensor:
    return torch.einsum("tkd,tk->td", x.float(), scales).to(x.dtype)


@triton.jit
def rms_norm_kernel(
    x, residual, scales, weight, out, total, x_t, residual_t, dim, eps,
    TOP_K: tl.constexpr, DIM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program normalises one token."""
    wait_for_previous(EARLY)
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DIM)
    mask = d < dim
    row = tl.zeros([DIM], tl.float32)
    for i in tl.static_range(TOP_K):
        part = tl.load(x + t * x_t + i * dim + d, mask=mask, other=0.0).to(tl.float32)
        row += part if scales is None else part * tl.load(scales + t * TOP_K + i)
    row = row.to(out.dtype.element_ty).to(tl.float32)
    if residual is not None:
        row += tl.load(residual + t * residual_t + d, mask=mask, other=0.0).to(tl.float32)
        rounded = row.to(total.dtype.element_ty)
        tl.store(total + t * dim + d, rounded, mask=mask)
        row = rounded.to(tl.float32)
    normed = row * tl.rsqrt(tl.sum(row * row, 0) / dim + eps)
    scale = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    normed = normed.to(out.dtype.element_ty).to(tl.float32) * scale
    tl.store(out + t * dim + d, normed.to(out.dtype.element_ty), mask=mask)
