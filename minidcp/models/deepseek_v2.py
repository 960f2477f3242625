"""DeepSeek-V2 on one rank: MLA over an interleaved latent cache, and the layers around it. Prefill attends in MHA form,
decode absorbed; `MLAAttention` shows both. Kernels are in `kernels/`, who holds a token in `kv_cache/interleave.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minidcp.attention import AttentionBackend
from minidcp.batch import CacheRows, ForwardBatch
from minidcp.kernels.experts import Parts
from minidcp.kernels.kv_store import store_latents
from minidcp.kernels.linear import multiply_by_head
from minidcp.kernels.merge import merge_partials
from minidcp.model_config import ModelConfig
from minidcp.models.layers import MLP, Linear, LMHead, MoE, RMSNorm, VocabParallelEmbedding, join
from minidcp.models.rope import rotary_table
from minidcp.models.weights import Shard, Weights
from minidcp.parallel.exchange import Exchange, exchange_p2p, gather_heads
from minidcp.parallel.state import ParallelState

LATENT_NORM_EPS = 1e-6  # of the q_a and kv_a norms, whatever rms_norm_eps says


@dataclass(frozen=True)
class Blueprint:
    """What every layer of one rank is built from."""

    config: ModelConfig
    state: ParallelState
    attention: AttentionBackend
    exchange: Exchange
    group_heads: bool  # whether it needs W_UK and W_UV of all heads of its DCP group
    replicated_q: bool  # whether it computes their q, too


class MLAAttention:
    """Multi-head latent attention (arXiv:2405.04434 §2.1): H heads of this rank, G of its DCP group."""

    def __init__(self, blueprint: Blueprint, weights: Weights) -> None:
        c, state, bias = blueprint.config, blueprint.state, blueprint.config.attention_bias
        tp, dcp = state.tp, state.dcp
        self.config, self.state, self.replicated_q = c, state, blueprint.replicated_q
        self.attention, self.exchange = blueprint.attention, blueprint.exchange
        self.num_heads = c.num_attention_heads // tp.size
        own_heads = Shard(0, tp.rank, tp.size)
        group_heads = Shard(0, tp.rank // dcp.size, tp.size // dcp.size)
        own = slice(dcp.rank * self.num_heads, (dcp.rank + 1) * self.num_heads)  # of the group's heads

        kv_a = Linear.read(c.hidden_size, c.latent_dim, weights.scope("kv_a_proj_with_mqa"), bias=bias)
        kv_a = kv_a.reorder_rope(1, c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, weights.scope("kv_a_layernorm"), LATENT_NORM_EPS)
        lora, q_in, q_scope = c.q_lora_rank is not None, c.q_lora_rank or c.hidden_size, weights.scope("q_proj")
        if lora:
            q_a = Linear.read(c.hidden_size, q_in, weights.scope("q_a_proj"), bias=bias)
            self.q_a_layernorm = RMSNorm(q_in, weights.scope("q_a_layernorm"), LATENT_NORM_EPS)
            q_scope = weights.scope("q_b_proj")
        q_shard = group_heads if self.replicated_q else own_heads
        q = Linear.read(q_in, c.num_attention_heads * c.qk_head_dim, q_scope, q_shard)
        q = q.reorder_rope(c.num_attention_heads // q_shard.count, c.qk_rope_head_dim)
        # What is computed from the layer's input in one product, the latents last; then q, where it is not among it.
        self.a_proj = join(q_a, kv_a) if lora else kv_a if self.replicated_q else join(q, kv_a)
        self.q_b_proj = q if lora or self.replicated_q else None
        self.own_q_b_proj = self.q_b_proj
        if self.replicated_q:
            self.own_q_b_proj = Linear(q.weight.view(-1, c.qk_head_dim, q_in)[own].flatten(0, 1))

        width, kv_shard = c.qk_nope_head_dim + c.v_head_dim, group_heads if blueprint.group_heads else own_heads
        # W_UK and W_UV are its halves.
        kv_b = weights.read("kv_b_proj.weight", c.num_attention_heads * width, c.kv_lora_rank, shard=kv_shard)
        w_uk, w_uv = kv_b.view(-1, width, c.kv_lora_rank).split([c.qk_nope_head_dim, c.v_head_dim], 1)
        kv_b = torch.cat([w_uv, w_uk], 1)  # in the order that `decompress` wants; what follows are views of it
        self.group_w_uv, self.group_w_uk = kv_b.split([c.v_head_dim, c.qk_nope_head_dim], 1)  # [G or H, v or nope, C]
        self.kv_b = kv_b[own] if blueprint.group_heads else kv_b  # [H, v + nope, C]
        self.w_uv, self.w_uk = self.kv_b.split([c.v_head_dim, c.qk_nope_head_dim], 1)  # [H, v, C], [H, nope, C]

        o_in, by_input = c.num_attention_heads * c.v_head_dim, Shard(1, tp.rank, tp.size)
        self.o_proj = Linear.read(o_in, c.hidden_size, weights.scope("o_proj"), by_input, bias)

    def __call__(self, x: Tensor, cos_sin: Tensor, kv: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden], replicated -> this rank's summand of the output [T, hidden]."""
        d, width = batch.num_decode, self.config.latent_dim
        joint = self.a_proj(x)
        first, new = joint[:, :-width], joint[:, -width:]
        if self.q_b_proj is not None:
            first = x if first.shape[1] == 0 else self.q_a_layernorm(first)

        def store(q: Tensor, rows: slice) -> Tensor:
            q_pe, norm = q[..., -self.config.qk_rope_head_dim :], self.kv_a_layernorm
            return store_latents(new[rows], q_pe, norm.weight, norm.eps, cos_sin[rows], kv, batch.slot_mapping[rows])

        parts = []
        if batch.decode is not None:
            rows, place = slice(d), None
            if batch.decode.narrow and not self.replicated_q:  # the next collective gathers it
                place = self.state.dcp.empty((d, self.num_heads * self.config.qk_head_dim), x)
            q = self.project_q(first[rows], self.replicated_q, place)
            store(q, rows)
            parts.append(self.attend_shards(q, kv, batch.decode)[0])
        if batch.prefill is not None:
            rows, sends_q = slice(d, None), any(isinstance(piece, CacheRows) for piece in batch.context)
            q = self.project_q(first[rows], self.replicated_q and sends_q)
            latents = store(q, rows)
            parts.append(self.prefill(q, latents, kv, batch))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.o_proj(out.flatten(1))

    def attend_shards(self, q: Tensor, kv: Tensor, rows: CacheRows) -> tuple[Tensor, Tensor]:
        """Absorbed form over the sharded cache; q [T, H, nope + rope], or [T, G, …] where q is replicated -> [T, H, v]
        and lse [T, H].

        Absorption and W_UV commute with the exchange (its weights are scalars per head), so they can stand on either
        side of it. Wide: this rank's heads, 576 values of q and 512 of output cross per head. Narrow: the group's
        heads, 192 and 128 cross. Where ranks read each other's memory, what crosses is written there at once."""
        c, dcp, tokens = self.config, self.state.dcp, len(q)
        if rows.narrow and not self.replicated_q:
            q = gather_heads(q, dcp)  # [T, G, nope + rope]
        q_nope, q_pe = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        if rows.narrow or self.replicated_q or dcp.size == 1:
            q_latent = multiply_by_head(q_nope, self.group_w_uk.mT)
        else:
            wide = dcp.empty((tokens, self.num_heads, c.latent_dim), q)
            multiply_by_head(q_nope, self.w_uk.mT, wide[..., : c.kv_lora_rank])
            wide[..., c.kv_lora_rank :] = q_pe
            # [T, G, C + rope]
            q_latent, q_pe = gather_heads(wide, dcp).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)

        # Other exchanges than p2p fill the group's memory before they have read the partial.
        place = None
        if self.exchange is exchange_p2p:
            dim = c.v_head_dim if rows.narrow else c.kv_lora_rank
            place = dcp.empty((tokens, q_latent.shape[1], dim), q)
        latent, lse = self.attention.decode(q_latent, q_pe, kv, rows, None if rows.narrow else place)
        if rows.narrow:
            return self.exchange(multiply_by_head(latent, self.group_w_uv, place), lse, dcp)
        if dcp.size > 1:
            latent, lse = self.exchange(latent, lse, dcp)
        return multiply_by_head(latent, self.w_uv), lse

    def prefill(self, q: Tensor, latents: Tensor, kv: Tensor, batch: ForwardBatch) -> Tensor:
        """MHA form, this rank's heads: new tokens among themselves, merged by LSE with what they find in the cache;
        q [T, H, nope + rope] (or [T, G, …]) -> [T, H, v]. For the two ways to the cache see `ContextPolicy`."""
        assert batch.prefill is not None
        every, first = q, self.state.dcp.rank * self.num_heads if q.shape[1] > self.num_heads else 0
        q = q[:, first : first + self.num_heads]
        out, lse = self.attention.prefill(q, *self.decompress(latents), batch.prefill)
        for piece in batch.context:
            some = piece.tokens
            if isinstance(piece, CacheRows):
                seen, seen_lse = self.attend_shards(every[some], kv, piece)
            else:
                shard = kv.flatten(0, 1)[piece.slots]  # [S, C + rope]
                context = self.state.dcp.all_gather(shard)[piece.row, piece.owner]  # [P, C + rope]
                seen, seen_lse = self.attention.prefill(q[some], *self.decompress(context), piece.varlen)
            out[some], lse[some] = merge_partials(torch.stack([out[some], seen]), torch.stack([lse[some], seen_lse]))
        return out

    def project_q(self, x: Tensor, group: bool, out: Tensor | None = None) -> Tensor:
        """x [T, q's input], or q itself [T, H · (nope + rope)] -> q [T, H or G, nope + rope], not rotated yet."""
        proj = self.q_b_proj if group else self.own_q_b_proj
        q = x if proj is None else proj(x, out)
        return q.view(len(x), -1, self.config.qk_head_dim)

    def decompress(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[T, C + rope] -> k [T, H, nope + rope] and v [T, H, v] of this rank's heads, which lie in one tensor."""
        c, rope = self.config, self.config.qk_rope_head_dim
        kv = latents.new_empty(len(latents), self.num_heads, c.v_head_dim + c.qk_head_dim)
        kv_c = latents[:, :-rope].expand(self.num_heads, -1, -1)
        torch.bmm(kv_c, self.kv_b.mT, out=kv[..., :-rope].transpose(0, 1))
        kv[..., -rope:] = latents[:, None, -rope:]
        return kv[..., c.v_head_dim :], kv[..., : c.v_head_dim]


class DecoderLayer:
    def __init__(self, blueprint: Blueprint, index: int, weights: Weights) -> None:
        config, mlp = blueprint.config, weights.scope("mlp")
        self.tp, hidden, eps = blueprint.state.tp, config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, weights.scope("input_layernorm"), eps)
        self.post_attention_layernorm = RMSNorm(hidden, weights.scope("post_attention_layernorm"), eps)
        self.self_attn = MLAAttention(blueprint, weights.scope("self_attn"))
        dense = not config.is_moe_layer(index)
        self.mlp = MLP(hidden, config.intermediate_size, self.tp, mlp) if dense else MoE(config, self.tp, mlp)

    def __call__(
        self, x: Tensor | Parts, residual: Tensor | None, cos_sin: Tensor, kv: Tensor, batch: ForwardBatch
    ) -> tuple[Tensor | Parts, Tensor]:
        """The layer's last summand and the residual stream without it, so that the next norm adds both."""
        x, residual = self.input_layernorm.add(x, residual)
        x = self.tp.all_reduce(self.self_attn(x, cos_sin, kv, batch))
        x, residual = self.post_attention_layernorm.add(x, residual)
        x = self.mlp(x)
        if self.tp.size > 1:
            x = self.tp.all_reduce(x.sum() if isinstance(x, Parts) else x)
        return x, residual


class DeepseekV2ForCausalLM:
    """The whole model on one rank, for positions below `max_model_len`."""

    def __init__(self, blueprint: Blueprint, weights: Weights, max_model_len: int) -> None:
        config, state = blueprint.config, blueprint.state
        self.attention = blueprint.attention
        model = weights.scope("model")
        self.embed_tokens = VocabParallelEmbedding(config, state.tp, model.scope("embed_tokens"))
        self.layers = [DecoderLayer(blueprint, i, model.scope(f"layers.{i}")) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, model.scope("norm"), config.rms_norm_eps)
        head = self.embed_tokens.weight
        if not config.tie_word_embeddings:
            by_token = Shard(0, state.tp.rank, state.tp.size)
            head = weights.read("lm_head.weight", config.vocab_size, config.hidden_size, shard=by_token)
        self.lm_head = LMHead(head, config.vocab_size, state.tp)
        self.cos_sin = rotary_table(config.rope, config.qk_rope_head_dim, max_model_len).to(head.device)

    def __call__(self, token_ids: Tensor, cache: Tensor, batch: ForwardBatch) -> Tensor:
        """token_ids [T] -> this rank's logits [S, V / N] of the batch's sampled tokens; see `LMHead`."""
        for rows in (batch.decode, *batch.context):
            if isinstance(rows, CacheRows):
                self.attention.plan(rows)
        cos_sin = self.cos_sin[batch.positions]  # shared by all layers
        x: Tensor | Parts = self.embed_tokens(token_ids)
        residual = None
        for i, layer in enumerate(self.layers):
            x, residual = layer(x, residual, cos_sin, cache[i], batch)
        return self.lm_head(self.norm.add(x, residual)[0][batch.sample_index])
