"""Kernels: tensors in, tensors out. Each is in Triton and, under a name that ends in _ref, in torch."""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


def use_triton(x: Tensor) -> bool:
    """Whether x's kernels are Triton's: on GPUs, and on CPUs where Triton's interpreter is on, for tests."""
    return bool(x.is_cuda or triton.knobs.runtime.interpret)


class GPU(NamedTuple):
    """What kernels are fitted to; by default that of Triton's interpreter."""

    capability: tuple[int, int] = (0, 0)  # (9, 0) is Hopper
    multiprocessors: int = 64
    shared_memory: int = 1 << 30  # bytes that one program can have


@cache
def gpu() -> GPU:
    """The one that this process uses."""
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return GPU()
    found: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return GPU((found.major, found.minor), found.multi_processor_count, found.shared_memory_per_block_optin)


@cache
def launch_early() -> dict[str, bool]:
    """Arguments of a kernel that begins with `wait_for_previous`: from Hopper on it is launched while the kernel before
    it still runs (CUDA's programmatic dependent launch), which hides a launch's latency in a chain of short kernels."""
    return {"EARLY": True, "launch_pdl": True} if gpu().capability >= (9, 0) else {"EARLY": False}


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Until all kernels before this one are done; before it, read only weights. From here the next may be launched."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
