"""Counts the weights that one rank of a deployment holds, for `plan.py`: it builds the model, and
its MTP layer if that makes drafts, on tensors without storage."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from minidcp.attention.reference import ReferenceBackend
from minidcp.hardware import FP8_SPEEDUP
from minidcp.kernels.fp8 import BLOCK, Weight
from minidcp.model_config import ModelConfig
from minidcp.models.deepseek import DeepseekForCausalLM
from minidcp.models.mtp import build_prediction_layer
from minidcp.models.weights import Shard, Weights, make_empty_fp8
from minidcp.parallel.state import build_thread_states
from minidcp.resolve import ResolvedConfig


@dataclass(frozen=True)
class WeightCount:
    """Some of the weights that a rank holds.

    Attributes:
        num_bytes: what they take, scales included.
        products: multiply-adds with one row of input, in the time of those in bf16: FP8_SPEEDUP
            of them in FP8 count as one.
    """

    num_bytes: int = 0
    products: float = 0.0

    def __add__(self, other: "WeightCount") -> "WeightCount":
        return WeightCount(self.num_bytes + other.num_bytes, self.products + other.products)

    def share(self, count: int) -> "WeightCount":
        """One of `count` equal parts."""
        return WeightCount(self.num_bytes // count, self.products / count)


# Kinds of weights differ in how a decode step reads them. A part of the name tells the kind.
NAME_PARTS = {
    ".mlp.experts.": "routed_experts",
    ".mlp.shared_experts.": "shared_experts",
    ".mlp.gate.": "router",
    ".kv_b_proj.": "kv_b_proj",
    ".embed_tokens.": "embedding",
}


@dataclass
class WeightCounts:
    """What one rank holds, by kind."""

    routed_experts: WeightCount = WeightCount()
    shared_experts: WeightCount = WeightCount()
    router: WeightCount = WeightCount()
    kv_b_proj: WeightCount = WeightCount()  # W_UK and W_UV
    embedding: WeightCount = WeightCount()
    others: WeightCount = WeightCount()

    @property
    def num_bytes(self) -> int:
        return sum(getattr(self, kind.name).num_bytes for kind in fields(self))

    def add(self, name: str, count: WeightCount) -> None:
        """Add a weight of this name."""
        kind = find_kind(name)
        setattr(self, kind, getattr(self, kind) + count)


def find_kind(name: str) -> str:
    """The field of WeightCounts that a weight counts towards."""
    for part, kind in NAME_PARTS.items():
        if part in name:
            return kind
    return "others"


class CountingSource:
    """Hands out tensors without storage, and counts them. A name may be read several times, each
    time another part."""

    def __init__(self, dtype: torch.dtype, fp8: bool, block: int) -> None:
        """`block` is how many values of a row share a scale in the checkpoint."""
        self.fp8 = fp8
        self.dtype = dtype
        self.block = block
        self.counts = WeightCounts()

    def read(
        self, name: str, shape: tuple[int, ...], shard: Shard, dtype: torch.dtype | None = None
    ) -> Tensor:
        part = torch.empty(shard.shape(shape), dtype=dtype or self.dtype, device="meta")
        self.counts.add(name, WeightCount(part.nbytes, part.numel()))
        return part

    def read_matrix(self, name: str, shape: tuple[int, ...], shard: Shard) -> Weight:
        if not self.fp8:
            return self.read(name, shape, shard)
        part = make_empty_fp8(shard.shape(shape), self.block)
        self.counts.add(name, WeightCount(part.nbytes, part.values.numel() / FP8_SPEEDUP))
        return part


def count_weights(
    config: ResolvedConfig, model_config: ModelConfig
) -> tuple[WeightCounts, WeightCounts]:
    """Count what rank 0 holds: of the model, and of the layer that makes drafts.

    With FP8 and q replicated it also holds a copy of its own heads' scales, which is not counted:
    9 MB of DeepSeek-R1 on 8 ranks.
    """
    fp8 = config.quantization == "fp8"
    _, block = model_config.fp8_block or (BLOCK, BLOCK)
    dtype = getattr(torch, config.dtype)
    states, _ = build_thread_states(config.tp_size, config.dcp_size)
    attention = ReferenceBackend(model_config.softmax_scale)
    sources = [CountingSource(dtype, fp8, block) for _ in range(2)]
    parts = (model_config, config, states[0], attention)
    model = DeepseekForCausalLM(*parts, Weights(sources[0]))
    build_prediction_layer(*parts, Weights(sources[1]), model)
    return sources[0].counts, sources[1].counts
