"""Logs, progress bars and start-up lines where nobody reads them, and where the disk is full."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from minidcp import LLM, SamplingParams
from minidcp.console import MAX_WAITING, LossyStream, UnfailingStream

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def make_pipe() -> tuple[int, LossyStream]:
    read_end, write_end = os.pipe()
    return read_end, LossyStream(os.fdopen(write_end, "w", encoding="utf-8"))


def read_until(descriptor: int, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        data += os.read(descriptor, 1 << 16)
    return data


def test_text_arrives_whole_and_in_order() -> None:
    read_end, stream = make_pipe()
    lines = [f"line {i} ×\n" for i in range(20_000)]  # more than a pipe holds
    reader = threading.Thread(target=lambda: data.append(read_until(read_end, b"end\n")))
    data: list[bytes] = []
    reader.start()
    for line in lines:
        stream.write(line)
    print("end", file=stream, flush=True)
    reader.join(10)
    assert data[0].decode() == "".join(lines) + "end\n"


def test_a_pipe_that_nobody_reads_blocks_nobody_and_says_later_what_is_missing() -> None:
    read_end, stream = make_pipe()
    logger = logging.Logger("test")
    logger.addHandler(logging.StreamHandler(stream))
    line = "x" * 999
    num_lines = 2 * MAX_WAITING // 1000
    for _ in range(num_lines):
        logger.info(line)
    text = read_until(read_end, b"are missing here]\n").decode()

    *kept, message = text.splitlines()
    assert set(kept) == {line} and len(kept) >= MAX_WAITING // 1000
    assert message == f"[{1000 * (num_lines - len(kept))} characters of output are missing here]"

    logger.info("after that")
    assert read_until(read_end, b"\n") == b"after that\n"


def test_it_waits_for_its_reader_for_a_bounded_time() -> None:
    read_end, stream = make_pipe()
    stream.write("x" * 200_000)
    start = time.monotonic()
    stream.drain(0.1)
    assert time.monotonic() - start >= 0.1
    assert os.read(read_end, 10) == b"x" * 10


def open_full_disk() -> io.TextIOWrapper:
    """Every write to it fails at once: nothing is buffered."""
    return io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)


@needs_dev_full
def test_a_full_disk_hurts_nobody() -> None:
    full = open_full_disk()
    stream = LossyStream(full)
    print("lost", file=stream, flush=True)
    stream.drain(10)
    assert stream.num_waiting == 0 and stream.num_dropped == len("lost\n")
    with pytest.raises(OSError, match="No space"):
        tqdm(total=2, file=full)
    for out in (stream, UnfailingStream(full), UnfailingStream(None)):
        assert list(tqdm(range(2), file=out, mininterval=0)) == [0, 1]


@needs_dev_full
def test_progress_bars_in_other_peoples_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Path(__file__).parents[1] / "examples" / "demo-model"
    full = open_full_disk()
    monkeypatch.setattr(sys, "stderr", full)
    with LLM(str(demo), device="cpu", ranks="threads", tp_size=2) as llm:
        [output] = llm.generate([5, 6], SamplingParams(max_tokens=3, ignore_eos=True), True)
    assert len(output.outputs[0].token_ids) == 3
