"""Rotary position embedding with YaRN scaling: the angles. `kernels/kv_store.py` rotates, in halves. The checkpoint
stores interleaved pairs; `layers.py` reorders the projections' rows at load: the scores are the same, bit for bit."""

import math

import torch
from torch import Tensor

from minidcp.model_config import RopeConfig


def inverse_frequencies(config: RopeConfig, dim: int) -> Tensor:
    """[dim / 2] float32. YaRN as in DeepSeek-V2's modeling code (arXiv:2309.00071, §3.2 "NTK-by-parts"): wavelengths
    that fit `original_max_position` less than beta_slow times are stretched by `factor`, those that fit more than
    beta_fast times are kept, with a linear ramp over the dims between."""
    plain = 1.0 / config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.factor <= 1:
        return plain

    def dim_of_rotations(rotations: float) -> float:
        wavelength = config.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.theta))

    low = max(math.floor(dim_of_rotations(config.beta_fast)), 0)
    high = min(math.ceil(dim_of_rotations(config.beta_slow)), dim - 1)
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / config.factor * stretched + plain * (1 - stretched)


def rotary_table(config: RopeConfig, dim: int, max_position: int) -> Tensor:
    """cos and sin of every position: [max_position, dim] float32, halves side by side."""
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inverse_frequencies(config, dim))
    return torch.cat([angles.cos(), angles.sin()], -1) * config.rotation_mscale()
