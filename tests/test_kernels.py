"""Run tests/interpreter in a process of its own, because Triton's import fixes its mode."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "interpreter"


@pytest.mark.parametrize("file", ["check_kernels.py", "check_fp8.py", "check_mailbox.py"])
def test_kernels_under_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CHECKS / file)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^\d+ passed", run.stdout, re.M), "nothing ran"
