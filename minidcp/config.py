"""What the user asked for and what the checkpoint is, checked before anything starts.

Every error that needs no machine to be found is raised here, as a ValueError that names its flag.
Nothing here touches a tensor. Read `request.py` next.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints


def option(default: Any, help: str, *aliases: str, least: int = 0) -> Any:
    """A field of EngineConfig: its default, what --help says of it, what users of other engines type for
    it, and its least value."""
    return field(default=default, metadata={"help": help, "aliases": aliases, "choices": (), "least": least})


def choice(help: str, *values: str | int, default: int | None = None) -> Any:
    """A field of EngineConfig that takes one of `values`, by default the first."""
    metadata = {"help": help, "aliases": (), "choices": values, "least": 0}
    return field(default=default or values[0], metadata=metadata)


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
    tp_size: int = option(1, "ranks that share the model", "--tensor-parallel-size", "-tp", least=1)
    dcp_size: int = option(
        1,
        "ranks that share one KV cache; divides --tp-size",
        "--decode-context-parallel-size",
        "-dcp",
        least=1,
    )
    dcp_comm_backend: str = choice("how partial attention is exchanged", "auto", "p2p", "a2a", "ag_rs")
    attention_backend: str = choice(
        "kernels; auto is fa3, else triton, and reference on a CPU", "auto", "fa3", "triton", "reference"
    )
    comm: str = choice(
        "collectives: symmetric memory (one node), nccl; on CPUs gloo", "auto", "symmetric", "nccl", "gloo"
    )
    exchange_policy: str = choice(
        "W_UK and W_UV behind the exchange, before it, or by batch size", "auto", "wide", "narrow"
    )
    narrow_threshold: int = option(16, "rows from which auto exchanges narrow", least=1)
    q_proj: str = choice("replicated: every rank has all q of its DCP group", "sharded", "replicated")
    prefill_strategy: str = choice(
        "how prefill sees its cached context; auto is what is faster", "auto", "gather_kv", "gather_q"
    )
    device: str = choice("where to run", "auto", "cpu", "cuda")
    dtype: str = choice("auto is bfloat16 on GPUs, float32 on CPUs", "auto", "float32", "bfloat16")
    ranks: str = choice(
        "auto is processes, or a thread for one rank on a CPU", "auto", "threads", "processes", "torchrun"
    )
    # FA3 lets NaN leak from the unused slots of larger blocks.
    block_size: int = choice("tokens per block and rank", 1, 2, 4, 8, 16, 32, default=16)
    num_blocks: int | None = option(
        None, "KV cache blocks; default: what memory allows", "--num-gpu-blocks-override", least=1
    )
    max_model_len: int | None = option(
        None, "longest prompt + completion in tokens; default: the model's", "--context-length", least=1
    )
    max_num_seqs: int = option(256, "requests that run at once", "--max-running-requests", least=1)
    max_num_batched_tokens: int | None = option(
        None, "tokens per step; longer prompts are computed in chunks", least=1
    )
    gpu_memory_utilization: float = option(0.9, "share of GPU memory to use", "--mem-fraction-static")
    mixed_steps: bool = option(True, "decode rows and prompt chunks in one step")
    prefix_cache: bool = option(True, "reuse the KV cache of equal prompt beginnings")
    cuda_graph: bool = option(True, "replay decode steps as CUDA graphs")
    load_format: str = choice("dummy: random weights, to measure with a config.json alone", "auto", "dummy")

    def __post_init__(self) -> None:
        for f, kinds in self.options():
            value, choices, least = getattr(self, f.name), f.metadata["choices"], f.metadata["least"]
            ok = type(value) in kinds or (type(value) is int and float in kinds)
            require(ok, f"{flag(f.name)} {value!r}: must be a {kinds[0].__name__}")
            require(
                not choices or value in choices,
                f"{flag(f.name)} {value!r}: must be one of {', '.join(map(str, choices))}",
            )
            require(
                not least or value is None or value >= least,
                f"{flag(f.name)} {value}: must be at least {least}",
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

    @classmethod
    def options(cls) -> Iterator[tuple[Field[Any], tuple[type, ...]]]:
        """Every field that is a flag, and the types of its values."""
        hints = get_type_hints(cls)
        for f in fields(cls):
            if f.metadata:
                yield f, get_args(hints[f.name]) or (hints[f.name],)

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


def read_field(f: Field[Any], hf: dict[str, Any], source: str) -> Any:
    """The value of one of ModelConfig's fields, as config.json has it or by default."""
    value = hf.get(f.name)
    if value is None:
        require(f.default is not MISSING, f"{source}: {f.name} is missing")
        return f.default
    kind = type(f.default) if isinstance(f.default, bool | float) else int
    least = 1 if kind is int and f.default != 0 else 0
    require(
        isinstance(value, (int, float) if kind is float else int) and value >= least,
        f"{source}: {f.name} is {value!r}; expected a {kind.__name__} of at least {least}",
    )
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
