"""The DCP exchange: from partial attention over my shard, for all heads of the DCP group, to whole
attention for my heads. It is exact: attention over a union of shards is the average of the
shards' outputs with weights exp(lse_i - lse). Next: `state.py`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from minidcp.batch import OutAndLse
from minidcp.kernels.merge import merge_partials
from minidcp.parallel.group import Group


class Exchange(ABC):
    """How the N ranks of a DCP group share queries and merge partial attention.

    With out_i and lse_i from shard i, both for the same head, the attention over all shards is

        lse = ln Σ_i exp(lse_i)        out = Σ_i exp(lse_i - lse) out_i

    The weights exp(lse_i - lse) are scalars per token and head, so W_UV may be applied before or
    after the merge. W_UK acts on each head of q by itself, so it may come before or after the
    gather. Hence we can choose what crosses:

        wide:   q after W_UK (576 values per head of DeepSeek-V2), out before W_UV (512)
        narrow: q before W_UK (192), out after W_UV (128); each rank then multiplies by W_UK and
                W_UV for all heads of the group

    New latents never cross: every rank computes them for all tokens, and stores its own share.
    (Cached ones may, if a prompt gathers them: `attention/context.py`.)
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def q_buffer(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory to build q in, if `gather_q` takes it next."""
        return self.group.empty(shape, like)

    def gather_q(self, q: Tensor) -> Tensor:
        """q [T, H, D] of this rank's heads -> [T, N * H, D] of the group's, in rank order."""
        return self.group.all_gather(q).flatten(1, 2)

    def out_buffer(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory to build the partial output in, if `merge` takes it next."""
        return like.new_empty(shape)

    @abstractmethod
    def merge(self, out: Tensor, lse: Tensor) -> OutAndLse:
        """Attention over the union of the shards, for this rank's H heads.

        out [T, N * H, D] and lse [T, N * H], of this rank's shard -> [T, H, D] and [T, H]. Every
        lse is float32, a natural logarithm, and -inf where a shard is empty. The output of an
        empty shard may be anything: it is masked, never multiplied by zero.
        """


class NoExchange(Exchange):
    """For a DCP group of one rank, whose shard is the whole context."""

    def merge(self, out: Tensor, lse: Tensor) -> OutAndLse:
        return out, lse


class AllGatherReduceScatter(Exchange):
    """All-gather the LSEs, scale this rank's partial by exp(lse_i - lse), reduce-scatter it."""

    def merge(self, out: Tensor, lse: Tensor) -> OutAndLse:
        rank = self.group.rank
        size = self.group.size
        tokens, _, dim = out.shape

        all_lses = self.group.all_gather(lse).transpose(0, 1)  # [N, T, N * H]
        # merge_partials wants N outputs. With `only` it reads just this rank's.
        same_for_all = out.expand(size, -1, -1, -1)
        scaled, merged_lse = merge_partials(same_for_all, all_lses, only=rank)
        own_lse = merged_lse.view(tokens, size, -1)[:, rank]
        return self.group.reduce_scatter(scaled.view(tokens, size, -1, dim)), own_lse


class AllToAll(Exchange):
    """One all-to-all of outputs and LSEs in one buffer, then the weighted merge."""

    def merge(self, out: Tensor, lse: Tensor) -> OutAndLse:
        tokens, heads, dim = out.shape
        # An LSE takes the place of one value of out if that is float32, of two if it is bf16.
        lse_width = lse.element_size() // out.element_size()
        packed = self.group.empty((tokens, heads, dim + lse_width), out)
        packed[..., :dim] = out
        packed[..., dim:].view(torch.float32)[..., 0] = lse

        by_rank = packed.view(tokens, self.group.size, -1, dim + lse_width)
        received = self.group.all_to_all(by_rank).transpose(0, 1)  # [N, T, H, dim + lse_width]
        lses = received[..., dim:].view(torch.float32)[..., 0]
        return merge_partials(received[..., :dim], lses)


class PeerGroup(Protocol):
    """A group whose ranks read each other's memory, as `SymmetricGroup` does."""

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor: ...

    def merge(self, out: Tensor, lse: Tensor) -> OutAndLse:
        """`Exchange.merge` in one kernel."""


class PeerToPeer(Exchange):
    """One kernel that waits for the peers' partials and merges them.

    It reads them where they lie; small ones the peers write into this rank's inbox.
    """

    def __init__(self, group: Any) -> None:
        """`group` is a Group and a PeerGroup; `resolve.py` asks for p2p only where there is one."""
        super().__init__(group)
        self.peers: PeerGroup = group

    def out_buffer(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self.peers.empty(shape, like)

    def merge(self, out: Tensor, lse: Tensor) -> OutAndLse:
        return self.peers.merge(out, lse)


EXCHANGES: dict[str, Callable[[Group], Exchange]] = {
    "ag_rs": AllGatherReduceScatter,
    "a2a": AllToAll,
    "p2p": PeerToPeer,
}


def make_exchange(name: str, group: Group) -> Exchange:
    """The exchange of a DCP group; `name` is a resolved --dcp-comm-backend."""
    if group.size == 1:
        return NoExchange(group)
    return EXCHANGES[name](group)
