"""Without Triton, as on macOS, everything works on the CPU. Triton is hidden from the import system
of whole processes, which is what a machine without it looks like to all libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from servers import BOS, ONE_THREAD, Api, Server

from minidcp import LLM, SamplingParams

pytest_plugins = ["servers"]

HIDE = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        is_triton = name.split(".")[0] == "triton"
        return None if is_triton else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
IMPORT = """
import importlib.util
assert importlib.util.find_spec("triton") is None

import minidcp
from minidcp.kernels.merge import merge_partials_kernel

try:
    merge_partials_kernel[(1,)](1)
except RuntimeError as error:
    print(error)
"""
PROMPT = [BOS, 5, 9, 17, 30]


@pytest.fixture
def without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started now have no Triton."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hidden), *sys.path]))


def test_imports_and_says_what_is_missing(without_triton: None) -> None:
    command = [sys.executable, "-c", IMPORT]
    env = os.environ | ONE_THREAD
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "merge_partials_kernel needs Triton, which is not installed" in run.stdout


def test_serves_as_make_demo_does(demo: Path, tmp_path: Path, without_triton: None) -> None:
    """The server's tokens are those of this process, which has Triton."""
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    with LLM(str(demo), device="cpu", ranks="threads") as llm:
        expected = llm.generate([PROMPT], params)[0].outputs[0].text

    server = Server(demo, tmp_path, "--ranks", "threads", "--tp-size", "8", "--dcp-size", "8")
    try:
        server.wait_until_healthy()
        answer = Api(server.url, str(demo)).complete(PROMPT, max_tokens=8)
        assert answer.choices[0].text == expected
    finally:
        server.kill()
