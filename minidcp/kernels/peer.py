"""Reading the same place in every peer's memory: what collectives over NVLink memory consist of.

`parallel/symmetric.py` says when it is safe to read. No torch twin: a CPU has no peer memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


def read_peers(pointers: Tensor, offset: int, count: int, out: Tensor) -> None:
    """out [N, count] = elements [offset, offset + count) of every peer's buffer.

    Args:
        pointers: [N] int64, the buffers' addresses, elements of out's dtype.
    """
    peers = pointers.shape[0]
    read_kernel[(triton.cdiv(count, BLOCK), peers)](pointers, out, offset, count, BLOCK_N=BLOCK)


def sum_peers(pointers: Tensor, offset: int, count: int, out: Tensor) -> None:
    """out [count] = the sum over the peers, in order and in float32: the same bits on every rank."""
    block = 1024 if count <= 1 << 20 else BLOCK
    sum_kernel[(triton.cdiv(count, block),)](
        pointers, out, offset, count, PEERS=pointers.shape[0], BLOCK_N=block
    )


@triton.jit
def read_kernel(pointers, out, offset, count, BLOCK_N: tl.constexpr):
    peer = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.load(pointers + peer).to(tl.pointer_type(out.dtype.element_ty))
    value = tl.load(source + offset + i, mask=i < count)
    tl.store(out + peer * count + i, value, mask=i < count)


@triton.jit
def sum_kernel(pointers, out, offset, count, PEERS: tl.constexpr, BLOCK_N: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for peer in tl.static_range(PEERS):
        source = tl.load(pointers + peer).to(tl.pointer_type(out.dtype.element_ty))
        total += tl.load(source + offset + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < count)


def device_pointers(addresses: list[int], device: torch.device) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)
