"""A forward pass for training, on the parameters of transformers' DeepseekV2ForCausalLM.

The same mathematics, faster: attention in multi-head form by one fused kernel, and since the experts are tiny
every token goes through all of them as one wide MLP, in which those not chosen weigh nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DeepseekV2ForCausalLM

Compile = Callable[[Any], Any]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
    return weight.to(x.dtype) * y.to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs; the result is in halves, which is the same to a dot product of two such."""
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


class TrainingForward:
    """Loss and balance of rows of equal length; every call with the same number of tokens in all."""

    def __init__(self, model: DeepseekV2ForCausalLM, dtype: torch.dtype, wrap: Compile = lambda f: f) -> None:
        self.model, self.dtype = model, dtype
        self.config: Any = model.config  # for type checkers, any of its numbers could be None
        self.rotary = model.model.rotary_emb
        self.project = wrap(self.project_qkv)
        self.dense = wrap(self.add_dense)
        self.sparse = wrap(self.add_sparse)
        self.score = wrap(self.score_tokens)

    def project_qkv(
        self, x: Tensor, cos: Tensor, sin: Tensor, weights: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        ln, q_a, q_ln, q_b, kv_a, kv_ln, kv_b = weights
        heads, nope = c.num_attention_heads, c.qk_nope_head_dim
        h = norm(x, ln)
        q = linear(norm(linear(h, q_a), q_ln), q_b).unflatten(-1, (heads, -1))
        latent, k_pe = linear(h, kv_a).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        k_nope, v = linear(norm(latent, kv_ln), kv_b).unflatten(-1, (heads, -1)).split([nope, c.v_head_dim], -1)
        q = torch.cat((q[..., :nope], rotate(q[..., nope:], cos[:, None], sin[:, None])), -1)
        k_pe = rotate(k_pe, cos, sin)[:, None].expand(-1, heads, -1)
        return q, torch.cat((k_nope, k_pe), -1), v.contiguous()

    def add_dense(self, x: Tensor, out: Tensor, o_proj: Tensor, ln: Tensor, *mlp: Tensor) -> Tensor:
        x = x + linear(out, o_proj)
        return x + swiglu(norm(x, ln), *mlp)

    def add_sparse(
        self,
        x: Tensor,
        out: Tensor,
        o_proj: Tensor,
        ln: Tensor,
        router: Tensor,
        gate_up: Tensor,
        down: Tensor,
        *shared: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Also the balance loss: 1 where the experts are used evenly (arXiv:2101.03961, section 2.2)."""
        c = self.config
        x = x + linear(out, o_proj)
        h = norm(x, ln)
        scores = F.linear(h.float(), router).softmax(-1)
        groups = scores.unflatten(-1, (c.n_group, -1)).amax(-1)
        best = torch.zeros_like(groups).scatter(-1, groups.topk(c.topk_group).indices, 1.0)
        allowed = scores * best.repeat_interleave(c.n_routed_experts // c.n_group, -1)
        chosen = torch.zeros_like(scores).scatter(-1, allowed.topk(c.num_experts_per_tok).indices, 1.0)
        share = (scores * chosen * c.routed_scaling_factor).to(x.dtype)
        gate, up = linear(h, gate_up.flatten(0, 1)).unflatten(-1, (c.n_routed_experts, 2, -1)).unbind(-2)
        hidden = F.silu(gate) * up * share[..., None]
        routed = linear(hidden.flatten(-2), down.transpose(0, 1).flatten(1))
        balance = (chosen.mean(0) * scores.mean(0)).sum() * c.n_routed_experts / c.num_experts_per_tok
        return x + routed + swiglu(h, *shared), balance

    def score_tokens(self, x: Tensor, ln: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = linear(norm(x, ln), head).float()
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
        q, k, v = (t.unflatten(0, (batch, -1)).transpose(1, 2) for t in (q, k, v))
        scale = self.model.model.layers[0].self_attn.scaling
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def run_layers(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after all layers, [tokens, hidden], and the mean balance loss."""
        batch, length = tokens.shape
        angles = torch.arange(length, device=tokens.device)[:, None] * self.rotary.inv_freq
        cos, sin = angles.cos().repeat(batch, 1), angles.sin().repeat(batch, 1)
        x = F.embedding(tokens.flatten(), self.model.model.embed_tokens.weight).to(self.dtype)
        balances = []
        for layer in self.model.model.layers:
            a, mlp = layer.self_attn, layer.mlp
            modules = (layer.input_layernorm, a.q_a_proj, a.q_a_layernorm, a.q_b_proj, a.kv_a_proj_with_mqa,
                       a.kv_a_layernorm, a.kv_b_proj)  # fmt: skip
            q, k, v = self.project(x, cos, sin, tuple(m.weight for m in modules))
            out = self.attend(q, k, v, batch)
            both = (x, out, a.o_proj.weight, layer.post_attention_layernorm.weight)
            if hasattr(mlp, "experts"):
                routed = (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj)
                x, balance = self.sparse(*both, *routed, *list_mlp(mlp.shared_experts))
                balances.append(balance)
            else:
                x = self.dense(*both, *list_mlp(mlp))
        return x, torch.stack(balances).mean()

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each token but the last of a row: its loss, and whether the next token is the likeliest one,
        both [rows, length - 1]. And the balance loss."""
        x, balance = self.run_layers(tokens)
        targets = tokens.roll(-1, 1).flatten()
        loss, right = self.score(x, self.model.model.norm.weight, self.model.lm_head.weight, targets)
        return loss.view_as(tokens)[:, :-1], right.view_as(tokens)[:, :-1], balance


def list_mlp(mlp: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight  # type: ignore[union-attr, return-value]


class Muon:
    """Momentum whose update is made orthogonal (Keller Jordan, kellerjordan.github.io/posts/muon).

    For matrices or stacks of them; those of one shape are updated together.
    """

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        self.lr, self.momentum = lr, momentum
        self.groups: dict[torch.Size, list[Tensor]] = {}
        for p in parameters:
            self.groups.setdefault(p.shape, []).append(p)
        self.buffers = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for shape, group in self.groups.items():
            gradients = torch.stack([p.grad for p in group if p.grad is not None])
            buffer = self.buffers[shape].lerp_(gradients, 1 - self.momentum)
            update = orthogonalize(gradients.lerp(buffer, self.momentum))
            update = update * (self.lr * scale * max(1.0, shape[-2] / shape[-1]) ** 0.5)
            torch._foreach_sub_(group, list(update.unbind(0)))


def orthogonalize(x: Tensor) -> Tensor:
    """U V^T of the singular value decomposition, nearly, by five steps of a Newton-Schulz iteration."""
    y = x.bfloat16() if x.is_cuda else x
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in [(3.4445, -4.775, 2.0315)] * 5:
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    result: Tensor = (y.mT if tall else y).float()
    return result
