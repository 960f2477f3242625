"""The shape of the checkpoint's model: config.json of a DeepSeek-V2 model, checked.
Next: `request.py`."""

import json
import math
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from minidcp.config import require

# Options of config.json that change what a model computes, and the values supported here. The first
# is the default.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("softmax", None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "topk_method": ("greedy", "group_limited_greedy", None),
}


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

    def attention_mscale(self) -> float:
        """The softmax scale is multiplied by the square of this: m(factor, mscale_all_dim).

        m(f, s) = 0.1 s ln f + 1, as in DeepSeek-V2's modeling code.
        """
        return 1.0 + 0.1 * self.mscale_all_dim * math.log(max(self.factor, 1.0))

    def rotation_mscale(self) -> float:
        """Cos and sin are multiplied by this: m(factor, mscale) / m(factor, mscale_all_dim).

        It is 1.0 for the checkpoints on the hub.
        """
        mscale = 1.0 + 0.1 * self.mscale * math.log(max(self.factor, 1.0))
        return mscale / self.attention_mscale()


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a DeepSeek-V2 model. Field names follow Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    q_lora_rank: int | None = None  # None: q is projected from the hidden state at once
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0  # 0: every layer is dense
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048

    # Our own names: config.json spells these in several ways.
    rope: RopeConfig = field(default_factory=RopeConfig)
    eos_token_ids: tuple[int, ...] = ()

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of a cached token: the latent vector and the rotary key that all heads share."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return float(self.qk_head_dim**-0.5 * self.rope.attention_mscale() ** 2)

    def is_moe_layer(self, layer: int) -> bool:
        if self.n_routed_experts == 0 or layer < self.first_k_dense_replace:
            return False
        return layer % self.moe_layer_freq == 0

    @classmethod
    def from_hf(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json` (and `generation_config.json`) of a checkpoint directory.

        Both dialects are understood: the hub's (`rope_theta`, `rope_scaling`, `torch_dtype`) and
        that of transformers 5 (`rope_parameters`, `dtype`). Raises ValueError for another model, or
        for a value that this engine does not support.
        """
        file = Path(path) / "config.json"
        hf = read_object(file)

        generation_file = Path(path) / "generation_config.json"
        if generation_file.exists():
            # Hugging Face's generate() takes the end-of-sequence tokens from here.
            generation = read_object(generation_file)
            if "eos_token_id" in generation:
                hf["eos_token_id"] = generation["eos_token_id"]
        return cls.from_dict(hf, str(file))

    @classmethod
    def from_dict(cls, hf: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """As `from_hf`, from the parsed JSON. Errors call it `source`."""
        model_type = hf.get("model_type")
        require(
            model_type == "deepseek_v2",
            f"{source}: model_type is {model_type!r}; this engine runs 'deepseek_v2' only",
        )
        for name, supported in SUPPORTED.items():
            value = hf.get(name, supported[0])
            listed = ", ".join(repr(v) for v in supported)
            require(
                value in supported,
                f"{source}: {name} {value!r} is not supported; supported: {listed}",
            )

        values = {}
        for f in fields(cls):
            if f.name not in ("rope", "eos_token_ids"):  # which are read below
                values[f.name] = read_field(f, hf, source)
        if hf.get("topk_method") != "group_limited_greedy":
            values["n_group"] = 1
            values["topk_group"] = 1

        rope = read_rope(hf, source)
        config = cls(**values, rope=rope, eos_token_ids=read_eos_token_ids(hf))
        config.check(source)
        return config

    def check(self, source: str) -> None:
        """Raise ValueError if values do not fit each other."""
        rope_dim = self.qk_rope_head_dim
        require(rope_dim % 2 == 0, f"{source}: qk_rope_head_dim {rope_dim} is odd")
        if self.n_routed_experts > 0:
            self.check_experts(source)

    def check_experts(self, source: str) -> None:
        require(self.moe_intermediate_size > 0, f"{source}: moe_intermediate_size is missing")

        num_experts = self.n_routed_experts
        num_groups = self.n_group
        require(
            num_experts % num_groups == 0,
            f"{source}: n_group {num_groups} does not divide n_routed_experts {num_experts}",
        )

        # Experts are chosen within the best `topk_group` groups only.
        top_k = self.num_experts_per_tok
        num_reachable = self.topk_group * num_experts // num_groups
        require(
            1 <= top_k <= num_reachable and self.topk_group <= num_groups,
            f"{source}: num_experts_per_tok {top_k} of {num_reachable} experts in "
            f"topk_group {self.topk_group} of n_group {num_groups} groups cannot be chosen",
        )


def read_field(f: Field[Any], hf: dict[str, Any], source: str) -> Any:
    """The value of a field of ModelConfig: from config.json, else its default."""
    value = hf.get(f.name)
    if value is None:
        require(f.default is not MISSING, f"{source}: {f.name} is missing")
        return f.default

    # The type is the default's; a field without a default, or None as default, is an int.
    kind = type(f.default) if isinstance(f.default, bool | float) else int
    # Counts and widths are positive, except where a default of 0 means that the model has none.
    minimum = 1 if kind is int and f.default != 0 else 0

    has_kind = isinstance(value, int) or (kind is float and isinstance(value, float))
    require(
        has_kind and value >= minimum,
        f"{source}: {f.name} is {value!r}; expected a {kind.__name__} of at least {minimum}",
    )
    return kind(value)


def read_eos_token_ids(hf: dict[str, Any]) -> tuple[int, ...]:
    """The end-of-sequence tokens: config.json has one, a list, or none."""
    eos = hf.get("eos_token_id")
    if eos is None:
        return ()
    if isinstance(eos, list):
        return tuple(eos)
    return (eos,)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint."""
    require(file.exists(), f"{file}: no such file; a checkpoint directory has a {file.name}")
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    require(isinstance(content, dict), f"{file}: must hold a JSON object")
    return dict(content)


def read_rope(hf: dict[str, Any], source: str) -> RopeConfig:
    """The rotary parameters of either dialect. An unknown type of scaling is refused by name."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    require(isinstance(rope, dict), f"{source}: rope scaling is {rope!r}; expected an object")

    def read_number(name: str, default: float) -> float:
        value = rope.get(name)
        if value is None:
            value = default
        is_number = isinstance(value, int | float)
        require(is_number, f"{source}: rope {name} is {value!r}; expected a number")
        return float(value)

    theta = read_number("rope_theta", hf.get("rope_theta") or RopeConfig.theta)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    require(
        rope_type in ("default", "yarn"),
        f"{source}: rope type {rope_type!r} is not supported; supported: yarn, default",
    )
    if rope_type == "default":
        return RopeConfig(theta=theta)

    require(rope.get("factor") is not None, f"{source}: rope scaling of type yarn needs a factor")
    model_positions = hf.get("max_position_embeddings") or RopeConfig.original_max_position
    original = read_number("original_max_position_embeddings", model_positions)
    return RopeConfig(
        theta=theta,
        factor=read_number("factor", RopeConfig.factor),
        original_max_position=int(original),
        beta_fast=read_number("beta_fast", RopeConfig.beta_fast),
        beta_slow=read_number("beta_slow", RopeConfig.beta_slow),
        mscale=read_number("mscale", RopeConfig.mscale),
        mscale_all_dim=read_number("mscale_all_dim", RopeConfig.mscale_all_dim),
    )
