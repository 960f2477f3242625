"""The latent KV cache of one rank: the tensors behind the block ids. MLA stores one vector per token that all heads
share: the normed latent and the rotated key part. Which token lies where is `interleave.py`'s."""

import math

import numpy as np
import torch
from torch import Tensor


def make_latent_cache(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`shape` is [layers, num_blocks, block_size, latent_dim]. Zeroed once, because attention kernels may read (and
    mask) the unused slots of a request's last block: whatever memory held before could be NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)  # takes memory only where something is written
    return torch.from_numpy(memory).view(dtype).view(shape)
