"""Triton, or a stand-in where it is not installed, as on macOS. The stand-in lets kernels be
defined, so that their definitions in torch can be used. To launch a kernel is an error.

Files with a function for CPUs import Triton from here. Those for GPUs only import it themselves."""

from types import SimpleNamespace
from typing import Any, NoReturn

__all__ = ["HAS_TRITON", "TensorDescriptor", "fail_without_triton", "tl", "triton"]


def fail_without_triton(what: str) -> NoReturn:
    raise RuntimeError(f"{what} needs Triton, which is not installed: pip install triton")


class MissingKernel:
    """What `triton.jit` makes of a kernel if there is no Triton."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: object) -> NoReturn:
        fail_without_triton(f"the kernel {self.name}")


def define_missing_kernel(function: Any = None, **options: object) -> Any:
    """In place of `triton.jit`, which is used with and without options."""
    return define_missing_kernel if function is None else MissingKernel(function.__name__)


class Constant:
    """In place of `tl.constexpr`."""

    def __init__(self, value: object) -> None:
        self.value = value


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise  # Triton is there, but broken
    triton = SimpleNamespace(jit=define_missing_kernel)
    tl = SimpleNamespace(constexpr=Constant)
    TensorDescriptor = None
    HAS_TRITON = False
