"""The experts of a layer: down(silu(gate(x)) · up(x)) for every token and each expert it chose.

`route.py` chooses the experts, `align.py` groups the choices into blocks, `tiles.py` says how the
work is cut. The products are in `grouped.py`, `grouped_hopper.py`, `grouped_fp8.py` and
`vector_fp8.py`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous
from minidcp.kernels.align import Blocks, align, gather_rows
from minidcp.kernels.compiler import tl, triton
from minidcp.kernels.fp8 import (
    E4M3,
    Activations,
    Fp8Stack,
    Fp8Tensor,
    Quantized,
    Stack,
    quantize,
    quantize_ref,
    widen,
)
from minidcp.kernels.grouped import can_copy_boxes, multiply_blocks
from minidcp.kernels.grouped_fp8 import multiply_fp8_blocks, multiply_gated
from minidcp.kernels.norm import sum_scaled_ref
from minidcp.kernels.tiles import choose_tiles
from minidcp.kernels.vector_fp8 import multiply_vector


class ExpertOutputs(NamedTuple):
    """The outputs of each token's experts, not yet added up: the layer's output is their weighted
    sum, which `rms_norm` can do on the way.

    Attributes:
        values: [T, K, hidden].
        weights: [T, K] float32.
    """

    values: Tensor
    weights: Tensor

    def sum(self, out: Tensor | None = None) -> Tensor:
        """[T, hidden], added in float32 and in the order of a token's experts.

        It is written to `out` if that is given.
        """
        tokens, top_k, hidden = self.values.shape
        if out is None:
            out = self.values.new_empty(tokens, hidden)
        if not use_triton(self.values):
            return out.copy_(sum_scaled_ref(self.values, self.weights))
        sum_experts_kernel[tokens, triton.cdiv(hidden, 1024)](
            self.values, self.weights, out, hidden, TOP_K=top_k, BN=1024, **launch_early()
        )
        return out


def run_experts_ref(
    x: Activations, gate_up: Stack, down: Stack, weights: Tensor, ids: Tensor
) -> ExpertOutputs:
    tokens, top_k = ids.shape
    x = widen(x)
    is_fp8 = isinstance(down, Fp8Stack)
    inputs = quantize_ref(x).dequantize() if is_fp8 else x

    # Choices sorted by expert; those of expert e end at ends[e].
    expert, choice = ids.flatten().sort(stable=True)
    experts = torch.arange(down.shape[0], device=x.device)
    ends = torch.searchsorted(expert, experts, right=True).to(torch.int32)

    gate, up = F.grouped_mm(inputs[choice // top_k], dequantize(gate_up).mT, offs=ends).chunk(2, -1)
    h = F.silu(gate) * up
    if is_fp8:
        h = quantize_ref(h).dequantize()
    out = F.grouped_mm(h, dequantize(down).mT, offs=ends).to(x.dtype)
    values = torch.empty_like(out).index_copy_(0, choice, out)
    return ExpertOutputs(values.view(tokens, top_k, -1), weights)


def dequantize(weight: Stack) -> Tensor:
    return weight.dequantize() if isinstance(weight, Fp8Stack) else weight


@triton.jit
def sum_experts_kernel(
    values, weights, out, hidden, TOP_K: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr
):
    """One program adds BN columns of one token's outputs, in float32 and in the experts' order."""
    wait_for_previous(EARLY)
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BN], tl.float32)
    for i in tl.static_range(TOP_K):
        value_row = values + (t * TOP_K + i) * hidden
        value = tl.load(value_row + n, mask=n < hidden, other=0.0).to(tl.float32)
        acc += value * tl.load(weights + t * TOP_K + i)
    tl.store(out + t * hidden + n, acc.to(out.dtype.element_ty), mask=n < hidden)


def run_experts(
    x: Activations, gate_up: Stack, down: Stack, weights: Tensor, ids: Tensor
) -> ExpertOutputs:
    """down(silu(gate(x[t])) · up(x[t])) of each token t and expert ids[t, i].

    Args:
        x: [T, hidden], T > 0. x, gate_up and down are contiguous. They have the same dtype, unless
            the weights are in FP8.
        gate_up: [E, 2 I, hidden], first the rows of gate and then those of up.
        down: [E, hidden, I].
        weights: [T, K] float32, for the sum of a token's outputs.
        ids: [T, K] int32. Shared experts are like all others here; see `route`.
    """
    if not use_triton(widen(x)):
        return run_experts_ref(x, gate_up, down, weights, ids)

    if isinstance(gate_up, Fp8Stack):
        assert isinstance(down, Fp8Stack)
        values = run_experts_in_fp8(x, gate_up, down, ids)
    else:
        assert isinstance(down, Tensor)
        values = run_experts_in_bf16(widen(x), gate_up, down, ids)
    return ExpertOutputs(values.view(*ids.shape, -1), weights)


def run_experts_in_bf16(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor) -> Tensor:
    """[T · K, hidden]. Other 16 or 32 bit formats will do as well."""
    tokens, top_k = ids.shape
    num_experts, hidden, inter = down.shape
    tiles = choose_tiles(tokens, num_experts, top_k, hidden, inter, x.element_size())
    sort = tiles.sort and can_copy_boxes(gate_up) and can_copy_boxes(down)
    blocks = align(ids, num_experts, tiles.bm, sort)

    rows = x
    if blocks.is_sorted and not tiles.gate_up.gathers:
        rows = gather_rows(x, blocks)
    h = multiply_blocks(rows, gate_up, blocks, tiles.gate_up, gated=True)
    del rows  # so that its memory can become the result's: they are what prompts need most of
    return multiply_blocks(h, down, blocks, tiles.down, gated=False)


def run_experts_in_fp8(x: Activations, gate_up: Fp8Stack, down: Fp8Stack, ids: Tensor) -> Tensor:
    """[T · K, hidden]."""
    tokens, top_k = ids.shape
    num_experts, hidden, inter = down.shape
    tiles = choose_tiles(tokens, num_experts, top_k, hidden, inter, itemsize=1)
    can_sort = can_copy_boxes(gate_up.values) and can_copy_boxes(down.values)
    blocks = align(ids, num_experts, tiles.bm, tiles.sort and can_sort)

    wide_x = widen(x)
    if blocks.is_direct:
        out = wide_x.new_empty(blocks.num_choices, hidden)
        # h is not rounded twice: it is quantised on the way to its product.
        wide_h = torch.empty(blocks.num_choices, inter, dtype=torch.float32, device=out.device)
        inputs = x.fp8 if isinstance(x, Quantized) else wide_x
        multiply_vector(inputs, gate_up, blocks, tiles.gate_up, wide_h, gated=True)
        multiply_vector(wide_h, down, blocks, tiles.down, out)
        return out

    rows = x.fp8 if isinstance(x, Quantized) else quantize(x)
    if blocks.is_sorted and not tiles.gate_up.gathers:
        rows = gather_fp8_rows(rows, blocks)
    h = multiply_gated(rows, gate_up, blocks, tiles.gate_up)
    del rows  # as above
    out = wide_x.new_empty(blocks.num_choices, hidden)
    multiply_fp8_blocks(h, down, blocks, tiles.down, out)
    return out


def gather_fp8_rows(rows: Fp8Tensor, blocks: Blocks) -> Fp8Tensor:
    """As `gather_rows`, four values at a time."""
    values = gather_rows(rows.values.view(torch.int32), blocks).view(E4M3)
    return Fp8Tensor(values, gather_rows(rows.scales.mT, blocks).mT)
