"""Attention back-ends and the choice of one. The contract is in `base.py`."""

from __future__ import annotations

from minidcp.attention.base import AttentionBackend
from minidcp.attention.reference import ReferenceBackend

__all__ = ["AttentionBackend", "make_backend"]


def make_backend(name: str, softmax_scale: float) -> AttentionBackend:
    """The back-end for `--attention-backend name`; "auto" is the fastest that runs here."""
    assert name in ("auto", "reference")  # config.py has refused the others
    return ReferenceBackend(softmax_scale)
