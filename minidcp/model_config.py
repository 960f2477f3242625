"""The shape of the checkpoint's model: config.json of DeepSeek-V2 or a relative, checked. What the
relatives differ in is data here. The rotary part is in `rope_config.py`, the FP8 part in
`fp8_config.py`. Next: `request.py`."""

import json
import os
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from minidcp.config import require, shorten
from minidcp.fp8_config import read_fp8_block
from minidcp.rope_config import RopeConfig, is_int, is_number, read_rope

# Options of config.json that change what a model computes, and the values supported here. The first
# is the default.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "mlp_bias": (False, None),
    "compression_config": (None,),  # compressed-tensors' older name of quantization_config
    # What relatives of the model have. Here attention is MLA, rotated values lie in pairs, and
    # every layer attends to the whole context.
    "use_mla": (True, None),
    "rope_interleave": (True, None),
    "partial_rotary_factor": (1, None),  # the share of the rope dims that are rotated
    "sliding_window": (None,),
    "index_topk": (None,),
    "llama_4_scaling": (None,),
}


class Router(NamedTuple):
    """How a family of models chooses a token's experts, as options of config.json."""

    scoring_func: str
    topk_methods: tuple[str, ...]  # the first is the default


SOFTMAX_ROUTER = Router("softmax", ("greedy", "group_limited_greedy"))
SIGMOID_ROUTER = Router("sigmoid", ("noaux_tc",))

# By model_type. Kimi-K2 has DeepSeek-V3's code; glm4_moe_lite is GLM-4.7-Flash.
ROUTERS = {
    "deepseek_v2": SOFTMAX_ROUTER,
    "deepseek_v3": SIGMOID_ROUTER,
    "kimi_k2": SIGMOID_ROUTER,
    "glm4_moe_lite": SIGMOID_ROUTER,
}
# Relatives that cannot run here, and why.
REFUSED = {
    "deepseek_v32": "its attention is sparse",
    "deepseek_v4": "its attention is sparse",
    "glm_moe_dsa": "its attention is sparse",
    "kimi_linear": "it mixes MLA with linear attention",
    "kimi_k25": "it takes images",
}
# Fields of ModelConfig that are not read from config.json as they are.
OWN_FIELDS = ("rope", "eos_token_ids", "sigmoid_router", "fp8_block")

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Field names follow Hugging Face's config.json."""

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

    # DeepSeek-V3's last layers can predict a second token. They are not part of the model here.
    num_nextn_predict_layers: int = 0

    # Our own names: config.json spells these in several ways.
    rope: RopeConfig = field(default_factory=RopeConfig)
    # Whether the router scores experts by a sigmoid, and adds a bias to choose them, as in
    # DeepSeek-V3. Otherwise by a softmax, as in DeepSeek-V2.
    sigmoid_router: bool = False
    # Rows and columns of a block of a matrix that share a scale, if the checkpoint is in FP8.
    fp8_block: tuple[int, int] | None = None
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
        config = cls.from_dict(read_object(file), str(file))

        generation_file = Path(path) / GENERATION_FILE
        if not os.path.lexists(generation_file):
            return config
        generation = read_object(generation_file)
        if "eos_token_id" not in generation:
            return config
        # Hugging Face's generate() takes the end-of-sequence tokens from here.
        return replace(config, eos_token_ids=read_eos_token_ids(generation, str(generation_file)))

    @classmethod
    def from_dict(cls, hf: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """As `from_hf`, from the parsed JSON. Errors call it `source`."""
        router = find_router(hf, source)
        options = {
            **SUPPORTED,
            "scoring_func": (router.scoring_func, None),
            "topk_method": (*router.topk_methods, None),
        }
        for name, supported in options.items():
            value = hf.get(name, supported[0])
            listed = ", ".join(repr(v) for v in supported)
            require(
                value in supported,
                f"{source}: {name} {value!r} is not supported; supported: {listed}",
            )

        check_layer_types(hf, source)

        values: dict[str, Any] = {}
        for f in fields(cls):
            if f.name not in OWN_FIELDS:  # which are read below
                values[f.name] = read_field(f, hf, source)
        if router is SOFTMAX_ROUTER and hf.get("topk_method") != "group_limited_greedy":
            values["n_group"] = 1
            values["topk_group"] = 1

        num_dense_layers = read_num_dense_layers(hf, source)
        if num_dense_layers is not None:
            values["first_k_dense_replace"] = num_dense_layers

        config = cls(
            **values,
            rope=read_rope(hf, values["max_position_embeddings"], source),
            eos_token_ids=read_eos_token_ids(hf, source),
            sigmoid_router=router is SIGMOID_ROUTER,
            fp8_block=read_fp8_block(hf, source),
        )
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

        require(
            not self.sigmoid_router or num_groups == 1 or num_experts >= 2 * num_groups,
            f"{source}: n_group {num_groups} leaves fewer than 2 of {num_experts} experts to a "
            "group, which is as good as its two best experts together",
        )

        # Experts are chosen within the best `topk_group` groups only.
        top_k = self.num_experts_per_tok
        num_reachable = self.topk_group * num_experts // num_groups
        require(
            1 <= top_k <= num_reachable and self.topk_group <= num_groups,
            f"{source}: num_experts_per_tok {top_k} of {num_reachable} experts in "
            f"topk_group {self.topk_group} of n_group {num_groups} groups cannot be chosen",
        )


def find_router(hf: dict[str, Any], source: str) -> Router:
    """The router of the model's family. Raises ValueError for a model that does not run here."""
    model_type = str(hf.get("model_type"))
    reason = REFUSED.get(model_type)
    because = "" if reason is None else f": {reason}"
    listed = ", ".join(repr(name) for name in ROUTERS)
    require(
        model_type in ROUTERS,
        f"{source}: model_type {model_type!r} is not supported{because}; supported: {listed}",
    )
    return ROUTERS[model_type]


def read_field(f: Field[Any], hf: dict[str, Any], source: str) -> Any:
    """The value of a field of ModelConfig: from config.json, else its default."""
    value = hf.get(f.name)
    if value is None:
        require(f.default is not MISSING, f"{source}: {f.name} is missing")
        return f.default

    if isinstance(f.default, bool):
        require(isinstance(value, bool), f"{source}: {f.name} is {value!r}; expected true or false")
        return value

    # The type is the default's; a field without a default, or None as default, is an int.
    kind = float if isinstance(f.default, float) else int
    # Counts and widths are positive, except where a default of 0 means that the model has none.
    minimum = 1 if kind is int and f.default != 0 else 0

    has_kind = is_int(value) or (kind is float and is_number(value))
    require(
        has_kind and value >= minimum,
        f"{source}: {f.name} is {value!r}; expected a {kind.__name__} of at least {minimum}",
    )
    return kind(value)


def check_layer_types(hf: dict[str, Any], source: str) -> None:
    """Raise ValueError if a layer's attention is of another type."""
    layer_types = hf.get("layer_types")
    if layer_types is None:
        return
    all_full = isinstance(layer_types, list) and all(t == "full_attention" for t in layer_types)
    require(
        all_full,
        f"{source}: layer_types {layer_types!r} is not supported; supported: 'full_attention' for "
        "every layer",
    )


def read_num_dense_layers(hf: dict[str, Any], source: str) -> int | None:
    """How many layers are dense before the first with experts, as transformers' mlp_layer_types
    says, which GLM's config.json has. None if it is not there."""
    layer_types = hf.get("mlp_layer_types")
    if layer_types is None:
        return None
    is_list = isinstance(layer_types, list)
    num_dense = layer_types.count("dense") if is_list else 0
    num_sparse = len(layer_types) - num_dense if is_list else 0
    require(
        layer_types == ["dense"] * num_dense + ["sparse"] * num_sparse,
        f"{source}: mlp_layer_types {shorten(layer_types)} is not supported; supported: 'dense' "
        "layers, then 'sparse' ones",
    )
    return num_dense


def read_eos_token_ids(hf: dict[str, Any], source: str) -> tuple[int, ...]:
    """The end-of-sequence tokens: config.json has one, a list, or none."""
    eos = hf.get("eos_token_id")
    if eos is None:
        return ()
    token_ids = eos if isinstance(eos, list) else [eos]
    require(
        all(is_int(token) for token in token_ids),
        f"{source}: eos_token_id is {eos!r}; expected a token id, or a list of them",
    )
    return tuple(token_ids)


def read_text(file: Path) -> str:
    """A text file of the checkpoint."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        if file.is_symlink():
            raise ValueError(f"{file}: links to a file that is not there") from None
        raise ValueError(
            f"{file}: no such file; a checkpoint directory has a {file.name}"
        ) from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not valid UTF-8 ({error})") from None


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint."""
    try:
        content = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    require(isinstance(content, dict), f"{file}: must hold a JSON object")
    return dict(content)


def has_tokenizer(path: Path) -> bool:
    """Whether the checkpoint at `path` has a tokenizer.

    Raises ValueError if one of its files is damaged or cannot be read. transformers would go on
    without some of them.
    """
    for name in TOKENIZER_FILES:
        file = path / name
        if not os.path.lexists(file):
            continue
        if file.suffix == ".json":
            read_object(file)
        else:
            read_text(file)
    return any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
