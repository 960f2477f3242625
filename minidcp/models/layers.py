"""The parts of the model that are not attention: plain callables over plain tensors, which
`deepseek.py` puts together. Attributes have Hugging Face's names. Where a weight is sharded, an
attribute holds this rank's part. Next: `worker/model_runner.py`."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minidcp.kernels.dense import multiply, norm_and_multiply
from minidcp.kernels.experts import ExpertOutputs, run_experts
from minidcp.kernels.fp8 import (
    Activations,
    Fp8Stack,
    Fp8Tensor,
    Weight,
    allocate_stack,
    join_rows,
    put_into_stack,
    widen,
)
from minidcp.kernels.linear import multiply_by_head
from minidcp.kernels.norm import rms_norm
from minidcp.kernels.route import route
from minidcp.kernels.tiles import list_tiles
from minidcp.model_config import ModelConfig
from minidcp.models.weights import WHOLE, Shard, Weights
from minidcp.parallel.group import Group


class RMSNorm:
    """x / rms(x) · weight.

    Attributes:
        quantizes: whether the result goes to a product in FP8, so that it is wanted in FP8, too.
    """

    def __init__(self, dim: int, weights: Weights, eps: float) -> None:
        self.weight = weights.read("weight", dim)
        self.eps = eps
        self.quantizes = False

    def __call__(self, x: Tensor) -> Activations:
        normed, _ = rms_norm(x, self.weight, self.eps, quantizes=self.quantizes)
        return normed


class ResidualStream:
    """What the layers add to, [T, hidden].

    What a layer adds, each rank has a summand of. These are added up on the way to the next norm,
    so that one kernel can do all of it.
    """

    def __init__(self, tp: Group, x: Tensor) -> None:
        """x [T, hidden] is the same on all ranks."""
        self.tp = tp
        self.x = x  # whole at first; later only the group knows which rows this rank keeps
        self.summand: Tensor | ExpertOutputs | None = None

    def add(self, summand: Tensor | ExpertOutputs) -> None:
        """Add the sum over all ranks of [T, hidden], or of the outputs of each token's experts."""
        assert self.summand is None
        self.summand = summand

    def normed(self, norm: RMSNorm) -> Activations:
        """The stream so far, normed."""
        summand = self.summand
        if summand is None:
            return norm(self.x)
        self.summand = None  # only what is needed is kept
        scales = None
        if isinstance(summand, ExpertOutputs):
            scales = summand.weights
            summand = summand.values
        normed, self.x = self.tp.all_reduce_and_norm(
            summand, scales, self.x, norm.weight, norm.eps, norm.quantizes
        )
        return normed


@dataclass(frozen=True)
class Linear:
    """x @ weight.T (+ bias)."""

    weight: Weight
    bias: Tensor | None = None

    @classmethod
    def read(
        cls, in_dim: int, out_dim: int, weights: Weights, shard: Shard = WHOLE, bias: bool = False
    ) -> "Linear":
        """A shard of dim 0 gives this rank's outputs.

        A shard of dim 1 takes this rank's inputs and gives its summand of the output. The bias is
        then added on rank 0 only.
        """
        weight = weights.read_matrix("weight", out_dim, in_dim, shard=shard)
        if not bias:
            return cls(weight)
        if shard.dim == 0:
            return cls(weight, weights.read("bias", out_dim, shard=shard))
        whole_bias = weights.read("bias", out_dim)
        return cls(weight, whole_bias if shard.index == 0 else None)

    @property
    def is_fp8(self) -> bool:
        return isinstance(self.weight, Fp8Tensor)

    def reorder_rope(self, num_heads: int, rope_dim: int) -> "Linear":
        """The same layer with each head's last `rope_dim` outputs in another order.

        The checkpoint has the two values of a rotated pair side by side (0, 1, 2, 3, …). What
        `kernels/kv_store.py` rotates has them in halves (0, 2, …, 1, 3, …).
        """
        rows = torch.arange(len(self.weight), device=self.weight.device).view(num_heads, -1)
        rest = rows[:, :-rope_dim]
        rope = rows[:, -rope_dim:]
        order = torch.cat([rest, rope[:, 0::2], rope[:, 1::2]], 1).flatten()
        bias = None if self.bias is None else self.bias[order]
        return Linear(self.weight[order], bias)

    def __call__(
        self, x: Activations, out: Tensor | None = None, norm: RMSNorm | None = None
    ) -> Tensor:
        """x [T, in_dim] -> [T, out_dim], written to `out` if that is given.

        If a norm is given, x goes to it first. That may take no launch of its own.
        """
        if norm is None:
            result = multiply(x, self.weight, out)
        else:
            result = norm_and_multiply(widen(x), norm.weight, norm.eps, self.weight, out)
        if self.bias is not None:
            result.add_(self.bias)
        return result


def join(first: Linear, second: Linear) -> Linear:
    """Two layers of the same input as one product, their outputs side by side."""
    weight = join_rows(first.weight, second.weight)
    if first.bias is None and second.bias is None:
        return Linear(weight)
    biases = []
    for layer in (first, second):
        given = first.bias if second.bias is None else second.bias
        assert given is not None
        no_bias = given.new_zeros(len(layer.weight))
        biases.append(no_bias if layer.bias is None else layer.bias)
    return Linear(weight, torch.cat(biases))


class VocabParallelEmbedding:
    """Token embeddings. The rows of the vocabulary are sharded over the TP group."""

    def __init__(self, config: ModelConfig, tp: Group, weights: Weights) -> None:
        by_token = Shard(0, tp.rank, tp.size)
        self.weight = weights.read("weight", config.vocab_size, config.hidden_size, shard=by_token)
        self.tp = tp

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] -> [T, hidden], the same on all ranks."""
        if self.tp.size == 1:
            return self.weight[token_ids]
        num_own = len(self.weight)
        own_ids = token_ids - self.tp.rank * num_own
        is_elsewhere = (own_ids < 0) | (own_ids >= num_own)
        x = self.weight[own_ids.masked_fill(is_elsewhere, 0)]
        return self.tp.all_reduce(x.masked_fill(is_elsewhere[:, None], 0.0))


class LMHead:
    """Logits. The rows of the vocabulary are sharded over the TP group."""

    def __init__(self, weight: Tensor, vocab_size: int, tp: Group) -> None:
        self.weight = weight  # [V / tp, hidden]
        self.vocab_size = vocab_size
        self.tp = tp

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [S, hidden] -> this rank's logits [S, V / tp]; -inf where a shard is padded.

        They are written to `out` if that is given.
        """
        if out is None:
            out = x.new_empty(len(x), len(self.weight))
        logits = multiply_by_head(x[:, None], self.weight[None], out[:, None])[:, 0]
        num_own = len(self.weight)
        num_padding = (self.tp.rank + 1) * num_own - self.vocab_size
        if num_padding > 0:
            logits[:, max(0, num_own - num_padding) :] = -torch.inf
        return logits

    def gather(self, logits: Tensor) -> Tensor:
        """[S, V / tp] of every rank -> [S, V] float32, the same on all ranks."""
        return self.tp.all_gather(logits).flatten(1)[:, : self.vocab_size].float()

    def choose_best(self, logits: Tensor) -> Tensor:
        """[S, V / tp] of every rank -> the most likely tokens [S], the same on all ranks."""
        # In two steps, because one row by itself does not fill a GPU.
        num_parts = math.gcd(logits.shape[1], 64)
        parts = logits.unflatten(1, (num_parts, -1))
        part_values, part_ids = parts.max(-1)
        best_values, best_parts = part_values.max(-1, keepdim=True)
        ids: Tensor = (part_ids.gather(1, best_parts) + best_parts * parts.shape[2])[:, 0]
        if self.tp.size == 1:
            return ids

        ids += self.tp.rank * len(self.weight)
        # float64 holds both the logits and the ids exactly.
        candidate = torch.stack([best_values[:, 0].double(), ids.double()], 1)
        by_rank = self.tp.all_gather(candidate)  # [S, tp, 2]
        winner = by_rank[..., 0].argmax(-1, keepdim=True)
        return by_rank[..., 1].gather(1, winner)[:, 0].long()


class MLP:
    """down(silu(gate(x)) · up(x)), the intermediate dim sharded over TP.

    Attributes:
        gate_up_proj: [2 I / tp, hidden].
        down_proj: [hidden, I / tp].
    """

    def __init__(self, hidden: int, intermediate: int, shard: Shard, weights: Weights) -> None:
        """`shard` is the part of the intermediate dim, whatever its dim."""
        rows = replace(shard, dim=0, align=weights.align)
        columns = replace(shard, dim=1, align=weights.align)
        gate = weights.read_matrix("gate_proj.weight", intermediate, hidden, shard=rows)
        up = weights.read_matrix("up_proj.weight", intermediate, hidden, shard=rows)
        self.gate_up_proj = join_rows(gate, up)
        self.down_proj = weights.read_matrix(
            "down_proj.weight", hidden, intermediate, shard=columns
        )

    def __call__(self, x: Activations) -> Tensor:
        """x [T, hidden] -> this rank's summand of the output [T, hidden]."""
        gate, up = multiply(x, self.gate_up_proj).chunk(2, -1)
        return multiply(F.silu(gate) * up, self.down_proj)

    @property
    def is_fp8(self) -> bool:
        return isinstance(self.down_proj, Fp8Tensor)


class MoE:
    """Routed and shared experts.

    The intermediate dim of every expert is sharded over TP. So all ranks do the same work, however
    tokens are routed. A shared expert is one that every token takes, with weight 1.

    Attributes:
        gate_up_proj: [E, 2 I / tp, hidden], shared experts first.
        down_proj: [E, hidden, I / tp].
        token_limits: numbers of tokens up to which one choice of kernels holds; all are run before
            serving.
    """

    def __init__(self, config: ModelConfig, tp: Group, weights: Weights) -> None:
        self.config = config
        self.num_shared = config.n_shared_experts
        hidden = config.hidden_size
        self.gate = weights.read("gate.weight", config.n_routed_experts, hidden)
        self.gate_bias = None
        if config.sigmoid_router:
            # bf16 would be too coarse: the bias is large, and small differences of it decide.
            self.gate_bias = weights.read(
                "gate.e_score_correction_bias", config.n_routed_experts, dtype=torch.float32
            )

        num_experts = self.num_shared + config.n_routed_experts
        for index in range(num_experts):
            expert = self.read_expert(index, tp, weights)
            if index == 0:
                self.gate_up_proj = allocate_stack(num_experts, expert.gate_up_proj)
                self.down_proj = allocate_stack(num_experts, expert.down_proj)
            put_into_stack(self.gate_up_proj, index, expert.gate_up_proj)
            put_into_stack(self.down_proj, index, expert.down_proj)

        _, hidden, own_intermediate = self.down_proj.shape
        top_k = config.num_experts_per_tok + self.num_shared
        self.is_fp8 = isinstance(self.down_proj, Fp8Stack)
        itemsize = 1 if isinstance(self.down_proj, Fp8Stack) else self.down_proj.itemsize
        tiles = list_tiles(num_experts, top_k, hidden, own_intermediate, itemsize)
        self.token_limits = list(tiles)

    def read_expert(self, index: int, tp: Group, weights: Weights) -> MLP:
        """The checkpoint has the shared experts as one MLP: one of them is a part of it."""
        hidden = self.config.hidden_size
        intermediate = self.config.moe_intermediate_size
        if index < self.num_shared:
            part = Shard(0, tp.rank * self.num_shared + index, tp.size * self.num_shared)
            scope = weights.scope("shared_experts")
            return MLP(hidden, intermediate * self.num_shared, part, scope)
        scope = weights.scope(f"experts.{index - self.num_shared}")
        return MLP(hidden, intermediate, Shard(0, tp.rank, tp.size), scope)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> weights [T, K] float32 and ids [T, K] of its experts.

        Shared experts are included. Logits are in float32, as in the original: the products of
        bf16 values are exact then.
        """
        logits = torch.empty(len(x), len(self.gate), dtype=torch.float32, device=x.device)
        multiply_by_head(x[:, None], self.gate[None], logits[:, None])
        return route(logits, self.config, self.num_shared, self.gate_bias)

    def __call__(self, x: Activations) -> ExpertOutputs:
        """x [T, hidden] -> the outputs of each token's experts, not added up yet."""
        weights, ids = self.route(widen(x))
        return run_experts(x, self.gate_up_proj, self.down_proj, weights, ids)
