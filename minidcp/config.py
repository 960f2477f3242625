"""What the user asked for and what the checkpoint is, checked before anything starts.

Every error that needs no machine to be found is raised here, as a ValueError that names its flag.
Nothing here touches a tensor. Read `request.py` next.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

BLOCK_SIZES = (1, 2, 4, 8, 16, 32)  # FA3 lets NaN of unused slots leak from larger blocks
CHOICES = {
    "dcp_comm_backend": ("auto", "p2p", "a2a", "ag_rs"),
    "attention_backend": ("auto", "fa3", "triton", "reference"),
    "comm": ("auto", "symmetric", "nccl", "gloo"),
    "load_format": ("auto", "dummy"),
    "exchange_policy": ("auto", "wide", "narrow"),
    "q_proj": ("sharded", "replicated"),
    "prefill_strategy": ("auto", "gather_kv", "gather_q"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
    "ranks": ("auto", "threads", "processes", "torchrun"),
}


def flag(name: str) -> str:
    """The command-line spelling of a config field: `tp_size` -> `--tp-size`."""
    return "--" + name.replace("_", "-")


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class ParallelConfig:
    """How `tp_size` ranks share a model, and how many of them share one KV cache.

    Ranks [g * dcp_size, (g + 1) * dcp_size) form DCP group g: together they hold one interleaved copy
    of the cache and attend with the heads of all of them.
    """

    tp_size: int = 1
    dcp_size: int = 1

    def __post_init__(self) -> None:
        require(self.tp_size >= 1, f"--tp-size {self.tp_size}: must be at least 1")
        require(self.dcp_size >= 1, f"--dcp-size {self.dcp_size}: must be at least 1")
        require(
            self.tp_size % self.dcp_size == 0,
            f"--dcp-size {self.dcp_size} must divide --tp-size {self.tp_size}; "
            f"possible: {divisors(self.tp_size)}",
        )

    def check_heads(self, num_heads: int) -> None:
        require(
            num_heads % self.tp_size == 0,
            f"--tp-size {self.tp_size} must divide the model's {num_heads} attention heads; "
            f"possible: {divisors(num_heads)}",
        )


@dataclass(frozen=True)
class EngineConfig:
    """Everything a user can choose; field names are the command-line flags with underscores.

    Raises:
        ValueError: a value is out of range; the message names the flag, the value and what would work.
    """

    model: str
    tp_size: int = 1
    dcp_size: int = 1
    dcp_comm_backend: str = "auto"
    attention_backend: str = "auto"
    comm: str = "auto"
    exchange_policy: str = "auto"
    narrow_threshold: int = 16  # rows from which "auto" exchanges narrow
    q_proj: str = "sharded"
    prefill_strategy: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    ranks: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    mixed_steps: bool = True
    prefix_cache: bool = True
    cuda_graph: bool = True
    load_format: str = "auto"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(EngineConfig).items():
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            ok = type(value) in kinds or (type(value) is int and float in kinds)
            require(ok, f"{flag(name)} {value!r}: must be a {kinds[0].__name__}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            require(value in choices, f"{flag(name)} {value!r}: must be one of {', '.join(choices)}")
        for name in (
            "narrow_threshold",
            "num_blocks",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{flag(name)} {value}: must be at least 1")
        require(
            self.block_size in BLOCK_SIZES,
            f"--block-size {self.block_size}: must be one of {', '.join(map(str, BLOCK_SIZES))}",
        )
        require(
            0 < self.gpu_memory_utilization <= 1,
            f"--gpu-memory-utilization {self.gpu_memory_utilization}: must be in (0, 1]",
        )
        require(
            self.max_num_batched_tokens is None or self.max_num_seqs <= self.max_num_batched_tokens,
            f"--max-num-batched-tokens {self.max_num_batched_tokens} must be at least "
            f"--max-num-seqs {self.max_num_seqs}: every running request decodes one token per step",
        )
        ParallelConfig(self.tp_size, self.dcp_size)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(self.tp_size, self.dcp_size)

    def exchanges_narrow(self, num_rows: int) -> bool:
        """Whether that many rows send raw q and have W_UV applied before the exchange.

        Narrow moves 3.4 times fewer bytes and multiplies for every head of the DCP group; from a batch
        of about 16 on that is the better trade.
        """
        if self.dcp_size == 1 or self.exchange_policy != "auto":
            return self.dcp_size > 1 and self.exchange_policy == "narrow"
        return self.needs_group_heads and num_rows >= self.narrow_threshold

    @property
    def replicates_q(self) -> bool:
        """Whether every rank computes the decode rows' q for all heads of its DCP group, and gathers none."""
        return self.dcp_size > 1 and self.q_proj == "replicated"

    @property
    def needs_group_heads(self) -> bool:
        """Whether W_UK and W_UV of all the DCP group's heads are ever used, and so must be held."""
        if self.dcp_size == 1 or self.replicates_q:
            return self.replicates_q
        auto = self.exchange_policy == "auto" and self.max_num_seqs >= self.narrow_threshold
        return auto or self.exchange_policy == "narrow"

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """As the constructor, but an unknown name is a ValueError that lists the known ones."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(kwargs) - set(known))
        require(not unknown, f"unknown option {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**kwargs)


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
        return yarn_mscale(self.factor, self.mscale_all_dim)

    def rotation_mscale(self) -> float:
        """What cos and sin are multiplied by; 1.0 for the configurations on the hub."""
        return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)


def yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a DeepSeek-V2 model. Field names follow Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int  # 0: every layer is dense
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense_replace: int
    moe_layer_freq: int
    rms_norm_eps: float
    attention_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one cached token: the latent vector and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        scale: float = self.qk_head_dim**-0.5 * self.rope.attention_mscale() ** 2
        return scale

    def is_moe_layer(self, layer: int) -> bool:
        return (
            self.n_routed_experts > 0
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @classmethod
    def from_hf(cls, path: str | Path) -> ModelConfig:
        """Read `config.json` (and `generation_config.json`) of a checkpoint directory.

        Both dialects are understood: the hub's (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of
        transformers 5 (`rope_parameters`, `dtype`).

        Raises:
            ValueError: not a DeepSeek-V2 configuration, or a value this engine does not support.
        """
        file = Path(path) / "config.json"
        hf = read_object(file)
        generation = Path(path) / "generation_config.json"
        if generation.exists():
            # Hugging Face's generate() takes the end-of-sequence tokens from here.
            hf |= {k: v for k, v in read_object(generation).items() if k == "eos_token_id"}
        return cls.from_dict(hf, str(file))

    @classmethod
    def from_dict(cls, hf: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """As `from_hf`, from the parsed JSON; `source` names it in errors."""
        require(
            hf.get("model_type") == "deepseek_v2",
            f"{source}: model_type is {hf.get('model_type')!r}; this engine runs 'deepseek_v2' only",
        )

        def read(name: str, *default: Any) -> Any:
            value = hf.get(name)
            if value is None:
                require(bool(default), f"{source}: {name} is missing")
                return default[0]
            kinds = (int, float) if default and isinstance(default[0], float) else (int,)
            least = 1 if kinds == (int,) and 0 not in default else 0  # False is 0, too
            require(
                isinstance(value, kinds) and value >= least,
                f"{source}: {name} is {value!r}; expected a {kinds[-1].__name__} of at least {least}",
            )
            return value

        def support(name: str, *supported: Any) -> None:
            value = hf.get(name, supported[0])
            require(
                value in supported,
                f"{source}: {name} {value!r} is not supported; supported: {', '.join(map(repr, supported))}",
            )

        support("hidden_act", "silu")
        support("scoring_func", "softmax", None)
        support("mlp_bias", False, None)
        support("quantization_config", None)
        support("topk_method", "greedy", "group_limited_greedy", None)
        grouped = hf.get("topk_method") == "group_limited_greedy"
        eos = hf.get("eos_token_id")
        config = cls(
            vocab_size=read("vocab_size"),
            hidden_size=read("hidden_size"),
            num_hidden_layers=read("num_hidden_layers"),
            num_attention_heads=read("num_attention_heads"),
            q_lora_rank=read("q_lora_rank", None),
            kv_lora_rank=read("kv_lora_rank"),
            qk_nope_head_dim=read("qk_nope_head_dim"),
            qk_rope_head_dim=read("qk_rope_head_dim"),
            v_head_dim=read("v_head_dim"),
            intermediate_size=read("intermediate_size"),
            moe_intermediate_size=read("moe_intermediate_size", 0),
            n_routed_experts=read("n_routed_experts", 0),
            n_shared_experts=read("n_shared_experts", 0),
            num_experts_per_tok=read("num_experts_per_tok", 0),
            n_group=read("n_group", 1) if grouped else 1,
            topk_group=read("topk_group", 1) if grouped else 1,
            norm_topk_prob=bool(read("norm_topk_prob", False)),
            routed_scaling_factor=float(read("routed_scaling_factor", 1.0)),
            first_k_dense_replace=read("first_k_dense_replace", 0),
            moe_layer_freq=read("moe_layer_freq", 1),
            rms_norm_eps=float(read("rms_norm_eps", 1e-6)),
            attention_bias=bool(read("attention_bias", False)),
            tie_word_embeddings=bool(read("tie_word_embeddings", False)),
            max_position_embeddings=read("max_position_embeddings", 2048),
            rope=read_rope(hf, source),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )
        config.check(source)
        return config

    def check(self, source: str) -> None:
        require(self.qk_rope_head_dim % 2 == 0, f"{source}: qk_rope_head_dim {self.qk_rope_head_dim} is odd")
        if self.n_routed_experts == 0:
            return
        top_k, groups = self.num_experts_per_tok, self.n_group
        require(self.moe_intermediate_size > 0, f"{source}: moe_intermediate_size is missing")
        require(
            self.n_routed_experts % groups == 0,
            f"{source}: n_group {groups} does not divide n_routed_experts {self.n_routed_experts}",
        )
        reachable = self.topk_group * self.n_routed_experts // groups
        require(
            1 <= top_k <= reachable and self.topk_group <= groups,
            f"{source}: num_experts_per_tok {top_k} of {reachable} experts in topk_group {self.topk_group} "
            f"of n_group {groups} groups cannot be chosen",
        )


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
    require(
        kind in ("default", "yarn"),
        f"{source}: rope type {kind!r} is not supported; supported: yarn, default",
    )
    if kind == "default":
        return RopeConfig(theta=theta)
    longest = hf.get("max_position_embeddings") or 4096
    require(rope.get("factor") is not None, f"{source}: rope scaling of type yarn needs a factor")
    return RopeConfig(
        theta=theta,
        factor=number("factor", 1.0),
        original_max_position=int(number("original_max_position_embeddings", longest)),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        mscale=number("mscale", 1.0),
        mscale_all_dim=number("mscale_all_dim", 0.0),
    )


def divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
