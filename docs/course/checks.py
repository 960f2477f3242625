"""Checks the reader's answers to the course's exercises. Each prints what it finds and returns
whether the answer is right. What is right comes from the engine, or from counting one by one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from course import embed, load_layer
from minidcp.attention.reference import attend
from minidcp.kernels.merge import merge_partials
from minidcp.kv_cache.interleave import Interleave

Function = Callable[..., Any]


def say(name: str, problem: str | None) -> bool:
    """Print the verdict. No problem: the answer is right."""
    print(f"{name}: {problem or 'right'}")
    return problem is None


def check_numbers(name: str, given: dict[str, Any], right: dict[str, float]) -> bool:
    """Compare numbers by name, and tell which are missing or wrong, but not what is right."""
    missing = [key for key in right if given.get(key) is None]
    if missing:
        return say(name, f"not answered yet: {', '.join(missing)}")
    wrong = [key for key in right if abs(given[key] - right[key]) > 1e-6 * abs(right[key])]
    return say(name, f"not right: {', '.join(wrong)}" if wrong else None)


def check_calls(name: str, answer: Function, cases: Sequence[tuple[Any, ...]]) -> bool:
    """Call `answer` with all but the last entry of each case, which is the result."""
    for *arguments, right in cases:
        given = answer(*arguments)
        if given is None:
            return say(name, "not answered yet: the function returns None")
        if given != right:
            shown = ", ".join(map(str, arguments))
            return say(name, f"for {shown} it gives {given}, not {right}")
    return say(name, None)


def compare(given: Any, right: Tensor, what: str) -> str | None:
    """What is wrong with a tensor; None if nothing."""
    if given is None:
        return "not answered yet: the function returns None"
    if not isinstance(given, Tensor) or given.shape != right.shape:
        shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        return f"{what} should be a tensor {list(right.shape)}, not {shape}"
    if given.isnan().any():
        return f"{what} has NaN"
    if not torch.allclose(given.float(), right.float(), rtol=1e-4, atol=1e-5):
        return f"{what} is off by up to {(given - right).abs().max().item():.3g}"
    return None


# Chapter 1.


def values_per_rank(given: dict[str, Any]) -> bool:
    right = {"gqa": 8 * 2 * 128 / 4, "mla": 576, "mla with dcp 4": 576 / 4}
    return check_numbers("1.1", given, right)


def attend_absorbed(answer: Function) -> bool:
    layer = load_layer()
    x, _ = embed("Ada has 25 pears.")
    latents = layer.down_proj(x)[:, -576:]
    _, v = layer.decompress(latents)
    p = torch.rand(8, len(x)).softmax(-1)
    right = torch.einsum("ht,thd->hd", p, v)
    return say("1.2", compare(answer(p, latents, layer), right, "the output"))


def multiply_adds(given: dict[str, Any]) -> bool:
    return check_numbers("1.3", given, {"decompressed": 192 + 128, "absorbed": 576 + 512})


# Chapter 2.


def find_token(answer: Function) -> bool:
    cases = []
    for size, block_size, block_table in ((8, 16, [5, 42, 0]), (4, 2, [7, 3, 9]), (1, 4, [1])):
        layout = Interleave(size, block_size)
        for token in range(0, len(block_table) * size * block_size, 5):
            slot = layout.local_slot(token)
            row = layout.cache_row(block_table[slot // block_size], slot)
            cases.append((layout, block_table, layout.owner_of(token), row, token))
    return check_calls("2.1", answer, cases)


def shared_tokens(given: dict[str, Any]) -> bool:
    right = {}
    for size in (1, 8):
        per_block = Interleave(size, 16).tokens_per_block
        right[f"dcp {size}"] = sum(per_block for end in range(per_block, 1001, per_block))
    return check_numbers("2.2", given, right)


def count_stored(answer: Function) -> bool:
    cases = []
    for size, seq_len, steps in ((8, 1003, 20), (4, 3, 1), (4, 0, 18), (3, 10, 2)):
        layout = Interleave(size, 16)
        for rank in range(size):
            new = range(seq_len, seq_len + steps)
            right = sum(1 for token in new if layout.owner_of(token) == rank)
            cases.append((layout, rank, seq_len, steps, right))
    return check_calls("2.3", answer, cases)


# Chapter 3.


def merge_two(answer: Function) -> bool:
    torch.manual_seed(1)
    scores = torch.randn(3, 1, 11) * 3
    values = torch.randn(3, 11, 5)
    right, right_lse = attend(scores, values)
    for cut in (4, 11):  # with 11, the second shard is empty
        out_a, lse_a = attend(scores[..., :cut], values[:, :cut])
        out_b, lse_b = attend(scores[..., cut:], values[:, cut:])
        if cut == 11:
            out_b = torch.full_like(out_a, torch.nan)
        given = answer(out_a[:, 0], lse_a[:, 0], out_b[:, 0], lse_b[:, 0])
        if given is None:
            return say("3.1", "not answered yet: the function returns None")
        where = "with an empty shard, " if cut == 11 else ""
        problem = compare(given[0], right[:, 0], f"{where}out")
        problem = problem or compare(given[1], right_lse[:, 0], f"{where}lse")
        if problem:
            return say("3.1", problem)
    return say("3.1", None)


def shard_weights(given: Sequence[Any]) -> bool:
    names = ["the first", "the second", "the third"]
    right = dict(zip(names, (0.25, 0.75, 0.0), strict=True))
    return check_numbers("3.2", dict(zip(names, given, strict=True)), right)


def merge_in_pairs(answer: Function) -> bool:
    torch.manual_seed(2)
    outs, lses = torch.randn(4, 2, 3, 5), torch.randn(4, 2, 3) * 3
    given = answer(outs, lses)
    if given is None:
        return say("3.3", "not answered yet: the function returns None")
    right, right_lse = merge_partials(outs, lses)
    problem = compare(given[0], right, "out") or compare(given[1], right_lse, "lse")
    return say("3.3", problem)
