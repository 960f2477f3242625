"""What shifts single logits before a token is chosen: penalties, biases, bans.

Counts of a request's tokens live on the device, by slot, because the next step is planned before this
one's tokens are known. `sampler.py` chooses from what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minidcp.batch import Adjustment


class TokenCounts:
    """How often each token stands in the prompt and in the output of a slot's request: [2, vocab] int32."""

    def __init__(self) -> None:
        self.by_slot: dict[int, Tensor] = {}

    def adjust(self, logits: Tensor, adjustments: dict[int, Adjustment]) -> Tensor:
        """A copy of logits [S, vocab] with the rows in `adjustments` changed as they say.

        Penalties as in OpenAI's API (presence, frequency: of the output) and in CTRL, arXiv:1909.05858
        (repetition: of prompt and output, dividing positive and multiplying negative logits).
        """
        logits = logits.clone()
        for row, a in adjustments.items():
            x = logits[row]
            if a.counts:
                prompt, output = self.counts_of(a, x)
                x = torch.where(
                    prompt + output > 0, torch.where(x > 0, x / a.repetition, x * a.repetition), x
                )
                x = x - a.frequency * output - a.presence * (output > 0)
            if a.bias:
                ids, values = zip(*a.bias, strict=True)
                x = x.index_add(0, column(ids, torch.int64, x), column(values, torch.float32, x))
            if a.banned:
                x = x.index_fill(0, column(a.banned, torch.int64, x), -torch.inf)
            logits[row] = x
        return logits

    def counts_of(self, a: Adjustment, like: Tensor) -> Tensor:
        if a.history is not None:  # the request has just come (again) to this slot
            counts = torch.zeros(2, len(like), dtype=torch.int32, device=like.device)
            for part, count in zip(a.history, counts, strict=True):
                ids = column(part, torch.int64, like)
                count.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
            self.by_slot[a.slot] = counts
        return self.by_slot[a.slot]

    def add(self, tokens: Tensor, adjustments: dict[int, Adjustment]) -> None:
        """Count what was sampled, tokens [S]."""
        for row, a in adjustments.items():
            if a.counts:
                self.by_slot[a.slot][1, tokens[row : row + 1]] += 1


def column(values: Sequence[float], dtype: torch.dtype, like: Tensor) -> Tensor:
    """On the device, without waiting for it."""
    host = torch.tensor(values, dtype=dtype, pin_memory=like.is_cuda)
    return host.to(like.device, non_blocking=True)
