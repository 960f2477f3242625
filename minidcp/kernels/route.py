"""The router's choice: which experts each token goes to, and with which weights.

The logits come from the model; `experts.py` runs the experts that are chosen here."""

import torch
from torch import Tensor

from minidcp.kernels import launch_early, use_triton, wait_for_previous
from minidcp.kernels.compiler import tl, triton
from minidcp.model_config import ModelConfig

NEVER = tl.constexpr(-1e30)  # how much an expert is wanted that cannot be chosen
TAKEN = tl.constexpr(-(2**31))  # a key below those of all floats


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
def make_key(x):
    """An integer for each float, in the same order: a warp finds the largest in one instruction."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def read_key(key):
    """The float whose key this is."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def score_groups(key, member, NUM_BEST: tl.constexpr):
    """For each expert, the key of its group's score: the sum of the NUM_BEST best there."""
    best_key = tl.max(key, 1, keep_dims=True)
    group_key = best_key
    if NUM_BEST == 2:
        best = tl.min(tl.where(key == best_key, member, key.shape[1]), 1, keep_dims=True)
        second_key = tl.max(tl.where(member == best, TAKEN, key), 1, keep_dims=True)
        group_key = make_key(read_key(best_key) + read_key(second_key))
    return tl.broadcast_to(group_key, key.shape)


@triton.jit(do_not_specialize=["num_routed", "group_size", "num_shared", "top_k"])
def route_kernel(
    logits, bias, weights, ids,
    num_routed, group_size, scale, num_shared, top_k,
    GROUPS: tl.constexpr, MEMBERS: tl.constexpr, CHOICES: tl.constexpr,
    TOP_GROUPS: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One warp routes one token. A router without bias scores by a softmax, else a sigmoid.

    Experts stand in a row for each group, [GROUPS, MEMBERS]. From 32 members on a thread has the
    same columns of all rows, and compares groups without the other threads.
    """
    group = tl.arange(0, GROUPS)[:, None]
    member = tl.arange(0, MEMBERS)[None, :]
    e = group * group_size + member
    exists = (member < group_size) & (e < num_routed)
    if bias is not None:
        # It may come from far, but need not wait for the kernel before this one.
        advantage = tl.load(bias + e, mask=exists, other=0.0)
    wait_for_previous(EARLY)

    # The scores, and how much each expert is wanted.
    t = tl.program_id(0).to(tl.int64)
    x = tl.load(logits + t * num_routed + e, mask=exists, other=-float("inf"))
    if bias is None:
        x = tl.exp(x - tl.max(x))
        scores = x / tl.sum(x)
        wanted = scores
        excluded = 0.0  # as in the original
    else:
        scores = 1 / (1 + tl.exp(-x))
        wanted = scores + advantage
        excluded = NEVER
    key = make_key(tl.where(exists, wanted, NEVER))

    # Only experts of the best groups keep their key. These are found one after the other.
    if GROUPS > 1:
        group_key = score_groups(key, member, 1 if bias is None else 2)
        own_key = key
        key = make_key(tl.full([GROUPS, MEMBERS], excluded, tl.float32))
        for _ in range(TOP_GROUPS):
            best_group = tl.argmax(group_key, 0, keep_dims=True)
            key = tl.where(group == best_group, own_key, key)
            group_key = tl.where(group == best_group, TAKEN, group_key)

    # What is no expert is chosen by nobody, whatever its number says.
    key = tl.where(exists, key, TAKEN)
    e = tl.where(exists, e, num_routed)

    # Take the best experts, one after the other: of equals the first, and NaN before all.
    bits = scores.to(tl.int32, bitcast=True)
    choice = tl.arange(0, CHOICES)
    token_weights = tl.full([CHOICES], 1.0, tl.float32)
    token_ids = choice  # right for the shared experts
    total = 0.0
    for i in range(num_shared, top_k):
        best_key = tl.max(key)
        best = tl.min(tl.where(key == best_key, e, num_routed - 1))
        best_score = tl.sum(tl.where(e == best, bits, 0)).to(tl.float32, bitcast=True)
        token_ids = tl.where(choice == i, num_shared + best, token_ids)
        token_weights = tl.where(choice == i, best_score, token_weights)
        key = tl.where(e == best, TAKEN, key)
        total += best_score

    factor = scale
    if NORM:
        factor = scale / (total + 1e-20)
    token_weights = tl.where(choice < num_shared, 1.0, token_weights * factor)
    tl.store(weights + t * top_k + choice, token_weights, mask=choice < top_k)
    tl.store(ids + t * top_k + choice, token_ids, mask=choice < top_k)


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
    group_size = num_routed // config.n_group
    top_k = config.num_experts_per_tok + num_shared
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    route_kernel[(tokens,)](
        logits, bias, weights, ids,
        num_routed, group_size, find_scale(config), num_shared, top_k,
        GROUPS=triton.next_power_of_2(config.n_group),
        MEMBERS=triton.next_power_of_2(group_size), CHOICES=triton.next_power_of_2(top_k),
        TOP_GROUPS=config.topk_group, NORM=normalises(config), num_warps=1, **launch_early(),
    )  # fmt: skip
    return weights, ids
