"""The parts of DeepSeek-V2 that are not attention, which `deepseek_v2.py` puts together: plain callables over plain
tensors. Attributes carry Hugging Face's names; sharded ones hold this rank's part."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minidcp.kernels.experts import Parts, list_tiles, route, run_experts
from minidcp.kernels.linear import multiply_by_head
from minidcp.kernels.norm import rms_norm
from minidcp.model_config import ModelConfig
from minidcp.models.weights import WHOLE, Shard, Weights
from minidcp.parallel.group import Group

GEMM_ALIGN = 8  # grouped_mm wants rows of a multiple of 16 bytes: 8 elements of bf16


class RMSNorm:
    """x / rms(x) · weight."""

    def __init__(self, dim: int, weights: Weights, eps: float) -> None:
        self.weight = weights.read("weight", dim)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)[0]

    def add(self, x: Tensor | Parts, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normed sum of x and the residual stream, and the sum itself."""
        x, scales = x if isinstance(x, Parts) else (x, None)
        return rms_norm(x, self.weight, self.eps, residual, scales)


@dataclass(frozen=True)
class Linear:
    """x @ weight.T (+ bias)."""

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def read(cls, in_dim: int, out_dim: int, weights: Weights, shard: Shard = WHOLE, bias: bool = False) -> "Linear":
        """With a shard of dim 0 the outputs are this rank's; with one of dim 1 the inputs are, and the result is this
        rank's summand (the bias is then added on rank 0 only)."""
        parts = [weights.read("weight", out_dim, in_dim, shard=shard)]
        if bias:
            parts.append(weights.read("bias", out_dim, shard=WHOLE if shard.dim == 1 else shard))
        return cls(*parts[: 1 if shard.dim == 1 and shard.index > 0 else 2])

    def reorder_rope(self, num_heads: int, rope_dim: int) -> "Linear":
        """The same with each head's last `rope_dim` outputs not in pairs (0, 1, 2, 3, …) but in halves (0, 2, …, 1, 3,
        …), which is what `kernels/kv_store.py` rotates."""
        by_head = torch.arange(len(self.weight), device=self.weight.device).view(num_heads, -1)
        rope = by_head[:, -rope_dim:]
        order = torch.cat([by_head[:, :-rope_dim], rope[:, 0::2], rope[:, 1::2]], 1).flatten()
        return Linear(self.weight[order], None if self.bias is None else self.bias[order])

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Into `out` [T, out_dim], if one is given."""
        result = multiply_by_head(x[:, None], self.weight[None], None if out is None else out[:, None])[:, 0]
        return result if self.bias is None else result.add_(self.bias)


def join(*parts: Linear) -> Linear:
    """One product for several of the same input: the outputs side by side."""
    biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in parts]
    biased = any(p.bias is not None for p in parts)
    return Linear(torch.cat([p.weight for p in parts]), torch.cat(biases) if biased else None)


class VocabParallelEmbedding:
    """Token embeddings, vocabulary rows sharded over the TP group."""

    def __init__(self, config: ModelConfig, tp: Group, weights: Weights) -> None:
        self.weight = weights.read("weight", config.vocab_size, config.hidden_size, shard=Shard(0, tp.rank, tp.size))
        self.tp = tp

    def __call__(self, token_ids: Tensor) -> Tensor:
        if self.tp.size == 1:
            return self.weight[token_ids]
        local = token_ids - self.tp.rank * self.weight.shape[0]
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        x = self.weight[local.masked_fill(elsewhere, 0)]
        return self.tp.all_reduce(x.masked_fill(elsewhere[:, None], 0.0))


class LMHead:
    """Logits, rows of the vocabulary sharded over the TP group."""

    def __init__(self, weight: Tensor, vocab_size: int, tp: Group) -> None:
        self.weight, self.vocab_size, self.tp = weight, vocab_size, tp

    def __call__(self, x: Tensor) -> Tensor:
        """x [S, hidden] -> [S, V / N], this rank's; -inf for rows that pad the last shards."""
        logits = multiply_by_head(x[:, None], self.weight[None])[:, 0]
        padding = (self.tp.rank + 1) * len(self.weight) - self.vocab_size
        if padding > 0:
            logits[:, max(0, len(self.weight) - padding) :] = -torch.inf
        return logits

    def gather(self, logits: Tensor) -> Tensor:
        """[S, V / N] of every rank -> [S, V] float32 on all."""
        return self.tp.all_gather(logits).flatten(1)[:, : self.vocab_size].float()

    def choose_best(self, logits: Tensor) -> Tensor:
        """[S, V / N] of every rank -> the most likely tokens [S], the same on all ranks."""
        # In two steps, because one row by itself does not fill a GPU.
        parts = logits.unflatten(1, (math.gcd(logits.shape[1], 64), -1))
        values, within = parts.max(-1)
        best, part = values.max(-1, keepdim=True)
        ids: Tensor = (within.gather(1, part) + part * parts.shape[2])[:, 0]
        if self.tp.size == 1:
            return ids
        ids += self.tp.rank * len(self.weight)
        # float64 holds both exactly.
        by_rank = self.tp.all_gather(torch.stack([best[:, 0].double(), ids.double()], 1))  # [S, N, 2]
        winner = by_rank[..., 0].argmax(-1, keepdim=True)
        return by_rank[..., 1].gather(1, winner)[:, 0].long()


class MLP:
    """down(silu(gate(x)) · up(x)), intermediate dim sharded over TP. Gives this rank's summand."""

    def __init__(self, hidden: int, intermediate: int, tp: Group, weights: Weights, align: int = GEMM_ALIGN) -> None:
        rows, columns = Shard(0, tp.rank, tp.size, align), Shard(1, tp.rank, tp.size, align)
        gate = weights.read("gate_proj.weight", intermediate, hidden, shard=rows)
        up = weights.read("up_proj.weight", intermediate, hidden, shard=rows)
        self.gate_up_proj = torch.cat([gate, up])  # [2 I / tp, hidden]
        self.down_proj = weights.read("down_proj.weight", hidden, intermediate, shard=columns)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down_proj)

    def split(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """As `count` MLPs whose sum this is: gate_up and down of each."""
        gate_up = self.gate_up_proj.unflatten(0, (2, count, -1)).transpose(0, 1).flatten(1, 2)
        return list(zip(gate_up, self.down_proj.chunk(count, 1), strict=True))


class MoE:
    """Routed and shared experts, every expert's intermediate dim sharded over TP, so that all ranks do the same work
    whatever the routing. Gives parts of this rank's summand. `bounds`: numbers of tokens where kernels change."""

    def __init__(self, config: ModelConfig, tp: Group, weights: Weights) -> None:
        self.config, self.shared, hidden = config, config.n_shared_experts, config.hidden_size
        self.gate = weights.read("gate.weight", config.n_routed_experts, hidden)
        experts = []
        if self.shared:  # in the checkpoint they are one MLP
            together = config.moe_intermediate_size * self.shared
            scope = weights.scope("shared_experts")
            experts += MLP(hidden, together, tp, scope, GEMM_ALIGN * self.shared).split(self.shared)
        for e in range(config.n_routed_experts):
            experts += MLP(hidden, config.moe_intermediate_size, tp, weights.scope(f"experts.{e}")).split(1)
        self.gate_up_proj = torch.stack([gate_up for gate_up, _ in experts])  # [E, 2 I / tp, hidden]
        self.down_proj = torch.stack([down for _, down in experts])  # [E, hidden, I / tp]
        self.bounds = [*list_tiles(len(experts), config.num_experts_per_tok + self.shared, *self.down_proj.shape[1:])]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> weights [T, K] float32 and ids [T, K] of its experts, shared ones included. In float32, as
        the original: the products of bf16 are exact."""
        logits = torch.empty(len(x), len(self.gate), dtype=torch.float32, device=x.device)
        multiply_by_head(x[:, None], self.gate[None], logits[:, None])
        return route(logits, self.config, self.shared)

    def __call__(self, x: Tensor) -> Parts:
        weights, ids = self.route(x)
        return run_experts(x, self.gate_up_proj, self.down_proj, weights, ids)
