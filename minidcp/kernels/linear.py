"""Products with a weight for few tokens, where cuBLAS does not come near the memory's bandwidth."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous

FEW_TOKENS = 64  # up to which the kernel is the faster one where there is a weight per head; elsewhere for one


def multiply_by_head(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [T, H, I], weight [H, O, I] -> [T, H, O], accumulated in float32; written to `out` if one is given, whatever
    its dtype. Any strides, but x and out have the last dim contiguous."""
    tokens, heads, dim_in = x.shape
    dim_out = weight.shape[1]
    out = x.new_empty(tokens, heads, dim_out) if out is None else out
    if not use_triton(x) or tokens > (FEW_TOKENS if heads > 1 else 1):
        multiply_by_head_ref(x, weight, out)
        return out
    assert x.stride(2) == 1 and out.stride(2) == 1
    if tokens <= 1:  # all weights are asked for at once, by programs that are resident together
        block, columns = 1, min(triton.next_power_of_2(dim_in), 2048 if heads * dim_out <= 2560 else 1024)
        rows = max(4, 4096 // columns)
    else:
        block, columns = 16 if tokens <= 16 else 32, max(16, min(triton.next_power_of_2(dim_in), 512))
        rows = 64 if columns <= 128 else 16
    multiply_kernel[(triton.cdiv(dim_out, rows), heads, triton.cdiv(tokens, block))](
        x, weight, out, tokens, dim_out, dim_in, *x.stride()[:2], *weight.stride(), *out.stride()[:2],
        BM=block, BN=rows, BK=columns, **launch_early(), num_warps=2 if rows * columns <= 4096 else 4,
    )  # fmt: skip
    return out


def multiply_by_head_ref(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if x.shape[1] > 1 or (out.dtype != x.dtype and not x.is_cuda):
        torch.bmm(x.transpose(0, 1).to(out.dtype), weight.mT.to(out.dtype), out=out.transpose(0, 1))
    elif out.dtype == x.dtype:
        torch.mm(x[:, 0], weight[0].T, out=out[:, 0])
    else:
        torch.mm(x[:, 0], weight[0].T, out_dtype=out.dtype, out=out[:, 0])


@triton.jit
def add_product(w, x, acc):
    """acc [N, M] + w [N, K] · x [K, M]: on tensor cores, but for a single column."""
    if x.shape[1] == 1:
        acc += tl.sum(w.to(tl.float32) * tl.trans(x).to(tl.float32), 1, keep_dims=True)
    else:
        acc = tl.dot(w, x, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["tokens"])
def multiply_kernel(
    x, weight, out, tokens, dim_out, dim_in, x_t, x_h, w_h, w_n, w_k, out_t, out_h,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program computes BN outputs of one head for BM tokens."""
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    rows = weight + h * w_h + (n % dim_out).to(tl.int64)[:, None] * w_n
    columns = x + h * x_h + (t % tokens).to(tl.int64)[None, :] * x_t
    w = tl.load(rows + k[None, :] * w_k, mask=(k < dim_in)[None, :], other=0.0)
    wait_for_previous(EARLY)
    acc = tl.zeros([BN, BM], tl.float32)
    for first in range(0, dim_in, BK):
        acc = add_product(
            w, tl.load(columns + (first + k)[:, None], mask=(first + k < dim_in)[:, None], other=0.0), acc
        )
        k_next = first + BK + k
        w = tl.load(rows + k_next[None, :] * w_k, mask=(k_next < dim_in)[None, :], other=0.0)
    place = out + t.to(tl.int64)[None, :] * out_t + h * out_h + n[:, None]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(t < tokens)[None, :] & (n < dim_out)[:, None])
