"""Piecewise CUDA graphs for steps with prompts. A graph is what lies between two attentions. These
are in no graph: their shapes depend on more than the number of tokens. Without graphs a host takes
longer to launch a step than a GPU to compute a thousand tokens. Fewer tokens than a graph has are
padded. What rows of padding hold does not matter: no other row reads them. Next: `sampler.py`."""

import bisect
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minidcp.kernels.fp8 import widen
from minidcp.models.deepseek import DeepseekForCausalLM, EagerPieces
from minidcp.models.mla import AttentionInputs
from minidcp.parallel.state import ParallelState
from minidcp.worker.cuda_graph import CapturedStep, capture

# The default of --max-num-batched-tokens on a GPU. Larger steps take the GPU longer than the host.
MAX_TOKENS = 8192


def list_sizes(max_tokens: int) -> list[int]:
    """64, steps of 128 up to 1,024, of 256 up to 2,048, and of 512 from there on to the largest."""
    sizes = [64, *range(128, 1024, 128), *range(1024, 2048, 256), *range(2048, MAX_TOKENS + 1, 512)]
    most = min(MAX_TOKENS, max_tokens)
    return [size for size in sizes if size < most] + [most]


class PromptGraphs:
    """The graphs of all sizes. They share their memory, and the tensors at their edges."""

    def __init__(
        self,
        model: DeepseekForCausalLM,
        state: ParallelState,
        max_tokens: int,
    ) -> None:
        self.model = model
        self.state = state
        self.pool: Any = None  # the memory that all graphs share
        self.sizes = list_sizes(max_tokens)
        self.pieces: EagerPieces | None = None  # of the size that is being captured

        # A piece reads `attended`, but the first one `x`. It leaves the inputs of the next
        # attention, but the last one `hidden`.
        most = self.sizes[-1]
        attention = model.layers[0].self_attn
        weight = model.embed_tokens.weight
        self.x = weight.new_zeros(most, weight.shape[1])
        self.hidden = self.x  # when it is written, nobody reads the embeddings any more
        self.attended = weight.new_zeros(most, attention.num_heads, attention.w_uv.shape[1])
        inputs = EagerPieces(model, self.x).enter(0, None)
        self.q_input = torch.zeros_like(widen(inputs.q_input))
        self.new_latents = torch.zeros_like(inputs.new_latents)

        self.steps: dict[int, list[CapturedStep]] = {}
        for size in reversed(self.sizes):  # the largest first: the smaller ones fit in its memory
            self.steps[size] = self.capture(size)

    def capture(self, size: int) -> list[CapturedStep]:
        runs = [partial(self.compute, size, index) for index in range(len(self.model.layers) + 1)]
        for run in runs:
            run()  # compiles kernels, which a capture must not do
        steps = []
        for run in runs:
            steps.append(capture(run, self.pool, self.state))
            self.pool = self.pool or steps[0].graph.pool()
        return steps

    def compute(self, size: int, index: int) -> tuple[()]:
        """Piece `index` of a step of `size` tokens."""
        self.state.tp.begin_step()
        if index == 0:
            self.pieces = EagerPieces(self.model, self.x[:size])
        assert self.pieces is not None
        attended = self.attended[:size]
        if index == len(self.model.layers):
            self.hidden[:size].copy_(self.pieces.finish(attended))
            self.pieces = None
        else:
            inputs = self.pieces.enter(index, None if index == 0 else attended)
            self.q_input[:size].copy_(widen(inputs.q_input))
            self.new_latents[:size].copy_(inputs.new_latents)
        return ()

    def has_room(self, num_tokens: int) -> bool:
        return num_tokens <= self.sizes[-1]

    def start(self, x: Tensor) -> "ReplayedPieces":
        """Pieces for the embeddings x [T, hidden]."""
        self.x[: len(x)].copy_(x)
        return ReplayedPieces(self, len(x))


class ReplayedPieces:
    """One pass of T tokens through the graphs. What it gives is valid until the next replay."""

    def __init__(self, graphs: PromptGraphs, num_tokens: int) -> None:
        self.graphs = graphs
        self.num_tokens = num_tokens
        size = graphs.sizes[bisect.bisect_left(graphs.sizes, num_tokens)]
        self.steps = graphs.steps[size]

    def enter(self, index: int, attended: Tensor | None) -> AttentionInputs:
        self.replay(index, attended)
        # The attention's collectives are in no graph. A graph leaves the groups' buffers as its
        # capture left them, so they begin anew.
        self.graphs.state.dcp.begin_step()
        tokens = slice(self.num_tokens)
        return AttentionInputs(self.graphs.q_input[tokens], self.graphs.new_latents[tokens])

    def finish(self, attended: Tensor) -> Tensor:
        self.replay(len(self.steps) - 1, attended)
        self.graphs.state.begin_step()
        return self.graphs.hidden[: self.num_tokens]

    def replay(self, index: int, attended: Tensor | None) -> None:
        if attended is not None:
            self.graphs.attended[: self.num_tokens].copy_(attended)
        step = self.steps[index]
        step.graph.replay()
        self.graphs.state.tp.received_bytes += step.received_bytes
