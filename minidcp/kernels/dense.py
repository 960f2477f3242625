"""Dense products, x @ weight.T: of weights in bf16 by `linear.py`, of those in FP8 here."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minidcp.kernels import get_device_properties, use_triton
from minidcp.kernels.align import one_expert
from minidcp.kernels.fp8 import (
    BLOCK,
    E4M3,
    Activations,
    Fp8Tensor,
    Quantized,
    Weight,
    quantize,
    quantize_ref,
    widen,
)
from minidcp.kernels.grouped_fp8 import multiply_fp8_blocks
from minidcp.kernels.linear import (
    MAX_NORMED,
    MAX_TOKENS_OF_ONE_WEIGHT,
    multiply_by_head,
    multiply_normed_row,
)
from minidcp.kernels.norm import rms_norm
from minidcp.kernels.tiles import choose_dense_tile
from minidcp.kernels.vector_fp8 import multiply_vector

ROWS_ALIGN = 4  # cuBLAS wants the scales of each block to begin at a multiple of 16 bytes


def multiply_fp8_ref(x: Tensor, weight: Fp8Tensor) -> Tensor:
    return F.linear(quantize_ref(x).dequantize(), weight.dequantize()).to(x.dtype)


def multiply(x: Activations, weight: Weight, out: Tensor | None = None) -> Tensor:
    """x [T, I] @ weight [O, I].T -> [T, O], written to `out` if that is given.

    The sums are in float32. With a weight in FP8, x is quantised and everything is contiguous.
    """
    rows = widen(x)
    if isinstance(weight, Tensor):
        one_head_out = None if out is None else out[:, None]
        return multiply_by_head(rows[:, None], weight[None], one_head_out)[:, 0]
    if not use_triton(rows):
        result = multiply_fp8_ref(rows, weight)
        return result if out is None else out.copy_(result)

    if out is None:
        out = rows.new_empty(len(rows), len(weight))
    tokens = len(rows)
    bm, tile = choose_dense_tile(tokens, weight.shape[1])
    blocks = one_expert(tokens, bm)
    if blocks.is_direct:
        inputs = x.fp8 if isinstance(x, Quantized) else rows.contiguous()
        multiply_vector(inputs, weight, blocks, tile, out)
        return out

    fp8 = x.fp8 if isinstance(x, Quantized) else quantize(rows)
    if can_use_cublas(weight, out):
        multiply_by_cublas(fp8, weight, out)
    else:
        multiply_fp8_blocks(fp8, weight, blocks, tile, out)
    return out


def norm_and_multiply(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, out: Tensor | None = None
) -> Tensor:
    """rms_norm(x [T, I]) @ weight [O, I].T -> [T, O], written to `out` if that is given.

    One token is normed by the product's kernel, each of whose programs reads all of x anyway.
    With a weight in FP8 that is not faster.
    """
    tokens, dim_in = x.shape
    is_short = tokens <= MAX_TOKENS_OF_ONE_WEIGHT and dim_in <= MAX_NORMED
    if isinstance(weight, Fp8Tensor) or not use_triton(x) or not is_short:
        normed, _ = rms_norm(x, norm_weight, eps, quantizes=isinstance(weight, Fp8Tensor))
        return multiply(normed, weight, out)

    if out is None:
        out = x.new_empty(tokens, len(weight))
    multiply_normed_row(x, norm_weight, eps, weight, out)
    return out


def can_use_cublas(weight: Fp8Tensor, out: Tensor) -> bool:
    """Whether cuBLAS has this product: with dims of 16 bytes."""
    dim_out, dim_in = weight.values.shape
    has_its_form = weight.block == BLOCK and out.dtype == torch.bfloat16
    return cublas_has_blocks() and has_its_form and dim_out % 16 == 0 and dim_in % 16 == 0


@cache
def cublas_has_blocks() -> bool:
    """Whether cuBLAS has scales for each row and BLOCK inputs: on Hopper, from CUDA 12.9 on."""
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    is_new = (int(major), int(minor)) >= (12, 9)
    return is_new and get_device_properties().capability == (9, 0)


def multiply_by_cublas(x: Fp8Tensor, weight: Fp8Tensor, out: Tensor) -> None:
    """Both sides have a scale for each row and BLOCK inputs."""
    tokens = len(x)
    missing = -tokens % ROWS_ALIGN
    values = x.values
    scales = x.scales
    if missing > 0:
        values = F.pad(values.view(torch.uint8), (0, 0, 0, missing)).view(E4M3)
        scales = F.pad(scales, (0, missing))
    operands = (values, weight.values.T, scales.T, weight.scales)
    if missing == 0:
        torch._scaled_mm(*operands, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch._scaled_mm(*operands, out_dtype=out.dtype)[:tokens])
