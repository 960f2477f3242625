"""The DCP exchange: from partial attention over my shard for the group's heads to whole attention for my heads. Exact:
softmax over a union of shards is the LSE-weighted mean of the shards' results (`kernels/merge.py`)."""

from collections.abc import Callable

import torch
from torch import Tensor

from minidcp.kernels.merge import merge_partials
from minidcp.parallel.group import Group
from minidcp.parallel.symmetric import SymmetricGroup

# (out [T, N * H, D], lse [T, N * H] fp32, natural log, -inf where the shard is empty; group of N ranks)
# -> (out [T, H, D], lse [T, H]) over the union of the shards, for this rank's H heads.
Exchange = Callable[[Tensor, Tensor, Group], tuple[Tensor, Tensor]]


def gather_heads(q: Tensor, group: Group) -> Tensor:
    """[T, H, D] of this rank's heads -> [T, N * H, D] of the group's, in rank order."""
    return group.all_gather(q).flatten(1, 2)


def exchange_ag_rs(out: Tensor, lse: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """All-gather the LSEs, rescale the own partial by exp(lse - lse of the union), reduce-scatter it."""
    tokens, dim = len(out), out.shape[2]
    lses = group.all_gather(lse).transpose(0, 1)
    scaled, merged_lse = merge_partials(out.expand(group.size, -1, -1, -1), lses, only=group.rank)
    own = merged_lse.view(tokens, group.size, -1)[:, group.rank]
    return group.reduce_scatter(scaled.view(tokens, group.size, -1, dim)), own


def exchange_a2a(out: Tensor, lse: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """One all-to-all of outputs and LSEs packed in one buffer, then the LSE-weighted merge."""
    tokens, heads, dim = out.shape
    lanes = lse.element_size() // out.element_size()  # of out's dtype that hold one LSE: 1 or 2
    packed = group.empty((tokens, heads, dim + lanes), out)
    packed[..., :dim] = out
    packed[..., dim:].view(torch.float32)[..., 0] = lse
    received = group.all_to_all(packed.view(tokens, group.size, -1, dim + lanes)).transpose(0, 1)
    return merge_partials(received[..., :dim], received[..., dim:].view(torch.float32)[..., 0])


def exchange_p2p(out: Tensor, lse: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """One kernel that waits for the peers, reads their partials where they lie, and merges them."""
    assert isinstance(group, SymmetricGroup)  # engine.py has seen to it
    return group.merge(out, lse)


EXCHANGES: dict[str, Exchange] = {"ag_rs": exchange_ag_rs, "a2a": exchange_a2a, "p2p": exchange_p2p}
