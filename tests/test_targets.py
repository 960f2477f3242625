"""Our kernels compile for GPUs that are not here: an A100, a Hopper, a B200. Each in a process of
its own, because what Triton compiles for is fixed in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = Path(__file__).parent / "targets" / "compile_kernels.py"
EVERYWHERE = {
    "absorb_query_kernel", "align_kernel", "count_kernel", "gather_mail_kernel",
    "merge_mail_kernel", "merge_partials_kernel", "merge_peers_kernel", "mla_decode_kernel",
    "multiply_blocks_kernel", "multiply_by_head_kernel", "multiply_direct_kernel",
    "multiply_normed_kernel", "norm_mail_kernel", "norm_peers_kernel", "norm_shared_rows_kernel",
    "read_peers_kernel", "read_tokens_kernel", "rms_norm_kernel", "route_kernel",
    "store_latents_kernel", "sum_experts_kernel", "sum_peers_kernel",
}  # fmt: skip
FP8 = {
    "multiply_fp8_kernel", "multiply_gated_vector_kernel", "multiply_vector_kernel",
    "quantize_kernel",
}  # fmt: skip
HOPPER = {"gather_rows_kernel", "mla_decode_hopper_kernel", "multiply_hopper_kernel"}
BOXES = {"gather_rows_kernel", "multiply_sorted_kernel"}  # copied by the tensor memory accelerator
KERNELS = {
    "8.0": EVERYWHERE,
    "9.0": EVERYWHERE | FP8 | HOPPER,
    "10.0": EVERYWHERE | FP8 | BOXES,
}


@pytest.mark.parametrize("capability", KERNELS)
def test_kernels_compile(capability: str) -> None:
    """And take no more shared memory than that GPU has."""
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", str(COMPILE), capability]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert {words[0] for words in lines} == KERNELS[capability]
