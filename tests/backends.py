"""The attention back-ends of a GPU, as parameters of tests."""

from __future__ import annotations

import importlib.util

import pytest

HAS_FLASHINFER = importlib.util.find_spec("flashinfer") is not None
NEEDS_FLASHINFER = pytest.mark.skipif(not HAS_FLASHINFER, reason="FlashInfer is not installed")
GPU_BACKENDS = ["fa3", pytest.param("flashinfer", marks=NEEDS_FLASHINFER), "triton"]
