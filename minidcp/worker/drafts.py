"""Which of a step's sampled tokens count where drafts were proposed. The token after each draft is
sampled as if the draft was right. So tokens count up to the first draft that is not what was
sampled in its place; there the sampled one counts. Each is what it would have been one step at a
time, noise included. That is the rejection rule (arXiv:2302.01318, §2.2) for certain proposals."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minidcp.batch import StepPlan, count_later_entries, upload


@dataclass(frozen=True)
class Verdict:
    """Of each of S sampled tokens.

    Attributes:
        counts: [S] bool, whether it is a token of its request.
        is_last: [S] bool, whether it is the last one that counts in its row.
    """

    counts: Tensor
    is_last: Tensor


def judge(tokens: Tensor, plan: StepPlan) -> Verdict:
    """The verdict on the sampled tokens [S]. The host does not wait for the device."""
    rows = np.array(plan.sampling, dtype=np.int64)
    has_next = count_later_entries(rows) > 0  # a draft follows, and the token after that
    is_first = np.ones(len(rows), dtype=np.int64)
    is_first[1:] = rows[1:] != rows[:-1]
    next_draft = np.full(len(rows), -1, dtype=np.int64)
    next_draft[has_next] = plan.drafts
    on_device = upload({"is_first": is_first, "next_draft": next_draft}, tokens.device)

    begins = on_device["is_first"].bool()
    agrees = tokens == on_device["next_draft"]
    counts = begins
    for _ in range(max(plan.lengths[: plan.num_decode]) - 1):
        counts = begins | torch.roll(counts & agrees, 1)
    return Verdict(counts, counts & ~agrees)
