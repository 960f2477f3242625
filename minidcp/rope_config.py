"""Rotary embedding: what config.json says about it, in any of its dialects, checked. The angles are
computed in `models/rope.py`. Next: `request.py`."""

import logging
import math
import sys
from dataclasses import dataclass, replace
from typing import Any

from minidcp.config import require

logger = logging.getLogger("minidcp")

# What rope_scaling (rope_parameters) may have. Any other key could change results.
ROPE_KEYS = (
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. Factor 1.0 is plain RoPE, anything above is YaRN (arXiv:2309.00071)."""

    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None  # instead of what follows from the two mscales
    truncate: bool = True  # the ramp between kept and stretched wavelengths has whole ends

    def attention_mscale(self) -> float:
        """The softmax scale is multiplied by the square of this: m(factor, mscale_all_dim).

        m(f, s) = 0.1 s ln f + 1, as in DeepSeek-V2's modeling code.
        """
        return 1.0 + 0.1 * self.mscale_all_dim * math.log(max(self.factor, 1.0))

    def rotation_mscale(self) -> float:
        """Cos and sin are multiplied by this: m(factor, mscale) / m(factor, mscale_all_dim).

        It is 1.0 for the checkpoints on the hub.
        """
        if self.attention_factor is not None:
            return self.attention_factor
        mscale = 1.0 + 0.1 * self.mscale * math.log(max(self.factor, 1.0))
        return mscale / self.attention_mscale()


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number: Python reads NaN, infinity and huge integers from JSON."""
    return (is_int(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def read_rope(hf: dict[str, Any], max_position: int, source: str) -> RopeConfig:
    """The rotary parameters of either dialect, for a model of `max_position` positions.

    If config.json has both, rope_scaling counts, as in transformers. An unknown type of scaling and
    an unknown parameter are refused by name.
    """
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(name) or {}
    where = f"{source}: {name}"
    require(isinstance(rope, dict), f"{where} is {rope!r}; expected an object")

    rope_type = rope.get("rope_type") or rope.get("type")
    require(
        rope_type is not None or rope.get("factor") is None,
        f"{where} has a factor, but no rope type; supported: yarn, default (no scaling)",
    )
    require(
        rope_type in ("default", "yarn", None),
        f"{where}: rope type {rope_type!r} is not supported; supported: yarn, default",
    )
    check_rope_keys(rope, where)

    theta = rope.get("rope_theta") or hf.get("rope_theta") or RopeConfig.theta
    require(
        is_number(theta) and theta > 1,
        f"{source}: rope_theta is {theta!r}; expected a number above 1",
    )
    plain = RopeConfig(theta=float(theta))
    if rope_type != "yarn":
        return plain

    # A value outside of the object counts more, as in transformers.
    outside = hf.get("original_max_position_embeddings")
    if outside is not None:
        rope = {**rope, "original_max_position_embeddings": outside}
    return read_yarn(plain, rope, max_position, where)


def check_rope_keys(rope: dict[str, Any], where: str) -> None:
    """Raise ValueError if there is a parameter that is not obeyed here."""
    for key, value in rope.items():
        require(
            key in ROPE_KEYS or value is None,
            f"{where} has {key} {value!r}, which is not supported; "
            f"supported: {', '.join(ROPE_KEYS)}",
        )
    rotated_share = rope.get("partial_rotary_factor")
    require(
        rotated_share in (1, None),
        f"{where} has partial_rotary_factor {rotated_share!r}; supported: 1",
    )


def read_yarn(plain: RopeConfig, rope: dict[str, Any], max_position: int, where: str) -> RopeConfig:
    """`plain` with YaRN's parameters, and the defaults that transformers has for them."""

    def read_number(name: str, default: float, above: float = -math.inf) -> float:
        value = rope.get(name)
        if value is None:
            value = default
        expected = "a number" if above == -math.inf else f"a number above {above}"
        require(
            is_number(value) and value > above,
            f"{where}: {name} is {value!r}; expected {expected}",
        )
        return float(value)

    require(rope.get("factor") is not None, f"{where}: scaling of type yarn needs a factor")
    factor = read_number("factor", RopeConfig.factor)
    require(factor >= 1, f"{where}: factor is {factor}; expected a number of at least 1")

    original = read_number("original_max_position_embeddings", max_position, above=0)
    require(
        original.is_integer(),
        f"{where}: original_max_position_embeddings is {original}; expected an integer",
    )

    truncate = rope.get("truncate", True)
    require(
        isinstance(truncate, bool), f"{where}: truncate is {truncate!r}; expected true or false"
    )
    config = replace(
        plain,
        factor=factor,
        original_max_position=int(original),
        beta_fast=read_number("beta_fast", RopeConfig.beta_fast, above=0),
        beta_slow=read_number("beta_slow", RopeConfig.beta_slow, above=0),
        mscale=read_number("mscale", RopeConfig.mscale),
        mscale_all_dim=read_number("mscale_all_dim", RopeConfig.mscale_all_dim),
        truncate=truncate,
    )
    if rope.get("attention_factor") is not None:
        attention_factor = read_number("attention_factor", 1.0, above=0)
        return replace(config, attention_factor=attention_factor)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return config
    return ignore_single_mscale(config, where)


def ignore_single_mscale(config: RopeConfig, where: str) -> RopeConfig:
    """Unless both mscales are given, transformers scales cos and sin as if there were none.

    DeepSeek's own code uses the one that is given. Where the two differ, this is said.
    """
    attention_factor = 1.0 + 0.1 * math.log(config.factor)
    original = config.rotation_mscale()
    if math.isclose(attention_factor, original):
        return config
    logger.warning(
        f"{where} does not give both mscale and mscale_all_dim: cos and sin are multiplied by "
        f"{attention_factor:.4f}, as in transformers; in DeepSeek's own code by {original:.4f}. "
        "Set attention_factor to choose."
    )
    return replace(config, attention_factor=attention_factor)
