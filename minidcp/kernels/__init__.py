"""Kernels: tensors in, tensors out. Each is in Triton and, under a name that ends in _ref, in torch."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


def use_triton(x: Tensor) -> bool:
    """Whether x's kernels are Triton's: on GPUs, and on CPUs where Triton's interpreter is on, for tests."""
    return bool(x.is_cuda or triton.knobs.runtime.interpret)


@cache
def launch_early() -> dict[str, bool]:
    """Arguments of a kernel that begins with `wait_for_previous`: from Hopper on it is launched while the kernel before
    it still runs (CUDA's programmatic dependent launch), which hides a launch's latency in a chain of short kernels."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if hopper and not triton.knobs.runtime.interpret else {"EARLY": False}


@cache
def shared_memory() -> int:
    """Bytes that one program can have."""
    if triton.knobs.runtime.interpret:
        return 1 << 30
    properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    return int(properties["max_shared_mem"])


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Until all kernels before this one are done; only weights may be read before it. The next kernel may be launched
    from here on."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
