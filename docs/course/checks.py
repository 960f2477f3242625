"""Checks the reader's answers to the course's exercises. Each prints what it finds and returns
whether the answer is right. What is right comes from the engine, or from counting one by one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from course import V2, embed, load_layer, run_ranks
from torch import Tensor

from minidcp.attention.context import ContextPolicy
from minidcp.attention.reference import attend
from minidcp.batch import BlockTables, ContextPiece, StepPlan
from minidcp.engine.scheduler import Scheduler
from minidcp.kernels.linear import multiply_by_head
from minidcp.kernels.merge import merge_partials
from minidcp.kv_cache.block_manager import BlockManager
from minidcp.kv_cache.interleave import Interleave
from minidcp.model_config import ModelConfig
from minidcp.parallel.state import ParallelState
from minidcp.request import Request, SamplingParams

Function = Callable[..., Any]


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right. A notebook shows nothing of it: it has been printed."""

    is_right: bool

    def _ipython_display_(self) -> None:
        pass


def say(name: str, problem: str | None) -> Verdict:
    """Print the verdict. No problem: the answer is right."""
    print(f"{name}: {problem or 'right'}")
    return Verdict(problem is None)


def check_numbers(name: str, given: dict[str, Any], right: Mapping[str, float]) -> Verdict:
    """Compare numbers by name, and tell which are missing or wrong, but not what is right."""
    missing = [key for key in right if given.get(key) is None]
    if missing:
        return say(name, f"not answered yet: {', '.join(missing)}")
    wrong = [key for key in right if abs(given[key] - right[key]) > 1e-6 * abs(right[key])]
    return say(name, f"not right: {', '.join(wrong)}" if wrong else None)


def check_calls(name: str, answer: Function, cases: Sequence[tuple[Any, ...]]) -> Verdict:
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


def values_per_rank(given: dict[str, Any]) -> Verdict:
    right = {"gqa": 8 * 2 * 128 / 4, "mla": 576, "mla with dcp 4": 576 / 4}
    return check_numbers("1.1", given, right)


def attend_absorbed(answer: Function) -> Verdict:
    layer = load_layer()
    x, _ = embed("Ada has 25 pears.")
    latents = layer.down_proj(x)[:, -576:]
    _, v = layer.decompress(latents)
    p = torch.rand(8, len(x)).softmax(-1)
    right = torch.einsum("ht,thd->hd", p, v)
    return say("1.2", compare(answer(p, latents, layer), right, "the output"))


def multiply_adds(given: dict[str, Any]) -> Verdict:
    return check_numbers("1.3", given, {"decompressed": 192 + 128, "absorbed": 576 + 512})


# Chapter 2.


def find_token(answer: Function) -> Verdict:
    cases = []
    for size, block_size, block_table in ((8, 16, [5, 42, 0]), (4, 2, [7, 3, 9]), (1, 4, [1])):
        layout = Interleave(size, block_size)
        for token in range(0, len(block_table) * size * block_size, 5):
            slot = layout.local_slot(token)
            row = layout.cache_row(block_table[slot // block_size], slot)
            cases.append((layout, block_table, layout.owner_of(token), row, token))
    return check_calls("2.1", answer, cases)


def shared_tokens(given: dict[str, Any]) -> Verdict:
    right = {}
    for size in (1, 8):
        per_block = Interleave(size, 16).tokens_per_block
        right[f"dcp {size}"] = sum(per_block for end in range(per_block, 1001, per_block))
    return check_numbers("2.2", given, right)


def count_stored(answer: Function) -> Verdict:
    cases = []
    for size, seq_len, steps in ((8, 1003, 20), (4, 3, 1), (4, 0, 18), (3, 10, 2)):
        layout = Interleave(size, 16)
        for rank in range(size):
            new = range(seq_len, seq_len + steps)
            right = sum(1 for token in new if layout.owner_of(token) == rank)
            cases.append((layout, rank, seq_len, steps, right))
    return check_calls("2.3", answer, cases)


# Chapter 3.


def merge_two(answer: Function) -> Verdict:
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


def shard_weights(given: Sequence[Any]) -> Verdict:
    names = ["the first", "the second", "the third"]
    right = dict(zip(names, (0.25, 0.75, 0.0), strict=True))
    return check_numbers("3.2", dict(zip(names, given, strict=True)), right)


def merge_in_pairs(answer: Function) -> Verdict:
    torch.manual_seed(2)
    outs, lses = torch.randn(4, 2, 3, 5), torch.randn(4, 2, 3) * 3
    given = answer(outs, lses)
    if given is None:
        return say("3.3", "not answered yet: the function returns None")
    right, right_lse = merge_partials(outs, lses)
    problem = compare(given[0], right, "out") or compare(given[1], right_lse, "lse")
    return say("3.3", problem)


# Chapter 4.


def dcp_group(ranks: Sequence[int] | None, copies: int | None) -> Verdict:
    if ranks is None or copies is None:
        return say("4.1", "not answered yet")
    members = run_ranks(lambda state: state.dcp.all_gather(torch.tensor([state.tp.rank])), 8, 4)
    if sorted(ranks) != members[5].flatten().tolist():
        return say("4.1", "not right: the group")
    groups = {tuple(member.flatten().tolist()) for member in members}
    return say("4.1", None if copies == len(groups) else "not right: the copies")


def reduce_scatter(answer: Function) -> Verdict:
    def work(state: ParallelState) -> tuple[Any, Tensor]:
        x = torch.arange(24).view(2, 4, 3).float() + state.tp.rank**2
        return answer(state.tp, x), state.tp.reduce_scatter(x)

    for given, right in run_ranks(work, 4, 4):
        problem = compare(given, right, "the result")
        if problem:
            return say("4.2", problem)
    return say("4.2", None)


def received_bytes(given: dict[str, Any]) -> Verdict:
    x = torch.zeros(1, 8, 125, dtype=torch.uint8)  # 1,000 bytes

    def work(state: ParallelState) -> dict[str, int]:
        counts = {}
        for name in ("all_gather", "all_to_all"):
            before = state.tp.received_bytes
            getattr(state.tp, name)(x)
            counts[name] = state.tp.received_bytes - before
        return counts

    return check_numbers("4.3", given, run_ranks(work, 8, 8)[0])


# Chapter 5.


def count_received(answer: Function) -> Verdict:
    cases = [
        (8, 128, 576, 512, 244_160),
        (8, 128, 192, 128, 72_128),
        (4, 128, 192, 128, 61_824),
        (2, 16, 576, 512, 17_440),
        (1, 16, 576, 512, 0),
    ]
    return check_calls("5.1", answer, cases)


def merge_narrow(answer: Function) -> Verdict:
    torch.manual_seed(3)
    outs, lses = torch.randn(4, 2, 8, 512), torch.randn(4, 2, 8)
    w_uv = load_layer().w_uv
    merged, _ = merge_partials(outs, lses)
    right = multiply_by_head(merged, w_uv)
    return say("5.2", compare(answer(outs, lses, w_uv), right, "the result"))


def saved_bytes(given: dict[str, Any]) -> Verdict:
    right = {}
    for size in (2, 8):
        peers_heads = (size - 1) * (128 // size)
        right[f"{size} ranks"] = peers_heads * 2 * ((576 + 512) - (192 + 128))
    return check_numbers("5.3", given, right)


# Chapter 6.


def row_lengths(given: Sequence[int]) -> Verdict:
    if not given:
        return say("6.1", "not answered yet")
    scheduler = Scheduler(BlockManager(8, 8), max_num_seqs=1, budget=10)
    scheduler.add(Request("A", list(range(25)), SamplingParams(), max_tokens=4, seed=0))
    right = []
    step = scheduler.schedule()
    while step is not None:
        right += step.plan.lengths
        scheduler.update(step, [7] * len(step.plan.sampling))
        step = scheduler.schedule()
    if list(given) == right:
        return say("6.1", None)
    return say("6.1", f"not right: {len(given)} steps with {sum(given)} tokens")


def list_local_lens(answer: Function) -> Verdict:
    cases = []
    for size, p in ((4, 14), (4, 3), (8, 0), (2, 9)):
        layout = Interleave(size, 2)
        owners = [layout.owner_of(token) for token in range(p + 1)]
        cases.append((layout, p, [owners.count(rank) for rank in range(size)]))
    return check_calls("6.2", answer, cases)


# Chapter 7.


def choose_gather(answer: Function) -> Verdict:
    cases = [(1, 50, "kv"), (1, 80, "q"), (16, 4000, "q"), (512, 4000, "kv"), (100, 7000, "kv")]
    return check_calls("7.1", answer, cases)


def gathered_places(owner: Sequence[int], sent_index: Sequence[int]) -> Verdict:
    if not owner or not sent_index:
        return say("7.2", "not answered yet")
    policy = ContextPolicy(
        ModelConfig.from_hf(V2), 32, Interleave(size=4, block_size=2), strategy="gather_kv"
    )
    tables = BlockTables(max_num_seqs=1, width=2)
    plan = StepPlan(slots=[0], starts=[7], lengths=[1])
    [piece] = policy.build_context(plan, tables, 0, lambda count: True, torch.device("cpu"))
    assert isinstance(piece, ContextPiece)
    if list(owner) != piece.owner.tolist():
        return say("7.2", "not right: owner")
    is_right = list(sent_index) == piece.sent_index.tolist()
    return say("7.2", None if is_right else "not right: sent_index")


def draft_lens(given: Sequence[int]) -> Verdict:
    if not given:
        return say("7.3", "not answered yet")
    layout = Interleave(size=4, block_size=2)
    owners = [layout.owner_of(token) for token in range(24)]
    right = [owners[:seen].count(2) for seen in (21, 22, 23, 24)]
    return say("7.3", None if list(given) == right else f"not right: {list(given)}")
