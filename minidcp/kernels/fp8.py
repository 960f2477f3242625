"""Matrices in FP8: e4m3 values, with a scale for each group of up to 128 columns of a row.

Weights are stored so, and activations are quantised on the way to their product, as DeepSeek-V3
was trained (arXiv:2412.19437, §3.3). A value is worth values · scales. The products are in
`grouped_fp8.py`, `vector_fp8.py` and `dense.py`."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous
from minidcp.kernels.compiler import tl, triton

BLOCK = 128  # values of a row that share a scale; weights may have fewer
MIN_BLOCK = 32  # what tensor cores multiply at once
E4M3 = torch.float8_e4m3fn
E4M3_MAX = tl.constexpr(448.0)
TINY = tl.constexpr(1e-30)  # keeps the scale of zeros from being 0


@dataclass(frozen=True)
class Fp8Tensor:
    """A matrix in FP8.

    Attributes:
        values: [N, K] float8_e4m3fn.
        scales: [ceil(K / block), N] float32, transposed, so that a kernel reads those of many rows
            at once.
        block: how many values of a row share a scale: BLOCK, or a divisor of it.
    """

    values: Tensor
    scales: Tensor
    block: int = BLOCK

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __getitem__(self, rows: slice | Tensor) -> "Fp8Tensor":
        """Some rows. The scales are a copy, which begins where kernels can read it at once."""
        scales = self.scales[:, rows].clone(memory_format=torch.contiguous_format)
        return Fp8Tensor(self.values[rows], scales, self.block)

    def dequantize(self) -> Tensor:
        """[N, K] float32."""
        scales = self.scales.T.repeat_interleave(self.block, 1)
        return self.values.float() * scales[:, : self.values.shape[1]]


@dataclass(frozen=True)
class Fp8Stack:
    """Matrices [N, K] of one shape in FP8, one of each expert, as their products read them: a tile
    of rows and a block of columns is one piece of memory.

    Attributes:
        values: [E, K / block, N, block] float8_e4m3fn.
        scales: [E, K / block, N] float32.
    """

    values: Tensor
    scales: Tensor

    @property
    def block(self) -> int:
        return self.values.shape[3]

    @property
    def shape(self) -> torch.Size:
        """[E, N, K]."""
        num_experts, num_blocks, rows, block = self.values.shape
        return torch.Size((num_experts, rows, num_blocks * block))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self) -> Tensor:
        """[E, N, K] float32."""
        wide = self.values.float() * self.scales[..., None]
        return wide.transpose(1, 2).flatten(2)


Weight = Tensor | Fp8Tensor
Stack = Tensor | Fp8Stack


@dataclass(frozen=True)
class Quantized:
    """Activations as they are, and in FP8 for the products that want them so."""

    rows: Tensor
    fp8: Fp8Tensor

    def __getitem__(self, index: slice) -> "Quantized":
        if index.indices(len(self.rows)) == (0, len(self.rows), 1):
            return self  # of a step that only decodes, or only prefills
        return Quantized(self.rows[index], self.fp8[index])


Activations = Tensor | Quantized


def widen(x: Activations) -> Tensor:
    """The activations as they are."""
    return x.rows if isinstance(x, Quantized) else x


def join_rows(first: Weight, second: Weight) -> Weight:
    """The rows of two matrices below each other. Both are in FP8, or none."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    assert isinstance(first, Fp8Tensor) and isinstance(second, Fp8Tensor)
    assert first.block == second.block
    values = torch.cat([first.values.view(torch.uint8), second.values.view(torch.uint8)])
    scales = torch.cat([first.scales, second.scales], 1)
    return Fp8Tensor(values.view(E4M3), scales, first.block)


def allocate_stack(count: int, like: Weight) -> Stack:
    """Room for `count` matrices of one shape."""
    if isinstance(like, Tensor):
        return like.new_empty(count, *like.shape)
    rows, width = like.shape
    num_blocks = width // like.block
    assert width % like.block == 0
    values = like.values.new_empty(count, num_blocks, rows, like.block)
    return Fp8Stack(values, like.scales.new_empty(count, num_blocks, rows))


def put_into_stack(stack: Stack, index: int, matrix: Weight) -> None:
    if isinstance(stack, Tensor) and isinstance(matrix, Tensor):
        stack[index] = matrix
        return
    assert isinstance(stack, Fp8Stack) and isinstance(matrix, Fp8Tensor)
    assert stack.block == matrix.block
    stack.values[index] = matrix.values.unflatten(1, (-1, stack.block)).transpose(0, 1)
    stack.scales[index] = matrix.scales


def quantize_ref(x: Tensor, block: int = BLOCK) -> Fp8Tensor:
    rows, width = x.shape
    num_blocks = -(-width // block)
    padded = F.pad(x.float(), (0, num_blocks * block - width))
    by_block = padded.view(rows, num_blocks, block)
    scales = (by_block.abs().amax(-1) / E4M3_MAX.value).clamp(min=TINY.value)
    values = (by_block / scales[..., None]).flatten(1)[:, :width]
    return Fp8Tensor(values.to(E4M3).contiguous(), scales.T.contiguous(), block)


def quantize_weight(weight: Tensor, block: int = BLOCK) -> Fp8Tensor:
    """A matrix [N, K] in FP8. Its columns are a whole number of blocks, of up to `block`."""
    return quantize_ref(weight, find_block(weight.shape[1], block))


def find_block(width: int, block: int = BLOCK) -> int:
    """How many of `width` columns share a scale, if those of the checkpoint are `block`."""
    return math.gcd(width, block, BLOCK)


@triton.jit
def find_scale(x, axis: tl.constexpr):
    """What values along an axis are divided by, so that the largest becomes e4m3's largest."""
    return tl.maximum(tl.max(tl.abs(x), axis) / E4M3_MAX, TINY)


@triton.jit(do_not_specialize=["tokens"])
def quantize_kernel(
    x, values, scales,
    tokens, width, x_t,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program quantises ROWS blocks of one row."""
    wait_for_previous(EARLY)
    t = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = column < width
    part = tl.load(x + t * x_t + column, mask=mask, other=0.0).to(tl.float32)
    scale = find_scale(part, 1)
    tl.store(scales + block * tokens + t, scale, mask=block * BLOCK < width)
    part = (part / scale[:, None]).to(values.dtype.element_ty)
    tl.store(values + t * width + column, part, mask=mask)


def quantize(x: Tensor) -> Fp8Tensor:
    """Activations x [T, K], contiguous in K, in blocks of BLOCK."""
    if not use_triton(x):
        return quantize_ref(x)

    tokens, width = x.shape
    out = allocate_rows(tokens, width, x.device)
    num_blocks = len(out.scales)
    rows = min(16, triton.next_power_of_2(num_blocks))
    quantize_kernel[tokens, triton.cdiv(num_blocks, rows)](
        x, out.values, out.scales,
        tokens, width, x.stride(0),
        ROWS=rows, BLOCK=BLOCK, **launch_early(),
    )  # fmt: skip
    return out


def allocate_rows(count: int, width: int, device: torch.device) -> Fp8Tensor:
    """Room for activations."""
    values = torch.empty(count, width, dtype=E4M3, device=device)
    num_blocks = -(-width // BLOCK)
    scales = torch.empty(num_blocks, count, dtype=torch.float32, device=device)
    return Fp8Tensor(values, scales)
