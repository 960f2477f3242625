"""What the chapters share: the demo model's files, ranks that are threads, and one layer."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from minidcp.attention.reference import ReferenceBackend
from minidcp.config import EngineConfig
from minidcp.engine.tokenizer import TextEncoder, load_tokenizer
from minidcp.kernels.fp8 import widen
from minidcp.machine import Machine
from minidcp.model_config import ModelConfig
from minidcp.models.checkpoint import CheckpointSource
from minidcp.models.layers import RMSNorm
from minidcp.models.mla import MLAAttention
from minidcp.models.rope import rotary_table
from minidcp.models.weights import Weights
from minidcp.parallel.state import ParallelState, build_thread_states
from minidcp.resolve import resolve

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "demo-model"  # small, but its attention has the widths of DeepSeek-V2's
V2 = ROOT / "benchmarks" / "configs" / "deepseek-v2"  # only the config.json of the real one

torch.set_num_threads(1)  # ranks are threads here, and share the cores
torch.set_printoptions(precision=3, sci_mode=False, linewidth=90)

Result = TypeVar("Result")


def run_ranks(
    work: Callable[[ParallelState], Result], tp_size: int, dcp_size: int, exchange: str = "a2a"
) -> list[Result]:
    """Call work(state) on every rank, each in a thread. Returns the results by rank."""
    states, barriers = build_thread_states(tp_size, dcp_size, exchange)
    return run_threads(lambda rank: work(states[rank]), tp_size, barriers)


def run_threads(
    work: Callable[[int], Result], size: int, barriers: list[threading.Barrier]
) -> list[Result]:
    """Call work(rank) in `size` threads. If one fails, the others do not wait for it."""
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with torch.inference_mode():
                results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)
            for barrier in barriers:
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]


def load_layer(state: ParallelState | None = None, policy: str = "auto") -> MLAAttention:
    """The attention of the demo model's first layer, as the rank of `state` holds it, in float32.

    Without a state there is one rank, which holds all of it. `policy` is "wide" or "narrow".
    """
    if state is None:
        state = build_thread_states(1, 1)[0][0]
    config = ModelConfig.from_hf(MODEL)
    asked = EngineConfig(
        str(MODEL),
        tp_size=state.tp.size,
        dcp_size=state.dcp.size,
        exchange_policy=policy,
        device="cpu",
        ranks="threads",
    )
    options = resolve(asked, config, Machine(), report=lambda level, text: None)
    weights = open_weights(config).scope("model.layers.0.self_attn")
    return MLAAttention(config, options, state, ReferenceBackend(config.softmax_scale), weights)


def open_weights(config: ModelConfig) -> Weights:
    device = torch.device("cpu")
    source = CheckpointSource(
        MODEL, torch.float32, device, progress=False, fp8_block=config.fp8_block, fp8=False
    )
    return Weights(source)


def embed(text: str) -> tuple[Tensor, Tensor]:
    """What the first layer's attention gets for a text: x [T, hidden], and the angles [T, rope]."""
    config = ModelConfig.from_hf(MODEL)
    weights = open_weights(config).scope("model")
    table = weights.read("embed_tokens.weight", config.vocab_size, config.hidden_size)
    norm = RMSNorm(
        config.hidden_size, weights.scope("layers.0.input_layernorm"), config.rms_norm_eps
    )
    x = widen(norm(table[torch.tensor(encode(text))]))
    return x, rotary_table(config.rope, config.qk_rope_head_dim, len(x))


def encode(text: str) -> list[int]:
    """A text as the demo model's tokens."""
    tokenizer = load_tokenizer(MODEL)
    assert tokenizer is not None
    return TextEncoder.from_checkpoint(tokenizer, MODEL).encode(text)
