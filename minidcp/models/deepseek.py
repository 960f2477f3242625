"""The model on one rank: embedding, layers, head. What a layer computes lies either in its
attention, where tokens meet, or between two attentions, where each is by itself. Next: `mla.py`."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from minidcp.attention import AttentionBackend
from minidcp.batch import ForwardBatch
from minidcp.kernels.fp8 import widen
from minidcp.model_config import ModelConfig
from minidcp.models.layers import MLP, LMHead, MoE, ResidualStream, RMSNorm, VocabParallelEmbedding
from minidcp.models.mla import AttentionInputs, MLAAttention
from minidcp.models.rope import rotary_table
from minidcp.models.weights import Shard, Weights
from minidcp.parallel.state import ParallelState
from minidcp.resolve import ResolvedConfig


class DecoderLayer:
    def __init__(
        self,
        index: int,
        config: ModelConfig,
        options: ResolvedConfig,
        state: ParallelState,
        attention: AttentionBackend,
        weights: Weights,
    ) -> None:
        tp = state.tp
        hidden = config.hidden_size
        eps = config.rms_norm_eps
        mlp_weights = weights.scope("mlp")
        self.input_layernorm = RMSNorm(hidden, weights.scope("input_layernorm"), eps)
        self.post_attention_layernorm = RMSNorm(
            hidden, weights.scope("post_attention_layernorm"), eps
        )
        self.self_attn = MLAAttention(config, options, state, attention, weights.scope("self_attn"))
        self.mlp: MLP | MoE
        if config.is_moe_layer(index):
            self.mlp = MoE(config, tp, mlp_weights)
        else:
            by_column = Shard(0, tp.rank, tp.size)
            self.mlp = MLP(hidden, config.intermediate_size, by_column, mlp_weights)

        # Activations are quantised by what makes them.
        self.input_layernorm.quantizes = self.self_attn.down_proj.is_fp8
        self.post_attention_layernorm.quantizes = self.mlp.is_fp8

    def begin(self, stream: ResidualStream) -> AttentionInputs:
        """What comes before the attention."""
        return self.self_attn.project_inputs(stream.normed(self.input_layernorm))

    def end(self, stream: ResidualStream, attended: Tensor) -> None:
        """What comes after it: add its output [T, H, v], projected, and that of the MLP."""
        stream.add(self.self_attn.project_output(attended))
        stream.add(self.mlp(stream.normed(self.post_attention_layernorm)))

    def __call__(
        self, stream: ResidualStream, cos_sin: Tensor, kv: Tensor, batch: ForwardBatch
    ) -> None:
        """Add the outputs of attention and of the MLP to the stream."""
        self.end(stream, self.self_attn.attend(self.begin(stream), cos_sin, kv, batch))


class Pieces(Protocol):
    """All that is computed between the attentions of one pass, a piece at a time."""

    def enter(self, index: int, attended: Tensor | None) -> AttentionInputs:
        """Go on to the attention of layer `index`, with the output of the one before it."""

    def finish(self, attended: Tensor) -> Tensor:
        """The hidden states [T, hidden] behind the last layer, normed."""


class DeepseekForCausalLM:
    """The whole model on one rank, for positions below `options.max_model_len`."""

    def __init__(
        self,
        config: ModelConfig,
        options: ResolvedConfig,
        state: ParallelState,
        attention: AttentionBackend,
        weights: Weights,
    ) -> None:
        self.attention = attention
        self.tp = state.tp
        model = weights.scope("model")
        self.embed_tokens = VocabParallelEmbedding(config, state.tp, model.scope("embed_tokens"))
        self.layers = []
        for index in range(config.num_hidden_layers):
            scope = model.scope(f"layers.{index}")
            self.layers.append(DecoderLayer(index, config, options, state, attention, scope))
        self.norm = RMSNorm(config.hidden_size, model.scope("norm"), config.rms_norm_eps)

        head = self.embed_tokens.weight
        if not config.tie_word_embeddings:
            by_token = Shard(0, state.tp.rank, state.tp.size)
            head = weights.read(
                "lm_head.weight", config.vocab_size, config.hidden_size, shard=by_token
            )
        self.lm_head = LMHead(head, config.vocab_size, state.tp)
        table = rotary_table(config.rope, config.qk_rope_head_dim, options.max_model_len)
        self.cos_sin = table.to(head.device)

    def __call__(
        self,
        token_ids: Tensor,
        cache: Tensor,
        batch: ForwardBatch,
        make_pieces: Callable[[Tensor], Pieces] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """token_ids [T] -> this rank's logits [S, V / tp] of the tokens in batch.sample_index, and
        what they are made from, the hidden states of all tokens [T, hidden].

        `make_pieces` gives what computes all but the attentions, from embeddings [T, hidden]. By
        default it is computed here.
        """
        for queries in batch.cache_queries:
            self.attention.prepare(queries)

        cos_sin = self.cos_sin[batch.positions]  # shared by all layers
        x = self.embed_tokens(token_ids)
        pieces: Pieces = EagerPieces(self, x) if make_pieces is None else make_pieces(x)
        attended = None
        for index, (layer, kv) in enumerate(zip(self.layers, cache, strict=True)):
            # The inputs have no name here, so that they do not outlive the attention.
            attended = layer.self_attn.attend(pieces.enter(index, attended), cos_sin, kv, batch)
        assert attended is not None
        hidden = pieces.finish(attended)
        return self.lm_head(hidden[batch.sample_index], batch.logits), hidden


class EagerPieces:
    """Pieces that are computed one operation after the other."""

    def __init__(self, model: DeepseekForCausalLM, x: Tensor) -> None:
        """x [T, hidden] are the tokens' embeddings."""
        self.layers = model.layers
        self.norm = model.norm
        self.stream = ResidualStream(model.tp, x)

    def enter(self, index: int, attended: Tensor | None) -> AttentionInputs:
        if attended is not None:
            self.layers[index - 1].end(self.stream, attended)
        return self.layers[index].begin(self.stream)

    def finish(self, attended: Tensor) -> Tensor:
        self.layers[-1].end(self.stream, attended)
        return widen(self.stream.normed(self.norm))
