"""The router's choice: which experts each token goes to, and with which weights.

The logits come from the model; `experts.py` runs the experts that are chosen here."""

import torch
from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous
from minidcp.kernels.compiler import tl, triton
from minidcp.model_config import ModelConfig


def route_ref(logits: Tensor, config: ModelConfig, num_shared: int) -> tuple[Tensor, Tensor]:
    tokens, num_routed = logits.shape
    scores = logits.softmax(-1)

    # Only experts of the best groups can be chosen; a group is as good as its best expert.
    if config.n_group > 1:
        by_group = scores.view(-1, config.n_group, num_routed // config.n_group)
        best_groups = by_group.amax(-1).topk(config.topk_group, -1).indices
        is_best = torch.zeros_like(by_group[..., 0]).scatter_(1, best_groups, 1.0) > 0
        scores = by_group.masked_fill(~is_best[..., None], 0.0).flatten(1)

    weights, ids = scores.topk(config.num_experts_per_tok, -1)
    # The original either normalises or scales; transformers always scales.
    if normalises(config):
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    else:
        weights = weights * config.routed_scaling_factor

    shared_ids = torch.arange(num_shared, device=ids.device).expand(tokens, -1)
    shared_weights = weights.new_ones(shared_ids.shape)
    all_ids = torch.cat([shared_ids, ids + num_shared], 1)
    return torch.cat([shared_weights, weights], 1), all_ids.to(torch.int32)


def normalises(config: ModelConfig) -> bool:
    """Whether a token's weights are made to add up to 1."""
    return config.norm_topk_prob and config.num_experts_per_tok > 1


@triton.jit(do_not_specialize=["num_routed", "num_shared", "top_k"])
def route_kernel(
    logits, weights, ids,
    num_routed, scale, num_shared, top_k,
    EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program routes one token."""
    wait_for_previous(EARLY)
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    choice = tl.arange(0, CHOICES)

    # Softmax. From here on -1 marks what cannot be chosen.
    x = tl.load(logits + t * num_routed + e, mask=e < num_routed, other=-float("inf"))
    x = tl.exp(x - tl.max(x, 0))
    scores = tl.where(e < num_routed, x / tl.sum(x, 0), -1.0)

    # Mark the best groups, one after the other, and set the scores of the other groups to 0.
    if GROUPS > 1:
        group = e // (num_routed // GROUPS)
        unmarked = scores
        for _ in tl.static_range(TOP_GROUPS):
            best_group = tl.argmax(unmarked, 0) // (num_routed // GROUPS)
            unmarked = tl.where(group == best_group, -1.0, unmarked)
        scores = tl.where((unmarked >= 0) & (e < num_routed), 0.0, scores)

    # Take the best experts, one after the other.
    token_weights = tl.full([CHOICES], 1.0, tl.float32)
    token_ids = choice  # right for the shared experts
    total = 0.0
    for i in range(num_shared, top_k):
        best = tl.minimum(tl.argmax(scores, 0), num_routed - 1)  # NaN must not reach beyond
        best_score = tl.max(scores, 0)
        token_ids = tl.where(choice == i, num_shared + best, token_ids)
        token_weights = tl.where(choice == i, best_score, token_weights)
        scores = tl.where(e == best, -1.0, scores)
        total += best_score

    # The original either normalises or scales.
    factor = scale
    if NORM:
        factor = 1.0 / (total + 1e-20)
    token_weights = tl.where(choice < num_shared, 1.0, token_weights * factor)
    tl.store(weights + t * top_k + choice, token_weights, mask=choice < top_k)
    tl.store(ids + t * top_k + choice, token_ids, mask=choice < top_k)


def route(logits: Tensor, config: ModelConfig, num_shared: int) -> tuple[Tensor, Tensor]:
    """Choose K experts for each token: first the shared ones, then the best of the routed ones.

    Shared experts are treated as experts that every token chooses with weight 1. They are numbered
    from 0; routed expert e is number num_shared + e.

    Args:
        logits: [T, routed experts] float32, the router's output.
        num_shared: the number of shared experts.

    Returns:
        weights [T, K] float32 and ids [T, K] int32, with K = num_shared + num_experts_per_tok.
    """
    if not use_triton(logits):
        return route_ref(logits, config, num_shared)

    tokens, num_routed = logits.shape
    top_k = config.num_experts_per_tok + num_shared
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    route_kernel[(tokens,)](
        logits, weights, ids,
        num_routed, config.routed_scaling_factor, num_shared, top_k,
        EXPERTS=triton.next_power_of_2(num_routed), CHOICES=triton.next_power_of_2(top_k),
        GROUPS=config.n_group, TOP_GROUPS=config.topk_group, NORM=normalises(config),
        num_warps=1, **launch_early(),
    )  # fmt: skip
    return weights, ids
