"""The router: which experts each token goes to, and with which weights.

`experts.py` runs the experts that are chosen here."""

from typing import Any

import torch
from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous
from minidcp.kernels.compiler import tl, triton
from minidcp.kernels.linear import multiply_by_head, multiply_tile
from minidcp.model_config import ModelConfig

NEVER = tl.constexpr(-1e30)  # how much an expert is wanted that cannot be chosen


def route_ref(
    logits: Tensor, config: ModelConfig, num_shared: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    tokens, num_routed = logits.shape
    if bias is None:
        # DeepSeek-V2: a group is as good as its best expert.
        scores = logits.softmax(-1)
        wanted = scores
        num_best = 1
        excluded = 0.0
    else:
        # DeepSeek-V3: the bias counts for the choice, not for the weights, and a group is as good
        # as its two best experts together.
        scores = logits.sigmoid()
        wanted = scores + bias
        num_best = 2
        excluded = -torch.inf

    # Only experts of the best groups can be chosen.
    if config.n_group > 1:
        by_group = wanted.view(-1, config.n_group, num_routed // config.n_group)
        group_scores = by_group.topk(num_best, -1).values.sum(-1)
        best_groups = group_scores.topk(config.topk_group, -1).indices
        is_best = torch.zeros_like(group_scores).scatter_(1, best_groups, 1.0) > 0
        wanted = by_group.masked_fill(~is_best[..., None], excluded).flatten(1)

    ids = wanted.topk(config.num_experts_per_tok, -1).indices
    weights = scores.gather(1, ids)
    if normalises(config):
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * find_scale(config)

    shared_ids = torch.arange(num_shared, device=ids.device).expand(tokens, -1)
    shared_weights = weights.new_ones(shared_ids.shape)
    all_ids = torch.cat([shared_ids, ids + num_shared], 1)
    return torch.cat([shared_weights, weights], 1), all_ids.to(torch.int32)


def normalises(config: ModelConfig) -> bool:
    """Whether a token's weights are made to add up to 1, before they are scaled."""
    return config.norm_topk_prob and config.num_experts_per_tok > 1


def find_scale(config: ModelConfig) -> float:
    """What the weights are multiplied by.

    DeepSeek-V2's own code either normalises or scales; transformers always scales. V3 does both.
    """
    if normalises(config) and not config.sigmoid_router:
        return 1.0
    return config.routed_scaling_factor


@triton.jit
def route_token(
    logits, bias, weights, ids,
    t, num_routed, scale, num_shared, top_k,
    EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Route token t. A router without bias scores by a softmax, else a sigmoid."""
    e = tl.arange(0, EXPERTS)
    choice = tl.arange(0, CHOICES)

    # The scores, and how much each expert is wanted: NEVER if it cannot be chosen.
    x = tl.load(logits + t * num_routed + e, mask=e < num_routed, other=-float("inf"))
    if bias is None:
        x = tl.exp(x - tl.max(x, 0))
        scores = x / tl.sum(x, 0)
        wanted = tl.where(e < num_routed, scores, NEVER)
    else:
        scores = 1 / (1 + tl.exp(-x))
        wanted = scores + tl.load(bias + e, mask=e < num_routed, other=0.0)
        wanted = tl.where(e < num_routed, wanted, NEVER)

    # Mark the best groups, one after the other, and exclude the other groups.
    if GROUPS > 1:
        group = e // (num_routed // GROUPS)
        group_scores = score_groups(wanted, group, e, GROUPS, 1 if bias is None else 2)
        is_best = tl.zeros([EXPERTS], tl.int1)
        for _ in tl.static_range(TOP_GROUPS):
            best_group = tl.argmax(group_scores, 0) // (num_routed // GROUPS)
            is_best = is_best | (group == best_group)
            group_scores = tl.where(group == best_group, NEVER, group_scores)
        # The softmax's excluded experts have score 0, as in the original.
        excluded = tl.where(e < num_routed, 0.0, NEVER) if bias is None else NEVER
        wanted = tl.where(is_best & (e < num_routed), wanted, excluded)

    # Take the best experts, one after the other.
    token_weights = tl.full([CHOICES], 1.0, tl.float32)
    token_ids = choice  # right for the shared experts
    total = 0.0
    for i in range(num_shared, top_k):
        best = tl.minimum(tl.argmax(wanted, 0), num_routed - 1)  # NaN must not reach beyond
        best_score = tl.sum(tl.where(e == best, scores, 0.0), 0)
        token_ids = tl.where(choice == i, num_shared + best, token_ids)
        token_weights = tl.where(choice == i, best_score, token_weights)
        wanted = tl.where(e == best, NEVER, wanted)
        total += best_score

    factor = scale
    if NORM:
        factor = scale / (total + 1e-20)
    token_weights = tl.where(choice < num_shared, 1.0, token_weights * factor)
    tl.store(weights + t * top_k + choice, token_weights, mask=choice < top_k)
    tl.store(ids + t * top_k + choice, token_ids, mask=choice < top_k)


@triton.jit(do_not_specialize=["num_routed", "num_shared", "top_k"])
def route_kernel(
    logits, bias, weights, ids,
    num_routed, scale, num_shared, top_k,
    EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program routes one token."""
    wait_for_previous(EARLY)
    route_token(
        logits, bias, weights, ids, tl.program_id(0).to(tl.int64),
        num_routed, scale, num_shared, top_k, EXPERTS, CHOICES, GROUPS, TOP_GROUPS, NORM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_routed", "num_shared", "top_k"])
def multiply_and_route_kernel(
    x, gate, counter, logits, bias, weights, ids,
    hidden, gate_n, num_routed, scale, num_shared, top_k,
    BK: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program computes one logit of the one token. The last one to be done routes the token.

    The counter is 0 between launches.
    """
    multiply_tile(
        x, gate, logits, 0, 0, tl.program_id(0),
        1, num_routed, hidden, 0, 0, 0, gate_n, 1, 0, 0, 1, 1, BK, EARLY,
    )  # fmt: skip
    tl.debug_barrier()  # the logit is written
    num_before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if num_before == tl.num_programs(0) - 1:
        tl.debug_barrier()  # no thread reads the logits of others earlier
        tl.store(counter, 0)
        route_token(
            logits, bias, weights, ids, 0,
            num_routed, scale, num_shared, top_k, EXPERTS, CHOICES, GROUPS, TOP_GROUPS, NORM,
        )  # fmt: skip


@triton.jit
def score_groups(wanted, group, e, GROUPS: tl.constexpr, NUM_BEST: tl.constexpr):
    """For each expert, the sum of the NUM_BEST best of its group."""
    group_scores = tl.zeros_like(wanted) + NEVER
    for g in tl.static_range(GROUPS):
        members = tl.where(group == g, wanted, NEVER)
        score = tl.max(members, 0)
        if NUM_BEST == 2:
            second = tl.where(e == tl.argmax(members, 0), NEVER, members)
            score += tl.max(second, 0)
        group_scores = tl.where(group == g, score, group_scores)
    return group_scores


def route(
    logits: Tensor, config: ModelConfig, num_shared: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose K experts for each token: first the shared ones, then the best of the routed ones.

    Shared experts are treated as experts that every token chooses with weight 1. They are numbered
    from 0; routed expert e is number num_shared + e.

    Args:
        logits: [T, routed experts] float32, the router's output.
        num_shared: the number of shared experts.
        bias: [routed experts] float32, DeepSeek-V3's e_score_correction_bias. With it, experts are
            scored by a sigmoid, without it by a softmax.

    Returns:
        weights [T, K] float32 and ids [T, K] int32, with K = num_shared + num_experts_per_tok.
    """
    if not use_triton(logits):
        return route_ref(logits, config, num_shared, bias)

    tokens, num_routed = logits.shape
    weights, ids = allocate_choices(tokens, config, num_shared, logits.device)
    route_kernel[(tokens,)](
        logits, bias, weights, ids,
        num_routed, find_scale(config), num_shared, ids.shape[1],
        **choose_constants(num_routed, ids.shape[1], config), num_warps=1, **launch_early(),
    )  # fmt: skip
    return weights, ids


def allocate_choices(
    tokens: int, config: ModelConfig, num_shared: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Room for weights and ids."""
    top_k = config.num_experts_per_tok + num_shared
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    return weights, torch.empty(tokens, top_k, dtype=torch.int32, device=device)


def choose_constants(num_routed: int, top_k: int, config: ModelConfig) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return dict(
        EXPERTS=triton.next_power_of_2(num_routed), CHOICES=triton.next_power_of_2(top_k),
        GROUPS=config.n_group, TOP_GROUPS=config.topk_group, NORM=normalises(config),
    )  # fmt: skip


def multiply_and_route(
    x: Tensor,
    gate: Tensor,
    config: ModelConfig,
    num_shared: int,
    bias: Tensor | None,
    counter: Tensor,
) -> tuple[Tensor, Tensor]:
    """`route` by the logits x @ gate.T, in one kernel for one token.

    The logits are in float32, as in the original: the products of bf16 values are exact then.

    Args:
        x: [T, hidden], contiguous in hidden.
        gate: [routed experts, hidden], contiguous in hidden.
        counter: [1] int32, zero, and again zero afterwards. Only one launch at a time may use it.
    """
    num_routed, hidden = gate.shape
    logits = torch.empty(len(x), num_routed, dtype=torch.float32, device=x.device)
    if not use_triton(x) or len(x) > 1:
        multiply_by_head(x[:, None], gate[None], logits[:, None])
        return route(logits, config, num_shared, bias)

    assert x.stride(1) == 1 and gate.stride(1) == 1
    weights, ids = allocate_choices(1, config, num_shared, x.device)
    # A single warp, so that it routes without waiting for others.
    multiply_and_route_kernel[(num_routed,)](
        x, gate, counter, logits, bias, weights, ids,
        hidden, gate.stride(0), num_routed, find_scale(config), num_shared, ids.shape[1],
        BK=min(2048, triton.next_power_of_2(hidden)),
        **choose_constants(num_routed, ids.shape[1], config), num_warps=1, **launch_early(),
    )  # fmt: skip
    return weights, ids
