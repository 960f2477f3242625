"""The parts of the model that are not attention: plain callables over plain tensors, which
`deepseek.py` puts together. Attributes have Hugging Face's names. Where a weight is sharded, an
attribute holds this rank's part. Next: `worker/model_runner.py`."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minidcp.kernels.experts import ExpertOutputs, run_experts
from minidcp.kernels.linear import multiply_by_head
from minidcp.kernels.norm import rms_norm
from minidcp.kernels.route import route
from minidcp.kernels.tiles import list_tiles
from minidcp.model_config import ModelConfig
from minidcp.models.weights import WHOLE, Shard, Weights
from minidcp.parallel.group import Group

GEMM_ALIGN = 8  # grouped_mm wants rows of a multiple of 16 bytes, which are 8 elements of bf16


class RMSNorm:
    """x / rms(x) · weight."""

    def __init__(self, dim: int, weights: Weights, eps: float) -> None:
        self.weight = weights.read("weight", dim)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        normed, _ = rms_norm(x, self.weight, self.eps)
        return normed

    def add_and_norm(
        self, x: Tensor | ExpertOutputs, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Add x to the residual stream: the normed sum, and the sum itself.

        The outputs of a token's experts are added up by the same kernel.
        """
        if isinstance(x, ExpertOutputs):
            return rms_norm(x.values, self.weight, self.eps, residual, x.weights)
        return rms_norm(x, self.weight, self.eps, residual)


@dataclass(frozen=True)
class Linear:
    """x @ weight.T (+ bias)."""

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def read(
        cls, in_dim: int, out_dim: int, weights: Weights, shard: Shard = WHOLE, bias: bool = False
    ) -> "Linear":
        """A shard of dim 0 gives this rank's outputs.

        A shard of dim 1 takes this rank's inputs and gives its summand of the output. The bias is
        then added on rank 0 only.
        """
        weight = weights.read("weight", out_dim, in_dim, shard=shard)
        if not bias:
            return cls(weight)
        if shard.dim == 0:
            return cls(weight, weights.read("bias", out_dim, shard=shard))
        whole_bias = weights.read("bias", out_dim)
        return cls(weight, whole_bias if shard.index == 0 else None)

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

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, in_dim] -> [T, out_dim], written to `out` if that is given."""
        one_head_out = None if out is None else out[:, None]
        result = multiply_by_head(x[:, None], self.weight[None], one_head_out)[:, 0]
        if self.bias is not None:
            result.add_(self.bias)
        return result


def join(first: Linear, second: Linear) -> Linear:
    """Two layers of the same input as one product, their outputs side by side."""
    weight = torch.cat([first.weight, second.weight])
    if first.bias is None and second.bias is None:
        return Linear(weight)
    biases = []
    for layer in (first, second):
        no_bias = layer.weight.new_zeros(len(layer.weight))
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

    def __call__(self, x: Tensor) -> Tensor:
        """x [S, hidden] -> this rank's logits [S, V / tp]; -inf where a shard is padded."""
        logits = multiply_by_head(x[:, None], self.weight[None])[:, 0]
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
    """down(silu(gate(x)) · up(x)), the intermediate dim sharded over TP."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        tp: Group,
        weights: Weights,
        align: int = GEMM_ALIGN,
    ) -> None:
        rows = Shard(0, tp.rank, tp.size, align)
        columns = Shard(1, tp.rank, tp.size, align)
        gate = weights.read("gate_proj.weight", intermediate, hidden, shard=rows)
        up = weights.read("up_proj.weight", intermediate, hidden, shard=rows)
        self.gate_up_proj = torch.cat([gate, up])  # [2 I / tp, hidden]
        self.down_proj = weights.read("down_proj.weight", hidden, intermediate, shard=columns)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> this rank's summand of the output [T, hidden]."""
        gate, up = F.linear(x, self.gate_up_proj).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down_proj)

    def split(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """gate_up and down of `count` smaller MLPs, whose outputs add up to this one's."""
        by_part = self.gate_up_proj.unflatten(0, (2, count, -1)).transpose(0, 1)
        gate_up = by_part.flatten(1, 2)
        down = self.down_proj.chunk(count, 1)
        return list(zip(gate_up, down, strict=True))


class MoE:
    """Routed and shared experts.

    The intermediate dim of every expert is sharded over TP. So all ranks do the same work, however
    tokens are routed. A shared expert is one that every token takes, with weight 1.

    Attributes:
        token_limits: numbers of tokens up to which one choice of kernels holds; all are run before
            serving.
    """

    def __init__(self, config: ModelConfig, tp: Group, weights: Weights) -> None:
        self.config = config
        self.num_shared = config.n_shared_experts
        hidden = config.hidden_size
        intermediate = config.moe_intermediate_size
        self.gate = weights.read("gate.weight", config.n_routed_experts, hidden)
        self.gate_bias = None
        if config.sigmoid_router:
            # bf16 would be too coarse: the bias is large, and small differences of it decide.
            self.gate_bias = weights.read(
                "gate.e_score_correction_bias", config.n_routed_experts, dtype=torch.float32
            )

        experts = []
        if self.num_shared > 0:
            # The checkpoint has the shared experts as one MLP.
            scope = weights.scope("shared_experts")
            align = GEMM_ALIGN * self.num_shared
            shared = MLP(hidden, intermediate * self.num_shared, tp, scope, align)
            experts += shared.split(self.num_shared)
        for index in range(config.n_routed_experts):
            routed = MLP(hidden, intermediate, tp, weights.scope(f"experts.{index}"))
            experts.append((routed.gate_up_proj, routed.down_proj))
        self.gate_up_proj = torch.stack(
            [gate_up for gate_up, _ in experts]
        )  # [E, 2 I / tp, hidden]
        self.down_proj = torch.stack([down for _, down in experts])  # [E, hidden, I / tp]

        top_k = config.num_experts_per_tok + self.num_shared
        _, hidden, own_intermediate = self.down_proj.shape
        self.token_limits = list(list_tiles(len(experts), top_k, hidden, own_intermediate))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> weights [T, K] float32 and ids [T, K] of its experts.

        Shared experts are included. Logits are in float32, as in the original: the products of
        bf16 values are exact then.
        """
        logits = torch.empty(len(x), len(self.gate), dtype=torch.float32, device=x.device)
        multiply_by_head(x[:, None], self.gate[None], logits[:, None])
        return route(logits, self.config, self.num_shared, self.gate_bias)

    def __call__(self, x: Tensor) -> ExpertOutputs:
        """x [T, hidden] -> the outputs of each token's experts, not added up yet."""
        weights, ids = self.route(x)
        return run_experts(x, self.gate_up_proj, self.down_proj, weights, ids)
