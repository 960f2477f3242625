"""Variants of kernels: at start everything is compiled that a step with any number of tokens needs,
so no request waits for a compiler. `ModelRunner.warm_up` and the capture of decode graphs do that.
The launches are only recorded here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from checkpoints import Oracle
from triton.runtime.jit import JITFunction

from minidcp import EngineConfig
from minidcp.batch import MAX_SCORED_TOKENS
from minidcp.kernels import (
    DeviceProperties,
    absorb,
    dense,
    experts,
    fp8,
    grouped,
    grouped_hopper,
    kv_store,
    linear,
    merge,
    norm,
    tiles,
)
from minidcp.kernels.mailbox import PLACE_BYTES, Mailbox, gather_mail, merge_mail, norm_mail
from minidcp.kernels.peer import Meeting, merge_peers, read_peers, sum_peers
from minidcp.kernels.peer_norm import norm_peers, norm_shared_rows
from minidcp.kernels.tiles import choose_tiles
from minidcp.kernels.tokens import read_tokens
from minidcp.machine import Machine
from minidcp.model_config import ModelConfig
from minidcp.models.layers import LMHead
from minidcp.parallel.state import build_thread_states
from minidcp.resolve import resolve
from minidcp.worker.cuda_graph import ladder
from minidcp.worker.model_runner import ModelRunner

Variants = set[object]
BUDGET = 8192
HIDDEN, TOP_K, HEADS = 2048, 8, 16
empty = partial(torch.empty, device="meta")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Variants]:
    """The launched variants: the kernels' constants, and how Triton specialises integers."""
    seen: Variants = set()

    def record(self: JITFunction[object], *args: object, **options: object) -> None:
        integers = [
            (p.name, value == 1, value % 16 == 0 and not p.do_not_specialize_on_alignment)
            for p, value in zip(self.params, args, strict=False)
            if isinstance(value, int) and not p.is_constexpr and not p.do_not_specialize
        ]
        del options["grid"], options["warmup"]
        seen.add((self.fn.__name__, tuple(integers), tuple(sorted(options.items()))))

    monkeypatch.setattr(JITFunction, "run", record)
    for module in (absorb, dense, experts, fp8, kv_store, linear, merge, norm):
        monkeypatch.setattr(module, "use_triton", lambda _: True)
    monkeypatch.setattr("minidcp.kernels.tokens.use_triton", lambda _: True)
    properties = DeviceProperties((9, 0), 132, 232448)
    for module in (grouped, grouped_hopper, tiles):
        monkeypatch.setattr(module, "get_device_properties", lambda: properties)
    tiles.list_tiles.cache_clear()
    monkeypatch.setattr(dense, "can_use_cublas", lambda weight, out: False)
    yield seen
    tiles.list_tiles.cache_clear()


def run_experts(experts_of: int, inter: int, hidden: int, tokens: int) -> None:
    gate_up = empty(experts_of, 2 * inter, hidden).bfloat16()
    down = empty(experts_of, hidden, inter).bfloat16()
    ids = empty(tokens, TOP_K, dtype=torch.int32)
    experts.run_experts(
        empty(tokens, hidden).bfloat16(), gate_up, down, empty(tokens, TOP_K), ids
    ).sum()


def make_stack(count: int, rows: int, columns: int) -> fp8.Stack:
    return fp8.allocate_stack(count, fp8.quantize_weight(empty(rows, columns)))


def run_experts_in_fp8(experts_of: int, inter: int, hidden: int, tokens: int) -> None:
    gate_up = make_stack(experts_of, 2 * inter, hidden)
    down = make_stack(experts_of, hidden, inter)
    ids = empty(tokens, TOP_K, dtype=torch.int32)
    x = empty(tokens, hidden).bfloat16()
    experts.run_experts(x, gate_up, down, empty(tokens, TOP_K), ids).sum()


def multiply_in_fp8(tokens: int) -> None:
    """By our kernels: some inputs, and few."""
    for rows, columns in ((2048, 10944), (200, 192)):
        weight = fp8.quantize_weight(empty(rows, columns))
        dense.multiply(empty(tokens, columns).bfloat16(), weight)


def merge_prefill(tokens: int) -> None:
    merge.merge_partials(empty(2, tokens, HEADS, 128).bfloat16(), empty(2, tokens, HEADS))


POINTERS = empty(8, dtype=torch.int64)
MAILBOX = Mailbox(0, (POINTERS, POINTERS), 264)
MEETING = Meeting(0, POINTERS, empty(512, dtype=torch.int32), 264)


def merge_from_peers(tokens: int) -> None:
    lse, out = empty(tokens, 8 * HEADS), empty(tokens, HEADS, 128).bfloat16()
    merge_peers(MEETING, POINTERS, 1 << 26, lse, lse, out, empty(tokens, HEADS))


def read_from_peers(tokens: int) -> None:
    """The widths are those of latents, q, and absorbed q."""
    for width in (576, 192 * HEADS, 576 * HEADS):
        read_peers(MEETING, POINTERS, width, 0, empty(tokens, 8, width).bfloat16())


def sum_of_peers(tokens: int) -> None:
    sum_peers(MEETING, POINTERS, 5120, 0, empty(tokens, 5120).bfloat16())


def norm_sum_of_peers(tokens: int) -> None:
    residual, weight = empty(tokens, HIDDEN).bfloat16(), empty(HIDDEN).bfloat16()
    parts, scales = empty(tokens, TOP_K, HIDDEN).bfloat16(), empty(tokens, TOP_K)
    for quantizes in (False, True):
        for x, weights, place in ((residual, None, None), (parts, scales, residual)):
            norm_peers(MEETING, POINTERS, x, weights, place, residual, weight, 1e-6, quantizes)


def norm_rows_of_the_second_of_8_ranks(tokens: int) -> None:
    """First it has all rows of the residual, then its own."""
    rows, weight = -(-tokens // 8), empty(HIDDEN).bfloat16()
    staged = empty(rows, HIDDEN).bfloat16()
    residual = empty(tokens, HIDDEN).bfloat16()[rows:][:rows]
    meeting = replace(MEETING, rank=1)
    for quantizes in (False, True):
        for _ in range(2):
            _, residual = norm_shared_rows(
                meeting, POINTERS, POINTERS, staged, residual, tokens, weight, 1e-6, quantizes
            )


def send_mail(rows: int) -> None:
    """Few rows' q, raw and absorbed, their partial outputs, narrow and wide, and summands."""
    for width in (192 * HEADS, 576 * HEADS):
        x, out = empty(rows, width).bfloat16(), empty(rows, 8, width).bfloat16()
        gather_mail(MAILBOX, POINTERS, x, out)
    partial_lse, lse = empty(rows, 8 * HEADS), empty(rows, HEADS)
    for dim in (128, 512):
        partial_out = empty(rows, 8 * HEADS, dim).bfloat16()
        merged = empty(rows, HEADS, dim).bfloat16()
        merge_mail(MAILBOX, POINTERS, partial_out, partial_lse, merged, lse)
    residual, weight = empty(rows, HIDDEN).bfloat16(), empty(HIDDEN).bfloat16()
    parts, scales = empty(rows, TOP_K, HIDDEN).bfloat16(), empty(rows, TOP_K)
    for quantizes in (False, True):
        for x, weights in ((residual, None), (parts, scales)):
            norm_mail(MAILBOX, POINTERS, x, weights, residual, weight, 1e-6, quantizes)


def compare_best_tokens(rows: int) -> None:
    read_peers(MEETING, POINTERS, 2, 0, empty(rows, 8, 2, dtype=torch.float64))


def multiply_heads(tokens: int) -> None:
    linear.multiply_by_head(
        empty(tokens, HEADS, 192).bfloat16()[..., :128], empty(HEADS, 512, 128).bfloat16()
    )


def normalise(tokens: int) -> None:
    x, weight = empty(tokens, HIDDEN).bfloat16(), empty(HIDDEN).bfloat16()
    norm.rms_norm(x, weight, 1e-6)
    norm.rms_norm(x, weight, 1e-6, x)
    norm.rms_norm(x, weight, 1e-6, quantizes=True)
    norm.rms_norm(x, weight, 1e-6, x, quantizes=True)
    parts = empty(tokens, TOP_K, HIDDEN).bfloat16()
    for quantizes in (False, True):
        norm.rms_norm(parts, weight, 1e-6, x, empty(tokens, TOP_K), quantizes)


def store(tokens: int) -> None:
    kv, q = empty(tokens, 576).bfloat16(), empty(tokens, HEADS, 192).bfloat16()
    slots, cache = empty(tokens, dtype=torch.int32), empty(10, 16, 576).bfloat16()
    new = kv_store.NewLatents(kv, empty(512).bfloat16(), 1e-6, empty(tokens, 64), cache, slots)
    kv_store.store_latents(new, q[..., 128:])
    absorb.absorb_query(q, empty(HEADS, 128, 512).bfloat16(), new)


@pytest.mark.parametrize(
    "run",
    [
        partial(run_experts, 66, 1408, 2048),
        partial(run_experts, 162, 192, 5120),
        partial(run_experts, 10, 96, 256),
    ],
    ids=["V2-Lite", "V2, rank of 8", "by the rule"],
)
def test_experts(run: Callable[[int], None], launched: Variants) -> None:
    number, inter, hidden = run.args  # type: ignore[attr-defined]
    bounds = [n for n in tiles.list_tiles(number, TOP_K, hidden, inter) if n <= BUDGET]
    check(run, [*bounds, *ladder(256)], launched)


@pytest.mark.parametrize(
    "run",
    [
        partial(run_experts_in_fp8, 66, 1408, 2048),
        partial(run_experts_in_fp8, 10, 96, 256),
        partial(run_experts_in_fp8, 162, 192, 5120),
    ],
    ids=["V2-Lite", "by the rule", "by the rule, many experts"],
)
def test_experts_in_fp8(run: Callable[[int], None], launched: Variants) -> None:
    number, inter, hidden = run.args  # type: ignore[attr-defined]
    limits = tiles.list_tiles(number, TOP_K, hidden, inter, itemsize=1)
    check(run, [*(n for n in limits if n <= BUDGET), *ladder(256)], launched)


@pytest.mark.usefixtures("launched")
def test_what_the_kernel_for_hopper_is_for() -> None:
    """Weights of one and two bytes, in rows that boxes can begin at."""

    def is_used(hidden: int, itemsize: int) -> bool:
        return choose_tiles(BUDGET, 66, TOP_K, hidden, 1408, itemsize).down.is_for_hopper

    assert is_used(2048, itemsize=1) and is_used(2048, itemsize=2)
    assert not is_used(2048, itemsize=4) and not is_used(2052, itemsize=2)


@pytest.mark.parametrize(
    "run",
    [
        normalise,
        sum_of_peers,
        norm_sum_of_peers,
        norm_rows_of_the_second_of_8_ranks,
        multiply_in_fp8,
    ],
)
def test_what_whole_steps_run(run: Callable[[int], None], launched: Variants) -> None:
    check(run, ladder(256), launched)


@pytest.mark.parametrize("run", [store, multiply_heads, read_from_peers])
def test_what_prompts_and_decode_rows_run(run: Callable[[int], None], launched: Variants) -> None:
    check(run, ladder(256), launched, decoding=1)


@pytest.mark.parametrize(("run", "most"), [(merge_prefill, BUDGET), (merge_from_peers, 1024)])
def test_what_prompts_run(run: Callable[[int], None], most: int, launched: Variants) -> None:
    """Prompts with context. At most 1,024 tokens send their q at a time."""
    check(run, [], launched, decoding=1, most=most)


def test_what_goes_by_mail(launched: Variants) -> None:
    check(send_mail, [], launched, decoding=1, most=PLACE_BYTES // (2 * HIDDEN))


def test_one_variant_reads_tokens(launched: Variants) -> None:
    """Start reads them where graphs are captured, or else where drafts are warmed up for."""
    for rows in range(1, 513):
        codes, slots = empty(rows, dtype=torch.int32), empty(rows, dtype=torch.int32)
        read_tokens(codes, empty(257, 4, dtype=torch.int64), slots)
    assert len(launched) == 1


def test_what_sampling_runs(launched: Variants) -> None:
    check(compare_best_tokens, ladder(256), launched, most=256)


def test_start_gathers_few_logits_and_many(v2: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few go by mail, by another kernel than many. Without DCP nothing else compiles it."""
    gathered = []
    monkeypatch.setattr(LMHead, "gather", lambda self, logits: gathered.append(len(logits)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    config = EngineConfig(str(v2.path), device="cpu", max_model_len=64, max_num_batched_tokens=256)
    model_config = ModelConfig.from_hf(v2.path)
    states, _ = build_thread_states(1, 1)
    resolved = resolve(config, model_config, Machine())
    runner = ModelRunner(resolved, model_config, states[0], torch.device("cpu"))
    runner.warm_up(runner.list_warm_up_sizes())
    assert gathered == [1, config.max_num_seqs + MAX_SCORED_TOKENS]


def check(
    run: Callable[[int], None],
    more: list[int],
    launched: Variants,
    decoding: int = 0,
    most: int = BUDGET,
) -> None:
    """Check that start launches every variant that steps of up to `most` tokens need.

    Start runs steps of powers of two, in which `decoding` rows decode, and the sizes in `more`.
    """
    for size in {*more, *(max(1, (1 << i) - decoding) for i in range(14))}:
        run(size)
    at_start = set(launched)
    assert at_start
    for tokens in range(1, most + 1, 7 if most > 2048 else 1):
        run(tokens)
        assert launched == at_start, f"{tokens} tokens need another variant"
