"""A forward pass for training that uses the parameters of transformers' DeepseekV2ForCausalLM.

The results are the same, but faster: attention is one fused kernel in its multi-head form, and
every token goes through all of the tiny experts as one wide MLP, in which experts that were not
chosen have weight 0. `train_demo.py` has the training loop.
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
SDPA_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm, computed in float32."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
    return weight.to(x.dtype) * y.to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to interleaved pairs and return the result in halves.

    The different order does not matter: only dot products of two rotated vectors are used.
    """
    even = x[..., 0::2].float()
    odd = x[..., 1::2].float()
    rotated = (even * cos - odd * sin, even * sin + odd * cos)
    return torch.cat(rotated, -1).to(x.dtype)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


class TrainingForward:
    """The loss and the balance loss of rows of equal length.

    `wrap` is applied to the pieces of the forward pass, such as `torch.compile`. If it compiles for
    fixed shapes, every call should have the same number of tokens in all.
    """

    def __init__(
        self, model: DeepseekV2ForCausalLM, dtype: torch.dtype, wrap: Compile = lambda f: f
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.config: Any = model.config  # Any, because its numbers are typed as optional
        self.rotary = model.model.rotary_emb
        self.project = wrap(self.project_qkv)
        self.dense = wrap(self.add_dense)
        self.sparse = wrap(self.add_sparse)
        self.score = wrap(self.score_tokens)

    def project_qkv(
        self, x: Tensor, cos: Tensor, sin: Tensor, weights: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [tokens, hidden] to q, k and v, each [tokens, heads, head_dim]."""
        config = self.config
        num_heads = config.num_attention_heads
        nope_dim = config.qk_nope_head_dim
        ln, q_a, q_a_ln, q_b, kv_a, kv_a_ln, kv_b = weights

        h = norm(x, ln)
        q_latent = norm(linear(h, q_a), q_a_ln)
        q = linear(q_latent, q_b).unflatten(-1, (num_heads, -1))
        q_pe = rotate(q[..., nope_dim:], cos[:, None], sin[:, None])
        q = torch.cat((q[..., :nope_dim], q_pe), -1)

        latent, k_pe = linear(h, kv_a).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        kv = linear(norm(latent, kv_a_ln), kv_b).unflatten(-1, (num_heads, -1))
        k_nope, v = kv.split([nope_dim, config.v_head_dim], -1)
        k_pe = rotate(k_pe, cos, sin)[:, None].expand(-1, num_heads, -1)
        k = torch.cat((k_nope, k_pe), -1)
        return q, k, v.contiguous()

    def add_dense(self, x: Tensor, out: Tensor, o_proj: Tensor, ln: Tensor, *mlp: Tensor) -> Tensor:
        """Finish a dense layer: add the attention's output and the MLP to the residual stream."""
        x = x + linear(out, o_proj)
        return x + swiglu(norm(x, ln), *mlp)

    def choose_experts(self, scores: Tensor) -> Tensor:
        """Group-limited top-k: 1 for each chosen expert, else 0. `scores` is [tokens, experts]."""
        config = self.config
        group_scores = scores.unflatten(-1, (config.n_group, -1)).amax(-1)
        best_groups = group_scores.topk(config.topk_group).indices
        group_mask = torch.zeros_like(group_scores).scatter(-1, best_groups, 1.0)
        experts_per_group = config.n_routed_experts // config.n_group
        allowed = scores * group_mask.repeat_interleave(experts_per_group, -1)
        best_experts = allowed.topk(config.num_experts_per_tok).indices
        return torch.zeros_like(scores).scatter(-1, best_experts, 1.0)

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
        """Finish a layer with experts: return the residual stream and the balance loss.

        The balance loss is 1 where the experts are used evenly (arXiv:2101.03961, section 2.2).
        """
        config = self.config
        num_experts = config.n_routed_experts
        x = x + linear(out, o_proj)
        h = norm(x, ln)

        scores = F.linear(h.float(), router).softmax(-1)
        chosen = self.choose_experts(scores)
        expert_weights = (scores * chosen * config.routed_scaling_factor).to(x.dtype)

        # All experts as one wide MLP; an expert that was not chosen has weight 0.
        gate_and_up = linear(h, gate_up.flatten(0, 1)).unflatten(-1, (num_experts, 2, -1))
        gate, up = gate_and_up.unbind(-2)
        hidden = F.silu(gate) * up * expert_weights[..., None]
        routed = linear(hidden.flatten(-2), down.transpose(0, 1).flatten(1))

        balance = (chosen.mean(0) * scores.mean(0)).sum()
        balance = balance * num_experts / config.num_experts_per_tok
        return x + routed + swiglu(h, *shared), balance

    def score_tokens(
        self, x: Tensor, ln: Tensor, head: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For each token: the loss of its target, and whether the target is the likeliest token."""
        logits = linear(norm(x, ln), head).float()
        loss = F.cross_entropy(logits, targets, reduction="none")
        return loss, logits.argmax(-1) == targets

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
        """Causal attention within each of `batch` rows. Returns [tokens, heads * v_head_dim]."""
        q, k, v = (t.unflatten(0, (batch, -1)).transpose(1, 2) for t in (q, k, v))
        scale = self.model.model.layers[0].self_attn.scaling
        with sdpa_kernel(SDPA_BACKENDS, True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def run_layers(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after all layers, [tokens, hidden], and the mean balance loss."""
        batch, length = tokens.shape
        angles = torch.arange(length, device=tokens.device)[:, None] * self.rotary.inv_freq
        cos = angles.cos().repeat(batch, 1)  # [tokens, rope_dim / 2]
        sin = angles.sin().repeat(batch, 1)

        embedding = self.model.model.embed_tokens.weight
        x = F.embedding(tokens.flatten(), embedding).to(self.dtype)
        balances = []
        for layer in self.model.model.layers:
            attn = layer.self_attn
            mlp = layer.mlp
            projections = (
                layer.input_layernorm.weight,
                attn.q_a_proj.weight,
                attn.q_a_layernorm.weight,
                attn.q_b_proj.weight,
                attn.kv_a_proj_with_mqa.weight,
                attn.kv_a_layernorm.weight,
                attn.kv_b_proj.weight,
            )
            q, k, v = self.project(x, cos, sin, projections)
            out = self.attend(q, k, v, batch)

            o_proj = attn.o_proj.weight
            ln = layer.post_attention_layernorm.weight
            if hasattr(mlp, "experts"):
                experts = (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj)
                shared = list_mlp(mlp.shared_experts)
                x, balance = self.sparse(x, out, o_proj, ln, *experts, *shared)
                balances.append(balance)
            else:
                x = self.dense(x, out, o_proj, ln, *list_mlp(mlp))
        return x, torch.stack(balances).mean()

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score how well each token of a row predicts the next one.

        Args:
            tokens: [rows, length].

        Returns:
            The loss of each next token, whether it is the likeliest one (both [rows, length - 1]),
            and the balance loss.
        """
        x, balance = self.run_layers(tokens)
        targets = tokens.roll(-1, 1).flatten()
        norm_weight = self.model.model.norm.weight
        loss, right = self.score(x, norm_weight, self.model.lm_head.weight, targets)
        # The last token of a row has no next one.
        loss = loss.view_as(tokens)[:, :-1]
        right = right.view_as(tokens)[:, :-1]
        return loss, right, balance


def list_mlp(mlp: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight  # type: ignore[union-attr, return-value]


class Muon:
    """Momentum whose update is made orthogonal (kellerjordan.github.io/posts/muon).

    It takes matrices or stacks of matrices. Parameters of the same shape are updated together.
    """

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        self.lr = lr
        self.momentum = momentum
        self.groups: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            self.groups.setdefault(parameter.shape, []).append(parameter)
        self.buffers = {
            shape: torch.zeros(len(group), *shape, device=group[0].device)
            for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update all parameters with the learning rate times `scale`."""
        for shape, group in self.groups.items():
            gradients = torch.stack([p.grad for p in group if p.grad is not None])
            buffer = self.buffers[shape].lerp_(gradients, 1 - self.momentum)
            update = orthogonalize(gradients.lerp(buffer, self.momentum))
            aspect = max(1.0, shape[-2] / shape[-1])
            update = update * (self.lr * scale * aspect**0.5)
            torch._foreach_sub_(group, list(update.unbind(0)))


def orthogonalize(x: Tensor) -> Tensor:
    """Approximate U V^T of the singular value decomposition by five Newton-Schulz steps."""
    a = 3.4445
    b = -4.775
    c = 2.0315
    y = x.bfloat16() if x.is_cuda else x
    is_tall = y.shape[-2] > y.shape[-1]
    if is_tall:
        y = y.mT
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    result: Tensor = (y.mT if is_tall else y).float()
    return result
