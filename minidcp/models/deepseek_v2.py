"""DeepSeek-V2 on one rank: MLA over an interleaved latent cache, and the layers around it.

Prefill attends in MHA form, decode in absorbed form; `MLAAttention` shows them side by side. What a
kernel does is in `kernels/`, who holds which token in `kv_cache/interleave.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minidcp.attention import AttentionBackend
from minidcp.batch import ForwardBatch
from minidcp.config import ModelConfig
from minidcp.kernels.kv_store import store_latents
from minidcp.kernels.merge import merge_partials
from minidcp.kernels.rope import rotate
from minidcp.kv_cache.latent_cache import LatentCache
from minidcp.models.layers import MLP, Linear, LMHead, MoE, RMSNorm, VocabParallelEmbedding
from minidcp.models.rope import RotaryEmbedding
from minidcp.models.weights import Shard, Weights
from minidcp.parallel.exchange import Exchange, gather_heads
from minidcp.parallel.state import ParallelState

LATENT_NORM_EPS = 1e-6  # of the q_a and kv_a norms, whatever rms_norm_eps says


@dataclass(frozen=True)
class Blueprint:
    """What every layer of one rank is built from. `narrow`: whether any step may exchange narrow."""

    config: ModelConfig
    state: ParallelState
    attention: AttentionBackend
    exchange: Exchange
    narrow: bool


class MLAAttention:
    """Multi-head latent attention (arXiv:2405.04434 §2.1) for this rank's heads.

    H heads are this rank's, G those of its DCP group. W_UK and W_UV are the halves of kv_b_proj, held
    for the group's heads if `narrow` exchanges can occur, else for this rank's.
    """

    def __init__(self, blueprint: Blueprint, weights: Weights) -> None:
        c, state, narrow = blueprint.config, blueprint.state, blueprint.narrow
        tp = state.tp
        self.config, self.state = c, state
        self.attention, self.exchange = blueprint.attention, blueprint.exchange
        self.num_heads = c.num_attention_heads // tp.size
        own_heads = Shard(0, tp.rank, tp.size)
        if c.q_lora_rank is None:
            self.q_a_proj = None
            q_in, q_name = c.hidden_size, "q_proj"
        else:
            self.q_a_proj = Linear(
                c.hidden_size, c.q_lora_rank, weights.scope("q_a_proj"), bias=c.attention_bias
            )
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, weights.scope("q_a_layernorm"), LATENT_NORM_EPS)
            q_in, q_name = c.q_lora_rank, "q_b_proj"
        self.q_b_proj = Linear(
            q_in, c.num_attention_heads * c.qk_head_dim, weights.scope(q_name), own_heads
        )  # q_proj where there is no q_lora
        self.q_b_proj.reorder_rope(self.num_heads, c.qk_rope_head_dim)

        self.kv_a_proj_with_mqa = Linear(
            c.hidden_size, c.latent_dim, weights.scope("kv_a_proj_with_mqa"), bias=c.attention_bias
        )
        self.kv_a_proj_with_mqa.reorder_rope(1, c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, weights.scope("kv_a_layernorm"), LATENT_NORM_EPS)

        rows = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        group_heads = Shard(0, state.dcp_group_index, tp.size // state.dcp.size)
        shard = group_heads if narrow else own_heads
        kv_b_proj = weights.read("kv_b_proj.weight", rows, c.kv_lora_rank, shard=shard)
        by_head = kv_b_proj.view(-1, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
        w_uk, w_uv = by_head.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        self.group_w_uk, self.group_w_uv = w_uk, w_uv  # [G or H, nope, C], [G or H, v, C]
        first = state.dcp.rank * self.num_heads if narrow else 0
        own = slice(first, first + self.num_heads)
        self.w_uk, self.w_uv = w_uk[own], w_uv[own]  # [H, nope, C], [H, v, C]; views, no second copy

        self.o_proj = Linear(
            c.num_attention_heads * c.v_head_dim,
            c.hidden_size,
            weights.scope("o_proj"),
            Shard(1, tp.rank, tp.size),
            bias=c.attention_bias,
        )

    def __call__(self, x: Tensor, cos_sin: Tensor, kv: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden], replicated -> this rank's summand of the output [T, hidden]."""
        c, d = self.config, batch.num_decode
        q = x if self.q_a_proj is None else self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q).view(-1, self.num_heads, c.qk_head_dim)
        q_nope, q_pe = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_pe = rotate(q_pe, cos_sin)

        norm = self.kv_a_layernorm
        new = self.kv_a_proj_with_mqa(x)
        latents = store_latents(new, norm.weight, norm.eps, cos_sin, kv, batch.slot_mapping)

        parts = []
        if d:
            parts.append(self.decode(q_nope[:d], q_pe[:d], kv, batch))
        if batch.prefill is not None:
            q_new = torch.cat([q_nope[d:], q_pe[d:]], -1)
            parts.append(self.prefill(q_new, latents[d:], kv, batch))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.o_proj(out.flatten(1))

    def decode(self, q_nope: Tensor, q_pe: Tensor, kv: Tensor, batch: ForwardBatch) -> Tensor:
        """Absorbed form over the sharded cache -> [T, H, v].

        Absorption and W_UV commute with the exchange (its weights are scalars per head), so they can
        stand on either side of it. Wide: this rank's heads, 576 values of q and 512 of output cross per
        head. Narrow: the group's heads, 192 and 128 cross.
        """
        dcp = self.state.dcp
        if batch.narrow:
            q = gather_heads(torch.cat([q_nope, q_pe], -1), dcp)  # [T, G, nope + rope]
            q_nope, q_pe = q.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], -1)
            q_latent = torch.einsum("thn,hnc->thc", q_nope, self.group_w_uk)
            out, lse = self.attention.decode(q_latent, q_pe, kv, batch)
            out = torch.einsum("thc,hvc->thv", out, self.group_w_uv)
            return self.exchange(out, lse, dcp)[0]
        q_latent = torch.einsum("thn,hnc->thc", q_nope, self.w_uk)
        if dcp.size > 1:
            q = gather_heads(torch.cat([q_latent, q_pe], -1), dcp)  # [T, G, C + rope]
            q_latent, q_pe = q.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        out, lse = self.attention.decode(q_latent, q_pe, kv, batch)
        if dcp.size > 1:
            out, lse = self.exchange(out, lse, dcp)
        return torch.einsum("thc,hvc->thv", out, self.w_uv)

    def prefill(self, q: Tensor, latents: Tensor, kv: Tensor, batch: ForwardBatch) -> Tensor:
        """MHA form, this rank's heads: new tokens among themselves, and what they find in the cache
        (gathered from all shards), merged by LSE -> [T, H, v]."""
        assert batch.prefill is not None
        out, lse = self.attention.prefill(q, *self.decompress(latents), batch.prefill)
        if batch.context is None:
            return out
        shard = kv.flatten(0, 1)[batch.context.slots]  # [S, C + rope]
        context = self.state.dcp.all_gather(shard).flatten(0, 1)[batch.context.index]  # [P, C + rope]
        seen, seen_lse = self.attention.prefill(q, *self.decompress(context), batch.context.varlen)
        return merge_partials(torch.stack([out, seen]), torch.stack([lse, seen_lse]))[0]

    def decompress(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[T, C + rope] -> k [T, H, nope + rope] and v [T, H, v] of this rank's heads."""
        kv_c, k_pe = latents.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        k_nope = torch.einsum("tc,hnc->thn", kv_c, self.w_uk)
        v = torch.einsum("tc,hvc->thv", kv_c, self.w_uv)
        return torch.cat([k_nope, k_pe[:, None].expand(-1, self.num_heads, -1)], -1), v


class DecoderLayer:
    def __init__(self, blueprint: Blueprint, index: int, weights: Weights) -> None:
        config, state = blueprint.config, blueprint.state
        self.tp = state.tp
        norm = (config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(norm[0], weights.scope("input_layernorm"), norm[1])
        self.post_attention_layernorm = RMSNorm(norm[0], weights.scope("post_attention_layernorm"), norm[1])
        self.self_attn = MLAAttention(blueprint, weights.scope("self_attn"))
        self.mlp: MoE | MLP
        if config.is_moe_layer(index):
            self.mlp = MoE(config, state, weights.scope("mlp"))
        else:
            self.mlp = MLP(config, config.intermediate_size, state, weights.scope("mlp"))

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, kv: Tensor, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """The layer's last summand and the residual stream without it, so that the next norm adds both."""
        x, residual = self.input_layernorm.add(x, residual)
        x = self.tp.all_reduce(self.self_attn(x, cos_sin, kv, batch))
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.tp.all_reduce(self.mlp(x)), residual


class DeepseekV2ForCausalLM:
    """The whole model on one rank, for positions below `max_model_len`."""

    def __init__(self, blueprint: Blueprint, weights: Weights, max_model_len: int) -> None:
        config, state = blueprint.config, blueprint.state
        self.attention = blueprint.attention
        model = weights.scope("model")
        self.embed_tokens = VocabParallelEmbedding(config, state.tp, model.scope("embed_tokens"))
        self.layers = [
            DecoderLayer(blueprint, i, model.scope(f"layers.{i}")) for i in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, model.scope("norm"), config.rms_norm_eps)
        head = self.embed_tokens.weight
        if not config.tie_word_embeddings:
            shape, shard = (config.vocab_size, config.hidden_size), Shard(0, state.tp.rank, state.tp.size)
            head = weights.read("lm_head.weight", *shape, shard=shard)
        self.lm_head = LMHead(head, config.vocab_size, state.tp)
        device = self.embed_tokens.weight.device
        self.rotary = RotaryEmbedding(config.rope, config.qk_rope_head_dim, max_model_len, device)

    def __call__(self, token_ids: Tensor, cache: LatentCache, batch: ForwardBatch) -> Tensor:
        """token_ids [T] -> float32 logits [S, vocab] of the batch's sampled tokens, on every rank."""
        self.attention.plan(batch)
        cos_sin = self.rotary.at(batch.positions)
        x, residual = self.embed_tokens(token_ids), None
        for i, layer in enumerate(self.layers):
            x, residual = layer(x, residual, cos_sin, cache.layer(i), batch)
        assert residual is not None
        if not len(batch.sample_index):  # chunks that end before their prompts do
            return x.new_empty(0, self.lm_head.vocab_size, dtype=torch.float32)
        return self.lm_head(self.norm.add(x[batch.sample_index], residual[batch.sample_index])[0])
