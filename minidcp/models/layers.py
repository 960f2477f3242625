"""The parts of DeepSeek-V2 that are not attention: norms, embedding, MLPs and experts.

Plain callables over plain tensors. Attributes carry Hugging Face's names; sharded ones hold this
rank's part. `deepseek_v2.py` puts them together.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from minidcp.kernels.norm import rms_norm
from minidcp.model_config import ModelConfig
from minidcp.models.weights import Shard, Weights, deinterleave_rope_rows
from minidcp.parallel.group import Group
from minidcp.parallel.state import ParallelState

GEMM_ALIGN = 8  # grouped_mm wants rows of a multiple of 16 bytes: 8 elements of bf16


class RMSNorm:
    """x / rms(x) · weight."""

    def __init__(self, dim: int, weights: Weights, eps: float) -> None:
        self.weight = weights.read("weight", dim)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)[0]

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normed sum of x and the residual stream, and the sum itself."""
        return rms_norm(x, self.weight, self.eps, residual)


class Linear:
    """x @ weight.T (+ bias). With a shard of dim 0 the outputs are this rank's; with one of dim 1 the
    inputs are, and the result is this rank's summand (the bias is then added on rank 0 only)."""

    def __init__(
        self, in_dim: int, out_dim: int, weights: Weights, shard: Shard | None = None, bias: bool = False
    ) -> None:
        self.weight = weights.read("weight", out_dim, in_dim, shard=shard)
        by_input = shard is not None and shard.dim == 1
        self.bias = weights.read("bias", out_dim, shard=None if by_input else shard) if bias else None
        if shard is not None and by_input and shard.index > 0:
            self.bias = None

    def reorder_rope(self, num_heads: int, rope_dim: int) -> None:
        """Make each head's last `rope_dim` outputs halves instead of pairs."""
        self.weight = deinterleave_rope_rows(self.weight, num_heads, rope_dim)
        if self.bias is not None:
            self.bias = deinterleave_rope_rows(self.bias, num_heads, rope_dim)

    def part(self, rows: slice) -> Linear:
        """The same without a bias, for some of the outputs; the weights are shared."""
        assert self.bias is None
        part = copy.copy(self)
        part.weight = self.weight[rows]
        return part

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Into `out`, if one is given; then without a bias."""
        return F.linear(x, self.weight, self.bias) if out is None else torch.mm(x, self.weight.T, out=out)


class VocabParallelEmbedding:
    """Token embeddings, vocabulary rows sharded over the TP group."""

    def __init__(self, config: ModelConfig, tp: Group, weights: Weights) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.weight = weights.read("weight", *shape, shard=Shard(0, tp.rank, tp.size))
        self.tp = tp

    def __call__(self, token_ids: Tensor) -> Tensor:
        local = token_ids - self.tp.rank * self.weight.shape[0]
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        x = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.tp.all_reduce(x.masked_fill(elsewhere[:, None], 0.0))


class LMHead:
    """Logits over the whole vocabulary, float32, on every rank; rows sharded over the TP group."""

    def __init__(self, weight: Tensor, vocab_size: int, tp: Group) -> None:
        self.weight, self.vocab_size, self.tp = weight, vocab_size, tp

    def __call__(self, x: Tensor) -> Tensor:
        by_rank = self.tp.all_gather(F.linear(x, self.weight))  # [T, N, V / N], the last part padded
        return by_rank.flatten(1)[:, : self.vocab_size].float()


class MLP:
    """down(silu(gate(x)) · up(x)), intermediate dim sharded over TP. Gives this rank's summand."""

    def __init__(self, config: ModelConfig, intermediate: int, state: ParallelState, weights: Weights) -> None:
        hidden, rank, size = config.hidden_size, state.tp.rank, state.tp.size
        rows, columns = Shard(0, rank, size, GEMM_ALIGN), Shard(1, rank, size, GEMM_ALIGN)
        gate = weights.read("gate_proj.weight", intermediate, hidden, shard=rows)
        up = weights.read("up_proj.weight", intermediate, hidden, shard=rows)
        self.gate_up_proj = torch.cat([gate, up])  # [2 I / tp, hidden]
        self.down_proj = weights.read("down_proj.weight", hidden, intermediate, shard=columns)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down_proj)


class Router:
    """Which experts a token goes to, and their weights. Everything in float32, as the original."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weight = weights.read("weight", config.n_routed_experts, config.hidden_size).float()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> weights [T, K] float32 and expert ids [T, K]."""
        c = self.config
        scores = F.linear(x.float(), self.weight).softmax(-1)
        if c.n_group > 1:
            by_group = scores.view(-1, c.n_group, c.n_routed_experts // c.n_group)
            groups = by_group.amax(-1).topk(c.topk_group, -1).indices
            chosen = torch.zeros_like(by_group[..., 0]).scatter_(1, groups, 1.0) > 0
            scores = by_group.masked_fill(~chosen[..., None], 0.0).flatten(1)
        topk_weights, topk_ids = scores.topk(c.num_experts_per_tok, -1)
        # The original either normalises or scales; transformers always scales.
        if c.norm_topk_prob and c.num_experts_per_tok > 1:
            return topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20), topk_ids
        return topk_weights * c.routed_scaling_factor, topk_ids


class MoE:
    """Routed experts plus the shared ones, every expert's intermediate dim sharded over TP, so that all
    ranks do the same work whatever the routing. Gives this rank's summand."""

    def __init__(self, config: ModelConfig, state: ParallelState, weights: Weights) -> None:
        self.gate = Router(config, weights.scope("gate"))
        experts = [
            MLP(config, config.moe_intermediate_size, state, weights.scope(f"experts.{e}"))
            for e in range(config.n_routed_experts)
        ]
        # Both as grouped_mm wants them: [experts, in, out].
        self.gate_up_proj = torch.stack([e.gate_up_proj for e in experts]).transpose(1, 2)
        self.down_proj = torch.stack([e.down_proj for e in experts]).transpose(1, 2)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config, shared, state, weights.scope("shared_experts")) if shared else None

    def __call__(self, x: Tensor) -> Tensor:
        topk_weights, topk_ids = self.gate(x)
        routed = self.run_experts(x, topk_weights, topk_ids)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

    def run_experts(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        num_experts, top_k = self.gate_up_proj.shape[0], topk_ids.shape[1]
        expert, order = topk_ids.flatten().sort(stable=True)  # (token, choice) pairs by expert
        ends = torch.searchsorted(expert, torch.arange(num_experts, device=x.device), right=True)
        offs = ends.to(torch.int32)
        gate, up = F.grouped_mm(x[order // top_k], self.gate_up_proj, offs=offs).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, self.down_proj, offs=offs)
        weighted = out.float() * topk_weights.flatten()[order, None]
        # Back in (token, choice) order before summing: deterministic, unlike an atomic scatter-add.
        by_token = torch.empty_like(weighted).index_copy_(0, order, weighted)
        return by_token.view(-1, top_k, out.shape[-1]).sum(1).to(x.dtype)
