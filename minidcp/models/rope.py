"""Rotary position embedding with YaRN scaling: the angles. `kernels/kv_store.py` rotates, in
halves. The checkpoint stores interleaved pairs instead; `layers.py` reorders the projections' rows
when they are loaded, which leaves all scores the same, bit for bit."""

import math

import torch
from torch import Tensor

from minidcp.rope_config import RopeConfig


def inverse_frequencies(config: RopeConfig, dim: int) -> Tensor:
    """[dim / 2] float32, with YaRN as in DeepSeek-V2's modeling code.

    Source: arXiv:2309.00071, §3.2, "NTK-by-parts". A wavelength that fits into
    `original_max_position` less than beta_slow times is stretched by `factor`. One that fits more
    than beta_fast times is kept. Between them is a linear ramp over the dims.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    plain = 1.0 / config.theta**exponents
    if config.factor <= 1:
        return plain

    def find_dim(rotations: float) -> float:
        """The dim whose wavelength fits into the original context that many times."""
        wavelength = config.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.theta))

    low = find_dim(config.beta_fast)
    high = find_dim(config.beta_slow)
    if config.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)
    stretched_share = ramp.clamp(0, 1)
    return plain / config.factor * stretched_share + plain * (1 - stretched_share)


def rotary_table(config: RopeConfig, dim: int, max_position: int) -> Tensor:
    """Cosines and then sines of every position: [max_position, dim] float32."""
    positions = torch.arange(max_position, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config, dim))
    return torch.cat([angles.cos(), angles.sin()], -1) * config.rotation_mscale()
