"""What the checkpoint is: config.json of a DeepSeek-V2 model, checked. Read `request.py` next."""

import json
import math
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from minidcp.config import require

# Values of config.json that change what a model computes, the default first.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("softmax", None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "topk_method": ("greedy", "group_limited_greedy", None),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; `factor` 1.0 is plain RoPE, anything above is YaRN (arXiv:2309.00071)."""

    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def attention_mscale(self) -> float:
        """m(factor, mscale_all_dim) with m(f, s) = 0.1 s ln f + 1, as in DeepSeek-V2's modeling code."""
        return 1.0 + 0.1 * self.mscale_all_dim * math.log(max(self.factor, 1.0))

    def rotation_mscale(self) -> float:
        """What cos and sin are multiplied by: m(factor, mscale) / m(factor, mscale_all_dim), 1.0 on the hub."""
        return (1.0 + 0.1 * self.mscale * math.log(max(self.factor, 1.0))) / self.attention_mscale()


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
    q_lora_rank: int | None = None
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0  # every layer is dense
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
    rope: RopeConfig = field(default_factory=RopeConfig, metadata={"own": True})
    eos_token_ids: tuple[int, ...] = field(default=(), metadata={"own": True})

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one cached token: the latent vector and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return float(self.qk_head_dim**-0.5 * self.rope.attention_mscale() ** 2)

    def is_moe_layer(self, layer: int) -> bool:
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @classmethod
    def from_hf(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json` (and `generation_config.json`) of a checkpoint directory, in either dialect: the hub's
        (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of transformers 5 (`rope_parameters`, `dtype`). Raises
        ValueError for another model, or a value this engine does not support."""
        file, generation = Path(path) / "config.json", Path(path) / "generation_config.json"
        hf = read_object(file)
        if generation.exists():
            # Hugging Face's generate() takes the end-of-sequence tokens from here.
            hf |= {k: v for k, v in read_object(generation).items() if k == "eos_token_id"}
        return cls.from_dict(hf, str(file))

    @classmethod
    def from_dict(cls, hf: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """As `from_hf`, from the parsed JSON; `source` names it in errors."""
        kind = hf.get("model_type")
        require(kind == "deepseek_v2", f"{source}: model_type is {kind!r}; this engine runs 'deepseek_v2' only")
        for name, supported in SUPPORTED.items():
            value, possible = hf.get(name, supported[0]), ", ".join(map(repr, supported))
            require(value in supported, f"{source}: {name} {value!r} is not supported; supported: {possible}")
        values = {f.name: read_field(f, hf, source) for f in fields(cls) if not f.metadata}
        if hf.get("topk_method") != "group_limited_greedy":
            values |= {"n_group": 1, "topk_group": 1}
        eos = hf.get("eos_token_id")
        eos = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        config = cls(**values, rope=read_rope(hf, source), eos_token_ids=eos)
        config.check(source)
        return config

    def check(self, source: str) -> None:
        require(self.qk_rope_head_dim % 2 == 0, f"{source}: qk_rope_head_dim {self.qk_rope_head_dim} is odd")
        if self.n_routed_experts == 0:
            return
        top_k, experts, groups, chosen = self.num_experts_per_tok, self.n_routed_experts, self.n_group, self.topk_group
        require(self.moe_intermediate_size > 0, f"{source}: moe_intermediate_size is missing")
        require(experts % groups == 0, f"{source}: n_group {groups} does not divide n_routed_experts {experts}")
        reachable = chosen * experts // groups
        of = f"{reachable} experts in topk_group {chosen} of n_group {groups} groups"
        ok = 1 <= top_k <= reachable and chosen <= groups
        require(ok, f"{source}: num_experts_per_tok {top_k} of {of} cannot be chosen")


def read_field(f: Field[Any], hf: dict[str, Any], source: str) -> Any:
    """The value of one of ModelConfig's fields, as config.json has it or by default."""
    value = hf.get(f.name)
    if value is None:
        require(f.default is not MISSING, f"{source}: {f.name} is missing")
        return f.default
    kind = type(f.default) if isinstance(f.default, bool | float) else int
    least = 1 if kind is int and f.default != 0 else 0
    ok = isinstance(value, (int, float) if kind is float else int) and value >= least
    require(ok, f"{source}: {f.name} is {value!r}; expected a {kind.__name__} of at least {least}")
    return kind(value)


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
    """The rotary parameters of either dialect; an unknown kind of scaling is refused by name."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    require(isinstance(rope, dict), f"{source}: rope scaling is {rope!r}; expected an object")

    def number(name: str, default: float) -> float:
        value = default if rope.get(name) is None else rope[name]
        require(isinstance(value, int | float), f"{source}: rope {name} is {value!r}; expected a number")
        return float(value)

    theta = number("rope_theta", hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    require(kind in ("default", "yarn"), f"{source}: rope type {kind!r} is not supported; supported: yarn, default")
    if kind == "default":
        return RopeConfig(theta=theta)
    require(rope.get("factor") is not None, f"{source}: rope scaling of type yarn needs a factor")
    original = int(number("original_max_position_embeddings", hf.get("max_position_embeddings") or 4096))
    names = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    numbers = {name: number(name, getattr(RopeConfig, name)) for name in names}
    return RopeConfig(theta=theta, original_max_position=original, **numbers)
