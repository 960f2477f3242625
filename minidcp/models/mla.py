"""Multi-head latent attention on one rank, over an interleaved latent cache. Prompts attend in MHA
form, decode rows absorbed. Which rank holds a token is in `kv_cache/interleave.py`, kernels are in
`kernels/`. Next: `query.py`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidcp.attention import AttentionBackend
from minidcp.batch import CacheQueries, ContextPiece, ForwardBatch, OutAndLse, Varlen
from minidcp.kernels.absorb import absorb_query
from minidcp.kernels.fp8 import Activations
from minidcp.kernels.kv_store import NewLatents, store_latents
from minidcp.kernels.linear import multiply_by_head
from minidcp.kernels.merge import merge_partials
from minidcp.model_config import ModelConfig
from minidcp.models.layers import Linear, RMSNorm, join
from minidcp.models.query import LATENT_NORM_EPS, make_query, read_q_down_proj, shard_heads
from minidcp.models.weights import Shard, Weights
from minidcp.parallel.state import ParallelState
from minidcp.resolve import ResolvedConfig


class AttentionInputs(NamedTuple):
    """What a layer computes for its attention before any token meets another.

    Attributes:
        q_input: [T, …], what `Query.project_own` takes.
        new_latents: [T, C + rope], not normed and rotated yet.
    """

    q_input: Activations
    new_latents: Tensor


class MLAAttention:
    """Multi-head latent attention (arXiv:2405.04434, §2.1).

    A token's keys and values are linear maps of one latent vector c, which all heads share:
    k = (W_UK c, k_pe) and v = W_UV c. Only c and the rotated k_pe are cached. "Absorbed" attention
    never makes k and v. It moves W_UK to the query and W_UV behind the sum over the tokens:

        q_nope · (W_UK c) = (W_UKᵀ q_nope) · c        Σ p (W_UV c) = W_UV Σ p c

    In shapes, T are tokens, H the heads of this rank, G those of its DCP group, C is kv_lora_rank.
    """

    def __init__(
        self,
        config: ModelConfig,
        options: ResolvedConfig,
        state: ParallelState,
        attention: AttentionBackend,
        weights: Weights,
    ) -> None:
        tp = state.tp
        self.config = config
        self.attention = attention
        self.tp = tp
        self.dcp = state.dcp
        self.exchange = state.exchange
        self.replicates_q = options.replicates_q
        self.num_heads = config.num_attention_heads // tp.size  # H

        # One product gives the latents and whatever q needs from the layer's input.
        self.query = make_query(config, state, self.replicates_q, weights)
        q_down_proj = read_q_down_proj(config, state, self.replicates_q, weights)
        kv_a_proj = Linear.read(
            config.hidden_size,
            config.latent_dim,
            weights.scope("kv_a_proj_with_mqa"),
            bias=config.attention_bias,
        )
        kv_a_proj = kv_a_proj.reorder_rope(1, config.qk_rope_head_dim)
        self.down_proj = kv_a_proj
        if q_down_proj is not None:
            self.down_proj = join(q_down_proj, kv_a_proj)
        self.kv_a_layernorm = RMSNorm(
            config.kv_lora_rank, weights.scope("kv_a_layernorm"), LATENT_NORM_EPS
        )

        self.read_kv_b(weights, state, options.needs_group_heads)
        self.o_proj = Linear.read(
            config.num_attention_heads * config.v_head_dim,
            config.hidden_size,
            weights.scope("o_proj"),
            shard=Shard(1, tp.rank, tp.size),
            bias=config.attention_bias,
        )

    def read_kv_b(self, weights: Weights, state: ParallelState, needs_group_heads: bool) -> None:
        """Read W_UK and W_UV, the halves of kv_b_proj, for H heads or for the group's G heads."""
        config = self.config
        shard = shard_heads(state, of_group=needs_group_heads)
        widths = [config.qk_nope_head_dim, config.v_head_dim]
        out_dim = config.num_attention_heads * sum(widths)
        kv_b = weights.read("kv_b_proj.weight", out_dim, config.kv_lora_rank, shard=shard)
        w_uk, w_uv = kv_b.view(-1, sum(widths), config.kv_lora_rank).split(widths, 1)

        # In the order that `decompress` wants. All attributes are views of this one tensor.
        kv_b = torch.cat([w_uv, w_uk], 1)  # [G or H, v + nope, C]
        widths.reverse()
        if needs_group_heads:
            self.group_w_uv, self.group_w_uk = kv_b.split(widths, 1)  # [G, v, C] and [G, nope, C]
            begin = state.dcp.rank * self.num_heads
            kv_b = kv_b[begin : begin + self.num_heads]
        self.kv_b = kv_b  # [H, v + nope, C]
        self.w_uv, self.w_uk = kv_b.split(widths, 1)  # [H, v, C] and [H, nope, C]

    def __call__(self, x: Activations, cos_sin: Tensor, kv: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden], replicated -> this rank's summand of the output [T, hidden].

        Its three steps can be called by themselves: CUDA graphs for prompts have all but `attend`.
        """
        return self.project_output(self.attend(self.project_inputs(x), cos_sin, kv, batch))

    def project_inputs(self, x: Activations) -> AttentionInputs:
        """x [T, hidden], replicated."""
        latent_dim = self.config.latent_dim
        down = self.down_proj(x)
        q_down = down[:, :-latent_dim]
        return AttentionInputs(self.query.make_input(x, q_down), down[:, -latent_dim:])

    def attend(
        self, inputs: AttentionInputs, cos_sin: Tensor, kv: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """The outputs of this rank's heads [T, H, v].

        cos_sin [T, rope] are the tokens' angles, kv [num_blocks, block_size, C + rope] is this
        layer's cache.
        """
        q_input, new_latents = inputs
        outs = []
        if batch.decode is not None:
            rows = slice(0, batch.num_decode_tokens)
            q = self.project_decode_q(q_input[rows], batch.decode)
            new = self.make_new_latents(
                new_latents[rows], cos_sin[rows], kv, batch.slot_mapping[rows]
            )
            out, _ = self.attend_cache(q, kv, batch.decode, new)
            outs.append(out)
        if batch.prefill is not None:
            rows = slice(batch.num_decode_tokens, None)
            q = self.project_prefill_q(q_input[rows], batch)
            # All rows are stored before any reads the cache, because equal prompts share blocks
            # that this very step computes.
            latents = self.store(new_latents[rows], q, cos_sin[rows], kv, batch.slot_mapping[rows])
            outs.append(self.prefill(q, latents, kv, batch.prefill, batch.context))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def project_output(self, out: Tensor) -> Tensor:
        """[T, H, v] -> this rank's summand of the layer's output [T, hidden]."""
        summand = self.tp.empty((len(out), self.config.hidden_size), out)
        return self.o_proj(out.flatten(1), summand)

    def project_decode_q(self, q_input: Activations, queries: CacheQueries) -> Tensor:
        """[T, H, nope + rope], or [T, G, nope + rope] if q is replicated."""
        if self.replicates_q:
            return self.query.project_group(q_input)
        if queries.narrow:
            # q is gathered as it is. Only its rotation, which is in place, comes between.
            return self.query.project_own(q_input, self.exchange.q_buffer)
        return self.query.project_own(q_input)

    def project_prefill_q(self, q_input: Activations, batch: ForwardBatch) -> Tensor:
        """[T, H, nope + rope], or [T, G, nope + rope] if q is replicated and meets the cache."""
        meets_cache = any(isinstance(piece, CacheQueries) for piece in batch.context)
        if self.replicates_q and meets_cache:
            return self.query.project_group(q_input)
        return self.query.project_own(q_input)

    def store(
        self,
        new_latents: Tensor,
        q: Tensor,
        cos_sin: Tensor,
        kv: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """Norm and rotate the latents and store this rank's share; rotate q in place.

        Returns all latents [T, C + rope], normed and rotated.
        """
        new = self.make_new_latents(new_latents, cos_sin, kv, slot_mapping)
        return store_latents(new, q[..., self.config.qk_nope_head_dim :])

    def make_new_latents(
        self, new_latents: Tensor, cos_sin: Tensor, kv: Tensor, slot_mapping: Tensor
    ) -> NewLatents:
        """What `store_latents` and `absorb_query` take of these tokens."""
        norm = self.kv_a_layernorm
        return NewLatents(new_latents, norm.weight, norm.eps, cos_sin, kv, slot_mapping)

    def attend_cache(
        self, q: Tensor, kv: Tensor, queries: CacheQueries, new: NewLatents | None = None
    ) -> OutAndLse:
        """Absorbed attention over the sharded cache, of decode rows or of prompts that gather q.

        q is [T, H, nope + rope], or [T, G, nope + rope] if it is replicated. `new` are latents of
        the same tokens. They are stored and q is rotated before anything else; without them q is
        rotated already. Returns the output [T, H, v] and lse [T, H].
        """
        if self.dcp.size == 1:
            return self.decode_alone(q, kv, queries, new)
        if queries.narrow:
            return self.decode_narrow(q, kv, queries, new)
        return self.decode_wide(q, kv, queries, new)

    def decode_alone(
        self, q: Tensor, kv: Tensor, queries: CacheQueries, new: NewLatents | None
    ) -> OutAndLse:
        """One rank has the whole context: nothing crosses."""
        q_latent, q_pe = absorb_query(q, self.w_uk, new)  # [T, H, C] and [T, H, rope]
        latent, lse = self.attention.decode(q_latent, q_pe, kv, queries)  # [T, H, C]
        return multiply_by_head(latent, self.w_uv), lse

    def decode_wide(
        self, q: Tensor, kv: Tensor, queries: CacheQueries, new: NewLatents | None
    ) -> OutAndLse:
        """q crosses after W_UK, results before W_UV: each rank multiplies for its own heads only.

        If q is replicated, none of it crosses, and W_UK is applied for all heads of the group.
        """
        if self.replicates_q:
            q_latent, q_pe = absorb_query(q, self.group_w_uk, new)  # [T, G, C] and [T, G, rope]
        else:
            q_latent, q_pe = self.gather_absorbed(q, new)

        partial = self.exchange.out_buffer(q_latent.shape, q)  # [T, G, C]
        partial, lse = self.attention.decode(q_latent, q_pe, kv, queries, partial)
        latent, lse = self.exchange.merge(partial, lse)  # [T, H, C]
        return multiply_by_head(latent, self.w_uv), lse

    def decode_narrow(
        self, q: Tensor, kv: Tensor, queries: CacheQueries, new: NewLatents | None
    ) -> OutAndLse:
        """q crosses before W_UK, results after W_UV: each rank multiplies for the group's heads.

        W_UK acts on each head of q by itself, and the merge weights are scalars per head, so the
        result is that of `decode_wide`. If q is replicated, none of it crosses.
        """
        if new is not None:
            store_latents(new, q[..., self.config.qk_nope_head_dim :])
        if not self.replicates_q:
            q = self.exchange.gather_q(q)  # [T, G, nope + rope]
        q_latent, q_pe = absorb_query(q, self.group_w_uk)  # [T, G, C] and [T, G, rope]
        latent, lse = self.attention.decode(q_latent, q_pe, kv, queries)  # [T, G, C]

        shape = (*latent.shape[:2], self.config.v_head_dim)
        partial = self.exchange.out_buffer(shape, latent)  # [T, G, v]
        multiply_by_head(latent, self.group_w_uv, partial)
        return self.exchange.merge(partial, lse)

    def gather_absorbed(self, q: Tensor, new: NewLatents | None) -> tuple[Tensor, Tensor]:
        """q [T, H, nope + rope] -> q_latent [T, G, C] and q_pe [T, G, rope]."""
        absorbed = self.exchange.q_buffer((*q.shape[:2], self.config.latent_dim), q)
        absorb_query(q, self.w_uk, new, absorbed)
        gathered = self.exchange.gather_q(absorbed)  # [T, G, C + rope]
        latent_rank = self.config.kv_lora_rank
        return gathered[..., :latent_rank], gathered[..., latent_rank:]

    def prefill(
        self,
        q: Tensor,
        latents: Tensor,
        kv: Tensor,
        varlen: Varlen,
        context: Sequence[CacheQueries | ContextPiece],
    ) -> Tensor:
        """New tokens among themselves in MHA form, merged with what they find in the cache.

        q [T, H, nope + rope] (or [T, G, …]) and latents [T, C + rope] -> [T, H, v]. The two ways
        to the cache are explained in `attention/context.py`.
        """
        own_q = self.take_own_heads(q)
        k, v = self.decompress(latents)
        out, lse = self.attention.prefill(own_q, k, v, varlen)
        for piece in context:
            tokens = piece.tokens
            if isinstance(piece, CacheQueries):
                seen, seen_lse = self.attend_cache(q[tokens], kv, piece)
            else:
                seen, seen_lse = self.attend_gathered(own_q[tokens], kv, piece)
            outs = torch.stack([out[tokens], seen])
            lses = torch.stack([lse[tokens], seen_lse])
            out[tokens], lse[tokens] = merge_partials(outs, lses)
        return out

    def attend_gathered(self, q: Tensor, kv: Tensor, piece: ContextPiece) -> OutAndLse:
        """MHA over a piece of context from all ranks, for this rank's q [T, H, nope + rope]."""
        shard = kv.flatten(0, 1)[piece.cache_rows]  # [S, C + rope]
        by_rank = self.dcp.all_gather(shard)  # [S, N, C + rope]
        context = by_rank[piece.sent_index, piece.owner]  # [P, C + rope]
        k, v = self.decompress(context)
        return self.attention.prefill(q, k, v, piece.varlen)

    def take_own_heads(self, q: Tensor) -> Tensor:
        if q.shape[1] == self.num_heads:
            return q
        begin = self.dcp.rank * self.num_heads
        return q[:, begin : begin + self.num_heads]

    def decompress(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[T, C + rope] -> k [T, H, nope + rope] and v [T, H, v] of this rank's heads.

        Both are views of one tensor [T, H, v + nope + rope], so that one product fills them.
        """
        config = self.config
        rope_dim = config.qk_rope_head_dim
        kv_c = latents[:, :-rope_dim].expand(self.num_heads, -1, -1)  # [H, T, C]
        k_pe = latents[:, None, -rope_dim:]  # [T, 1, rope]

        width = config.v_head_dim + config.qk_head_dim
        vk = latents.new_empty(len(latents), self.num_heads, width)
        torch.bmm(kv_c, self.kv_b.mT, out=vk[..., :-rope_dim].transpose(0, 1))
        vk[..., -rope_dim:] = k_pe
        return vk[..., config.v_head_dim :], vk[..., : config.v_head_dim]
