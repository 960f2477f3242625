"""Products with a weight for few tokens, where cuBLAS does not come near the memory's bandwidth.

For more tokens it calls cuBLAS. The experts' products are in `experts.py`."""

import torch
from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous
from minidcp.kernels.compiler import tl, triton
from minidcp.kernels.norm import norm_row

# Up to how many tokens the kernel is faster than cuBLAS.
MAX_TOKENS_OF_HEADS = 32  # with a weight per head
MAX_TOKENS_OF_ONE_WEIGHT = 1
MAX_NORMED = 2048  # inputs that a program norms before it multiplies them


def multiply_by_head_ref(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    has_one_weight = x.shape[1] == 1
    if has_one_weight and out.dtype == x.dtype:
        torch.mm(x[:, 0], weight[0].T, out=out[:, 0])
    elif has_one_weight and x.is_cuda:  # a CPU's mm has no out_dtype
        torch.mm(x[:, 0], weight[0].T, out_dtype=out.dtype, out=out[:, 0])
    else:
        x_by_head = x.transpose(0, 1).to(out.dtype)  # [H, T, I]
        torch.bmm(x_by_head, weight.mT.to(out.dtype), out=out.transpose(0, 1))
    return out


@triton.jit
def add_product(w, x, acc):
    """acc [N, M] + w [N, K] · x [K, M]: on tensor cores, unless x is a single column."""
    if x.shape[1] == 1:
        acc += tl.sum(w.to(tl.float32) * tl.trans(x).to(tl.float32), 1, keep_dims=True)
    else:
        acc = tl.dot(w, x, acc, input_precision="ieee")
    return acc


@triton.jit
def multiply_tile(
    x, weight, out, h, first_t, first_n,
    tokens, dim_out, dim_in,
    x_t, x_h, w_h, w_n, w_k, out_t, out_h,  # strides
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BN outputs of head h for BM tokens, BK inputs at a time.

    It waits for the kernel before this one, whose output x may be.
    """
    t = first_t + tl.arange(0, BM)
    n = first_n + tl.arange(0, BN)
    k = tl.arange(0, BK)

    # Tokens and outputs beyond the last wrap around: their products are not stored.
    weight_rows = weight + h * w_h + (n % dim_out).to(tl.int64)[:, None] * w_n
    x_columns = x + h * x_h + (t % tokens).to(tl.int64)[None, :] * x_t

    # The first weights are loaded while the kernel before this one may still be running.
    w = tl.load(weight_rows + k[None, :] * w_k, mask=(k < dim_in)[None, :], other=0.0)
    wait_for_previous(EARLY)

    acc = tl.zeros([BN, BM], tl.float32)
    for first in range(0, dim_in, BK):
        k_now = first + k
        inputs = tl.load(x_columns + k_now[:, None], mask=(k_now < dim_in)[:, None], other=0.0)
        acc = add_product(w, inputs, acc)
        k_next = first + BK + k
        w = tl.load(weight_rows + k_next[None, :] * w_k, mask=(k_next < dim_in)[None, :], other=0.0)

    pointers = out + t.to(tl.int64)[None, :] * out_t + h * out_h + n[:, None]
    mask = (t < tokens)[None, :] & (n < dim_out)[:, None]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def multiply_by_head_kernel(
    x, weight, out,
    tokens, dim_out, dim_in,
    x_t, x_h, w_h, w_n, w_k, out_t, out_h,  # strides
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program computes one tile."""
    h = tl.program_id(1).to(tl.int64)
    multiply_tile(
        x, weight, out, h, tl.program_id(2) * BM, tl.program_id(0) * BN,
        tokens, dim_out, dim_in, x_t, x_h, w_h, w_n, w_k, out_t, out_h, BM, BN, BK, EARLY,
    )  # fmt: skip


def multiply_by_head(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [T, H, I], weight [H, O, I] -> [T, H, O], accumulated in float32.

    The result is written to `out` if that is given, in out's dtype. Strides are free, but the last
    dim of x and out must be contiguous.
    """
    tokens, heads, dim_in = x.shape
    dim_out = weight.shape[1]
    if out is None:
        out = x.new_empty(tokens, heads, dim_out)

    max_tokens = MAX_TOKENS_OF_HEADS if heads > 1 else MAX_TOKENS_OF_ONE_WEIGHT
    if not use_triton(x) or tokens > max_tokens:
        return multiply_by_head_ref(x, weight, out)

    assert x.stride(2) == 1 and out.stride(2) == 1
    bm, bn, bk = choose_tile(tokens, heads, dim_in, dim_out)
    multiply_by_head_kernel[(triton.cdiv(dim_out, bn), heads, triton.cdiv(tokens, bm))](
        x, weight, out,
        tokens, dim_out, dim_in,
        *x.stride()[:2], *weight.stride(), *out.stride()[:2],
        BM=bm, BN=bn, BK=bk, num_warps=choose_num_warps(bn, bk), **launch_early(),
    )  # fmt: skip
    return out


@triton.jit
def multiply_normed_kernel(
    x, norm_weight, weight, out,
    dim_out, dim_in, eps, w_n,
    BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program norms all of x, which is one token, and computes BN outputs."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    in_row = k < dim_in
    weight_rows = weight + (n % dim_out).to(tl.int64)[:, None] * w_n

    # Both weights are loaded while the kernel before this one may still be running.
    w = tl.load(weight_rows + k[None, :], mask=in_row[None, :], other=0.0)
    scale = tl.load(norm_weight + k, mask=in_row, other=0.0).to(tl.float32)
    wait_for_previous(EARLY)

    row = tl.load(x + k, mask=in_row, other=0.0).to(tl.float32)
    normed = norm_row(row, scale, dim_in, eps, x).to(tl.float32)
    acc = tl.sum(w.to(tl.float32) * normed[None, :], 1)
    tl.store(out + n, acc.to(out.dtype.element_ty), mask=n < dim_out)


def multiply_normed_row(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, out: Tensor
) -> None:
    """out [1, O] = rms_norm(x [1, I]) @ weight [O, I].T, for I up to MAX_NORMED.

    On GPUs only. x, norm_weight [I] and out are contiguous, weight is contiguous in I.
    """
    dim_out, dim_in = weight.shape
    assert dim_in <= MAX_NORMED and weight.stride(1) == 1
    assert len(x) == 1 and x.stride(1) == 1 and out.stride(1) == 1
    bk = triton.next_power_of_2(dim_in)
    bn = max(4, 4096 // bk)
    multiply_normed_kernel[(triton.cdiv(dim_out, bn),)](
        x, norm_weight, weight, out,
        dim_out, dim_in, eps, weight.stride(0),
        BN=bn, BK=bk, num_warps=choose_num_warps(bn, bk), **launch_early(),
    )  # fmt: skip


def choose_tile(tokens: int, heads: int, dim_in: int, dim_out: int) -> tuple[int, int, int]:
    """Tokens, outputs and inputs of a tile: BM, BN, BK."""
    if tokens <= 1:
        # All weights are asked for at once, by programs that are resident together.
        max_bk = 2048 if heads * dim_out <= 2560 else 1024
        bk = min(triton.next_power_of_2(dim_in), max_bk)
        bn = max(4, 4096 // bk)
        return 1, bn, bk

    bk = max(16, min(triton.next_power_of_2(dim_in), 512))
    bn = 64 if bk <= 128 else 16
    bm = 16 if tokens <= 16 else 32
    return bm, bn, bk


def choose_num_warps(bn: int, bk: int) -> int:
    return 2 if bn * bk <= 4096 else 4
