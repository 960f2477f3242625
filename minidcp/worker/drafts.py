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


def judge(tokens: Tensor, plan: StepPlan, decode_tokens: Tensor) -> Verdict:
    """The verdict on the sampled tokens [S]. The host does not wait for the device.

    decode_tokens: [D] those of the decode rows, drafts included. After each one a token is sampled,
    in the same order, and the prompts' tokens come behind.
    """
    rows = np.array(plan.sampling, dtype=np.int64)
    num_later = count_later_entries(rows)  # drafts follow, and the tokens after them
    first = np.searchsorted(rows, rows)  # the first entry of the same row
    on_device = upload({"first": first, "num_later": num_later}, tokens.device)

    next_draft = torch.full_like(tokens, -1)
    next_draft[: len(decode_tokens)] = torch.roll(decode_tokens, -1)
    agrees = (tokens == next_draft) & (on_device["num_later"] > 0)
    num_wrong = torch.cumsum(~agrees, 0)
    wrong_before = num_wrong + agrees.int() - 1
    counts = wrong_before == wrong_before[on_device["first"]]
    return Verdict(counts, counts & ~agrees)


def find_preceding_drafts(plan: StepPlan) -> list[slice]:
    """For each entry of `sampling`, which decode tokens are the drafts of its row before it."""
    slices = [slice(0, 0)] * len(plan.sampling)
    begin = 0
    for length in plan.lengths[: plan.num_decode]:
        for place in range(length):
            slices[begin + place] = slice(begin + 1, begin + place + 1)
        begin += length
    return slices


def find_drafts(plan: StepPlan, decode_tokens: Tensor) -> Tensor:
    """The drafts among the decode tokens [D], in the order of StepPlan.drafts."""
    is_draft = np.ones(len(decode_tokens), dtype=np.int64)
    lengths = np.array(plan.lengths[: plan.num_decode], dtype=np.int64)
    is_draft[np.cumsum(lengths) - lengths] = 0
    index = upload({"index": np.flatnonzero(is_draft)}, decode_tokens.device)["index"]
    return decode_tokens[index]
