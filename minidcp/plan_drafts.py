"""How many drafts `minidcp plan` counts in a decode step, and how many of them are right. What the
step takes with them is in `plan.py`."""

from dataclasses import replace
from typing import NamedTuple

import torch

from minidcp.config import require
from minidcp.model_config import ModelConfig
from minidcp.plan_weights import WeightCount, WeightCounts
from minidcp.resolve import ResolvedConfig


class Pass(NamedTuple):
    """Layers that run over some rows one after another, and the head behind them."""

    weights: WeightCounts
    layers: int
    moe_layers: int
    rows: int


def check_acceptance(acceptance: float | None, config: ResolvedConfig) -> None:
    """Raise a ValueError unless it is None, or a probability where there are drafts."""
    if acceptance is None:
        return
    given = f"--acceptance {acceptance}"
    require(0 <= acceptance <= 1, f"{given}: must be a probability, from 0 to 1")
    require(
        config.num_speculative_tokens > 0,
        f"{given}: there are no drafts to accept; add --speculative-method, such as ngram",
    )


def count_drafts(requests: int, config: ResolvedConfig) -> int:
    """All drafts that the requests may have, as far as a step has room for them."""
    room = config.max_decode_tokens - requests
    return min(requests * config.num_speculative_tokens, room)


def expect_accepted(requests: int, num_drafts: int, acceptance: float) -> float:
    """How many of a step's drafts are right, on average.

    A draft is right with probability `acceptance` if those before it are, else it never is. Every
    request has a first draft before any has a second, as in the engine.
    """
    accepted = 0.0
    likelihood = 1.0
    while num_drafts > 0:
        likelihood *= acceptance
        accepted += likelihood * min(requests, num_drafts)
        num_drafts -= requests
    return accepted


def list_passes(
    weights: WeightCounts,
    prediction_weights: WeightCounts,
    config: ResolvedConfig,
    model: ModelConfig,
    requests: int,
    num_drafts: int,
) -> list[Pass]:
    """What runs in a step, given the weights of the model and of its MTP layer.

    A draft is a row of its own to the kernels. The MTP layer runs over all rows, and for each
    further draft over one row of each request.
    """
    rows = requests + num_drafts
    num_layers = model.num_hidden_layers
    num_moe_layers = sum(model.is_moe_layer(layer) for layer in range(num_layers))
    passes = [Pass(weights, num_layers, num_moe_layers, rows)]
    if config.predicts:
        own = replace(prediction_weights)
        own.others += count_head(config, model)
        for own_rows in [rows] + [requests] * (config.num_predicted - 1):
            passes.append(Pass(own, 1, int(model.is_moe_layer(num_layers)), own_rows))
    return passes


def count_head(config: ResolvedConfig, model: ModelConfig) -> WeightCount:
    """What a rank has of the matrix that makes logits, which is never in FP8."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    values = model.vocab_size * model.hidden_size
    return WeightCount(values * dtype.itemsize, values).share(config.tp_size)
