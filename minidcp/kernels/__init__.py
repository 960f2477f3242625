"""Kernels: tensors in, tensors out. A file holds one operation: first its definition in torch (its
name ends in `_ref`), then the Triton kernel, then the function that chooses between the two.

This file has what all kernels share. A good file to read next is `norm.py`."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidcp.kernels.compiler import HAS_TRITON, fail_without_triton, tl, triton


def use_triton(x: Tensor) -> bool:
    """Whether kernels for x run in Triton: on GPUs, and on CPUs in Triton's interpreter (tests)."""
    if not HAS_TRITON:
        if x.is_cuda:
            fail_without_triton("a CUDA device")
        return False
    return bool(x.is_cuda or triton.knobs.runtime.interpret)


class DeviceProperties(NamedTuple):
    """What tile sizes depend on. The defaults are for Triton's interpreter."""

    capability: tuple[int, int] = (0, 0)  # (9, 0) is Hopper
    multiprocessors: int = 64
    shared_memory: int = 1 << 30  # bytes that one program can have


@cache
def get_device_properties() -> DeviceProperties:
    """Properties of the GPU that this process uses."""
    if not HAS_TRITON or triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return DeviceProperties()

    found: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return DeviceProperties(
        capability=(found.major, found.minor),
        multiprocessors=found.multi_processor_count,
        shared_memory=found.shared_memory_per_block_optin,
    )


@cache
def launch_early() -> dict[str, bool]:
    """Launch options of a kernel that begins with `wait_for_previous`.

    From Hopper on, such a kernel is launched while the kernel before it is still running (CUDA's
    programmatic dependent launch). This hides the launch latency in a chain of short kernels.
    """
    if get_device_properties().capability >= (9, 0):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Wait until all earlier kernels are done, then let the next kernel be launched.

    Only weights may be read before this call: everything else may still be being written.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
