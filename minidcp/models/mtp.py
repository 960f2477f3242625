"""The layer behind a DeepSeek-V3 model's last that predicts one token more (multi-token prediction,
arXiv:2412.19437, §2.2), for drafts. It is a decoder layer like the others, with a latent cache of
its own. Embedding and head are the model's. Next: `worker/predictor.py`."""

import torch
from torch import Tensor

from minidcp.attention import AttentionBackend
from minidcp.batch import ForwardBatch
from minidcp.kernels.dense import multiply
from minidcp.kernels.fp8 import widen
from minidcp.model_config import ModelConfig
from minidcp.models.deepseek import DecoderLayer, DeepseekForCausalLM
from minidcp.models.layers import ResidualStream, RMSNorm
from minidcp.models.weights import ALIGN, Shard, Weights
from minidcp.parallel.state import ParallelState
from minidcp.resolve import ResolvedConfig


class PredictionLayer:
    """For position t, from its hidden state and the token at t + 1, predicts the token at t + 2.

        x = eh_proj [enorm(embedding of token t + 1), hnorm(hidden state of t)]
        hidden state for the token t + 2 = shared_head.norm(decoder layer(x))

    The model's hidden states are those behind its last norm, as in vLLM and SGLang. To predict
    further tokens the layer gets its own, behind its norm, which is what SGLang does. vLLM leaves
    that norm out; with it more drafts are right (ROCm/ATOM, pull request 1764).
    """

    def __init__(
        self,
        config: ModelConfig,
        options: ResolvedConfig,
        state: ParallelState,
        attention: AttentionBackend,
        weights: Weights,
        model: DeepseekForCausalLM,
    ) -> None:
        self.attention = attention
        self.embed_tokens = model.embed_tokens
        self.lm_head = model.lm_head
        self.cos_sin = model.cos_sin
        index = config.num_hidden_layers
        scope = weights.scope(f"model.layers.{index}")
        hidden = config.hidden_size
        self.enorm = RMSNorm(hidden, scope.scope("enorm"), config.rms_norm_eps)
        self.hnorm = RMSNorm(hidden, scope.scope("hnorm"), config.rms_norm_eps)
        # Never in FP8: DeepSeek-V3 keeps it in bf16.
        self.tp = state.tp
        self.inputs = Shard(1, state.tp.rank, state.tp.size, align=ALIGN)
        self.eh_proj = scope.read("eh_proj.weight", hidden, 2 * hidden, shard=self.inputs)
        self.layer = DecoderLayer(index, config, options, state, attention, scope)
        self.norm = RMSNorm(hidden, scope.scope("shared_head.norm"), config.rms_norm_eps)

    def __call__(
        self, next_tokens: Tensor, hidden: Tensor, kv: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """The tokens [T] behind those of a batch, and its hidden states [T, hidden] -> new ones."""
        for queries in batch.cache_queries:
            self.attention.prepare(queries)

        embedded = widen(self.enorm(self.embed_tokens(next_tokens)))
        both = torch.cat([embedded, widen(self.hnorm(hidden))], -1)
        own = self.inputs.pad(self.inputs.cut(both, both.shape), both.shape)
        stream = ResidualStream(self.tp, self.tp.all_reduce(multiply(own, self.eh_proj)))
        self.layer(stream, self.cos_sin[batch.positions], kv, batch)
        return widen(stream.normed(self.norm))

    def choose_best(self, hidden: Tensor) -> Tensor:
        """Its hidden states [S, hidden] -> the most likely tokens [S], the same on all ranks."""
        return self.lm_head.choose_best(self.lm_head(hidden))


def build_prediction_layer(
    config: ModelConfig,
    options: ResolvedConfig,
    state: ParallelState,
    attention: AttentionBackend,
    weights: Weights,
    model: DeepseekForCausalLM,
) -> PredictionLayer | None:
    """None if it is not wanted."""
    if not options.predicts:
        return None
    return PredictionLayer(config, options, state, attention, weights, model)
