"""From the layer's input to the queries of MLA, in three variants. They differ in what is computed
from the input together with the latents, in one product. Next: `layers.py`."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from minidcp.kernels.fp8 import Activations, widen
from minidcp.model_config import ModelConfig
from minidcp.models.layers import Linear, RMSNorm
from minidcp.models.weights import Shard, Weights
from minidcp.parallel.state import ParallelState

LATENT_NORM_EPS = 1e-6  # of the q_a and kv_a norms, whatever rms_norm_eps says

MakeBuffer = Callable[[tuple[int, ...], Tensor], Tensor]  # (shape, like) -> memory to write q in


class Query(Protocol):
    """q of H own heads, or of all G heads of the DCP group if q is replicated."""

    def make_input(self, x: Activations, q_down: Tensor) -> Activations:
        """What the two methods below take.

        x [T, hidden] is the layer's input; q_down [T, …] is what `read_q_down_proj` makes of it.
        """

    def project_own(self, q_input: Activations, make_buffer: MakeBuffer | None = None) -> Tensor:
        """[T, H, nope + rope], not rotated yet.

        A variant that computes a product here writes it to make_buffer(shape, like).
        """

    def project_group(self, q_input: Activations) -> Tensor:
        """[T, G, nope + rope]; only where q is replicated."""


class HeadProjection:
    """The product that gives q by head; its weight is q_b_proj's or q_proj's.

    Attributes:
        norm: where its input goes first, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        state: ParallelState,
        replicates_q: bool,
        in_dim: int,
        weights: Weights,
        norm: RMSNorm | None = None,
    ) -> None:
        self.norm = norm
        self.head_dim = config.qk_head_dim
        dcp = state.dcp
        shard = shard_heads(state, of_group=replicates_q)
        out_dim = config.num_attention_heads * config.qk_head_dim
        num_heads = config.num_attention_heads // shard.count
        whole = Linear.read(in_dim, out_dim, weights, shard)
        self.all = whole.reorder_rope(num_heads, config.qk_rope_head_dim)

        self.own = self.all
        if replicates_q:
            own_rows = len(self.all.weight) // dcp.size
            begin = dcp.rank * own_rows
            self.own = Linear(self.all.weight[begin : begin + own_rows])

    def project_own(self, x: Activations, make_buffer: MakeBuffer | None = None) -> Tensor:
        out = None
        if make_buffer is not None:
            rows = widen(x)
            out = make_buffer((len(rows), len(self.own.weight)), rows)
        q = self.own(x, out, self.norm)
        return q.view(len(q), -1, self.head_dim)

    def project_group(self, x: Activations) -> Tensor:
        q = self.all(x, norm=self.norm)
        return q.view(len(q), -1, self.head_dim)


class LowRankQuery:
    """q_b_proj(q_a_layernorm(q_a_proj(x))), as in DeepSeek-V2. q_down is q_a_proj(x)."""

    def __init__(
        self, config: ModelConfig, state: ParallelState, replicates_q: bool, weights: Weights
    ) -> None:
        rank = config.q_lora_rank
        assert rank is not None
        norm = RMSNorm(rank, weights.scope("q_a_layernorm"), LATENT_NORM_EPS)
        scope = weights.scope("q_b_proj")
        self.q_b_proj = HeadProjection(config, state, replicates_q, rank, scope, norm)

    def make_input(self, x: Activations, q_down: Tensor) -> Activations:
        return q_down

    def project_own(self, q_input: Activations, make_buffer: MakeBuffer | None = None) -> Tensor:
        return self.q_b_proj.project_own(q_input, make_buffer)

    def project_group(self, q_input: Activations) -> Tensor:
        return self.q_b_proj.project_group(q_input)


class JoinedQuery:
    """q_proj(x), computed in one product with the latents, as in DeepSeek-V2-Lite.

    So q_down is q itself, and nothing is left to compute.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.head_dim = config.qk_head_dim

    def make_input(self, x: Activations, q_down: Tensor) -> Activations:
        return q_down

    def project_own(self, q_input: Activations, make_buffer: MakeBuffer | None = None) -> Tensor:
        q = widen(q_input)
        return q.view(len(q), -1, self.head_dim)

    def project_group(self, q_input: Activations) -> Tensor:
        raise NotImplementedError("q of the group's heads is never joined with the latents")


class DirectReplicatedQuery:
    """q_proj(x) for all heads of the DCP group, without q_lora.

    Prompts need only this rank's heads, unless they gather q, so it is a product by itself.
    """

    def __init__(self, config: ModelConfig, state: ParallelState, weights: Weights) -> None:
        scope = weights.scope("q_proj")
        self.q_proj = HeadProjection(config, state, True, config.hidden_size, scope)

    def make_input(self, x: Activations, q_down: Tensor) -> Activations:
        return x

    def project_own(self, q_input: Activations, make_buffer: MakeBuffer | None = None) -> Tensor:
        return self.q_proj.project_own(q_input, make_buffer)

    def project_group(self, q_input: Activations) -> Tensor:
        return self.q_proj.project_group(q_input)


def shard_heads(state: ParallelState, of_group: bool) -> Shard:
    """This rank's heads, or those of its DCP group, which are consecutive: a shard of dim 0."""
    tp = state.tp
    if not of_group:
        return Shard(0, tp.rank, tp.size)
    group_size = state.dcp.size
    return Shard(0, tp.rank // group_size, tp.size // group_size)


def make_query(
    config: ModelConfig, state: ParallelState, replicates_q: bool, weights: Weights
) -> Query:
    if config.q_lora_rank is not None:
        return LowRankQuery(config, state, replicates_q, weights)
    if replicates_q:
        return DirectReplicatedQuery(config, state, weights)
    return JoinedQuery(config)


def read_q_down_proj(
    config: ModelConfig, state: ParallelState, replicates_q: bool, weights: Weights
) -> Linear | None:
    """What q wants of the layer's input, to be computed in one product with the latents."""
    if config.q_lora_rank is not None:
        scope = weights.scope("q_a_proj")
        bias = config.attention_bias
        return Linear.read(config.hidden_size, config.q_lora_rank, scope, bias=bias)
    if replicates_q:
        return None
    scope = weights.scope("q_proj")
    return HeadProjection(config, state, False, config.hidden_size, scope).own
