"""Triton, or a stand-in where it is not installed, as on macOS. The stand-in lets kernels be
defined, so that their definitions in torch can be used. To launch a kernel is an error.

Files with a function for CPUs import Triton from here. Those for GPUs only import it themselves."""

from types import SimpleNamespace
from typing import Any, NoReturn

__all__ = [
    "HAS_TRITON",
    "GluonDescriptor",
    "TensorDescriptor",
    "fail_without_triton",
    "gl",
    "gluon",
    "hopper",
    "load_box",
    "load_pieces",
    "tl",
    "triton",
]


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
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
    from triton.tools.tensor_descriptor import TensorDescriptor

    # Triton 3.9 has the new names, 3.6 only the old ones.
    load_box = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
    pieces = hopper.async_copy
    load_pieces = getattr(pieces, "async_load", None) or pieces.async_copy_global_to_shared
    HAS_TRITON = True
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise  # Triton is there, but broken
    triton = SimpleNamespace(jit=define_missing_kernel)
    tl = SimpleNamespace(constexpr=Constant)
    gluon = triton
    gl = tl
    hopper = None
    load_box = None
    load_pieces = None
    TensorDescriptor = None
    GluonDescriptor = None
    HAS_TRITON = False
