"""Grouping the router's choices by expert, so that a product reads an expert's weights once for a
block of tokens. No products here: they are in `experts.py`. There is no torch definition, because
`run_experts_ref` sorts instead.

A choice is a (token, expert) pair; choice t · K + i is the i-th of token t."""

from typing import NamedTuple

import torch
from torch import Tensor

from minidcp.kernels import launch_early, wait_for_previous
from minidcp.kernels.compiler import tl, triton

MAX_CHUNK = 4096  # choices that one program counts at once
MAX_TOKENS = 2048  # tokens that one program aligns at once


class Blocks(NamedTuple):
    """Choices by expert, in blocks of up to `bm` choices of one expert.

    For example ids [[0, 2], [2, 1], [0, 2]] with bm = 2 give choices [0, 4, 3, 6, 1, 2, 5, 6] and
    experts [0, 1, 2, 2, …, 4].

    Attributes:
        num_choices: T · K.
        bm: choices of a block.
        max_blocks: for how many blocks there is room.
        experts: [max_blocks + 1] int32, the expert of each block, and last the number of blocks in
            use. Without the last if every choice is a block of its own. None if there is but one
            expert, which every token chooses.
        choices: [max_blocks · bm] int32; T · K stands for none. What is beyond the blocks in use is
            not written. None if they are simply 0, 1, 2, …
        is_sorted: whether rows between the products are in the order of the blocks, not of choices.
        is_direct: whether every choice is a block of its own.
    """

    num_choices: int
    bm: int
    max_blocks: int
    experts: Tensor | None = None
    choices: Tensor | None = None
    is_sorted: bool = False
    is_direct: bool = False


@triton.jit(do_not_specialize=["num_choices"])
def count_kernel(ids, counts, num_choices, CHUNK: tl.constexpr, EARLY: tl.constexpr):
    """counts[e] = how often expert e is chosen. One program counts for one expert."""
    wait_for_previous(EARLY)
    found = tl.zeros([CHUNK], tl.int32)
    for first in range(0, num_choices, CHUNK):
        choice = first + tl.arange(0, CHUNK)
        chosen = tl.load(ids + choice, mask=choice < num_choices, other=-1)
        found += (chosen == tl.program_id(0)).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(found, 0))


@triton.jit(do_not_specialize=["max_blocks", "tokens", "num_experts"])
def align_kernel(
    ids, counts, choices, block_expert,
    max_blocks, tokens, num_experts,
    BM: tl.constexpr, TOP_K: tl.constexpr, CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr, TOKENS: tl.constexpr, CHOICES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program e lists the choices of expert e, at most one of each token, in blocks of BM behind
    those of the experts before it. If all choices are one chunk, they are counted here."""
    wait_for_previous(EARLY)
    e = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    num_choices = tokens * TOP_K

    # How often each expert is chosen.
    if counts is None:
        # The padding counts for expert EXPERTS - 1, which is none of ours.
        all_choices = tl.arange(0, CHUNK)
        all_ids = tl.load(ids + all_choices, mask=all_choices < num_choices, other=EXPERTS - 1)
        counted = tl.histogram(all_ids, EXPERTS)
    else:
        counted = tl.load(counts + expert, mask=expert < num_experts, other=0)

    # How many blocks each expert needs, so where the blocks of this one begin.
    needed = tl.where(expert < num_experts, (counted + BM - 1) // BM, 0)
    first_block = tl.sum(tl.where(expert < e, needed, 0), 0)
    own_blocks = tl.sum(tl.where(expert == e, needed, 0), 0)
    if e == 0:
        tl.store(block_expert + max_blocks, tl.sum(needed, 0))

    # Fill them with "none".
    for block in range(first_block, first_block + own_blocks):
        tl.store(block_expert + block, e)
        none = tl.zeros([BM], tl.int32) + num_choices
        tl.store(choices + block * BM + tl.arange(0, BM), none)
    tl.debug_barrier()  # the same addresses are written again below

    # List the choices in the order of tokens.
    i = tl.arange(0, CHOICES)[None, :]
    end = first_block * BM  # of the list so far
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)[:, None]
        mask = (token < tokens) & (i < TOP_K)
        chosen = tl.load(ids + token * TOP_K + i, mask=mask, other=-1)
        choice = tl.max(tl.where(chosen == e, token * TOP_K + i, -1), 1)
        is_own = (choice >= 0).to(tl.int32)
        tl.store(choices + end + tl.cumsum(is_own, 0) - 1, choice, mask=choice >= 0)
        end += tl.sum(is_own, 0)


def align(ids: Tensor, num_experts: int, bm: int, sort: bool = False) -> Blocks:
    """Group the choices ids [T, K] int32 by expert into blocks of up to `bm`.

    If a token chooses an expert twice, only one of the two choices is listed. `sort` is handed on
    as `is_sorted`. If bm is 1, nothing is grouped: every choice is a block of its own.
    """
    tokens, top_k = ids.shape
    num_choices = ids.numel()
    if bm == 1:
        return Blocks(num_choices, bm, max_blocks=num_choices, experts=ids, is_direct=True)

    # Every expert that is chosen may have one block that is not full.
    max_blocks = min(num_choices, num_experts + num_choices // bm)
    choices = torch.empty(max_blocks * bm, dtype=torch.int32, device=ids.device)
    experts = torch.empty(max_blocks + 1, dtype=torch.int32, device=ids.device)

    chunk = min(MAX_CHUNK, triton.next_power_of_2(num_choices))
    counts = None
    if num_choices > chunk:
        counts = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
        count_kernel[(num_experts,)](ids, counts, num_choices, CHUNK=chunk, **launch_early())

    align_kernel[(num_experts,)](
        ids, counts, choices, experts,
        max_blocks, tokens, num_experts,
        BM=bm, TOP_K=top_k, CHUNK=chunk,
        EXPERTS=triton.next_power_of_2(num_experts + 1),
        TOKENS=min(triton.next_power_of_2(tokens), MAX_TOKENS),
        CHOICES=triton.next_power_of_2(top_k),
        num_warps=4 if chunk < 4096 else 16, **launch_early(),
    )  # fmt: skip
    return Blocks(num_choices, bm, max_blocks, experts, choices, sort)


def one_expert(tokens: int, bm: int) -> Blocks:
    """The blocks of a dense product: all tokens in their order."""
    if bm == 1:
        return Blocks(tokens, bm, max_blocks=tokens, is_direct=True)
    return Blocks(tokens, bm, triton.cdiv(tokens, bm))


# Where x is transposed, x_d is the number of tokens.
@triton.jit(do_not_specialize=["num_choices"], do_not_specialize_on_alignment=["x_d"])
def gather_rows_kernel(
    x, choices, rows, num_choices, top_k, width,
    x_t, x_d, rows_m, rows_d,  # strides
    BM: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """rows[i] = x[the token of choices[i]], for BM rows and BN columns."""
    wait_for_previous(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    choice = tl.load(choices + m)  # anything in blocks that are not in use
    mask = ((choice >= 0) & (choice < num_choices))[:, None] & (n < width)[None, :]
    token = (choice // top_k).to(tl.int64)
    value = tl.load(x + token[:, None] * x_t + n[None, :] * x_d, mask=mask)
    pointers = rows + m.to(tl.int64)[:, None] * rows_m + n[None, :] * rows_d
    tl.store(pointers, value, mask=mask)


def gather_rows(x: Tensor, blocks: Blocks) -> Tensor:
    """x [T, D] -> [max_blocks · bm, D], the tokens' rows in the order of the blocks.

    The rows are transposed in memory if x is.
    """
    tokens, width = x.shape
    num_rows = blocks.max_blocks * blocks.bm
    rows = x.new_empty(num_rows, width)
    if x.stride(1) != 1:
        rows = x.new_empty(width, num_rows).mT
    bn = min(512, triton.next_power_of_2(width))
    gather_rows_kernel[triton.cdiv(num_rows, 8), triton.cdiv(width, bn)](
        x, blocks.choices, rows, blocks.num_choices, blocks.num_choices // tokens, width,
        *x.stride(), *rows.stride(),
        BM=8, BN=bn, **launch_early(),
    )  # fmt: skip
    return rows
