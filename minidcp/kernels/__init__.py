"""Kernels: tensors in, tensors out. Each is in Triton and, under a name that ends in _ref, in torch."""

import triton
from torch import Tensor


def use_triton(x: Tensor) -> bool:
    """Whether x's kernels are Triton's: on GPUs, and on CPUs where Triton's interpreter is on, for tests."""
    return bool(x.is_cuda or triton.knobs.runtime.interpret)
