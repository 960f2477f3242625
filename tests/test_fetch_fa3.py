"""`minidcp fetch-fa3` with pip itself and wheels that are made here, in place of vLLM's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from minidcp import fetch_fa3
from minidcp.cli import main
from minidcp.kernels.fa3 import VLLM_LIBRARY, find_vllm_library, locate_fetched_library

METADATA = """Metadata-Version: 2.1
Name: vllm
Version: {version}
Requires-Dist: numpy
Requires-Dist: torch=={torch}
"""
WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def make_wheel(folder: Path, version: str, torch_version: str, library: bytes = b"library") -> None:
    info = f"vllm-{version}.dist-info"
    with ZipFile(folder / f"vllm-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("vllm/__init__.py", "")
        wheel.writestr(f"vllm/vllm_flash_attn/{VLLM_LIBRARY}", library)
        wheel.writestr(f"{info}/METADATA", METADATA.format(version=version, torch=torch_version))
        wheel.writestr(f"{info}/licenses/LICENSE", "licence")
        wheel.writestr(f"{info}/WHEEL", WHEEL)
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip finds wheels, and nowhere else. The installed torch is 2.11 with CUDA."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return folder


def test_keeps_the_library_where_it_is_found(
    wheels: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_wheel(wheels, fetch_fa3.VLLM_VERSIONS["2.11"], "2.11.0")
    checked = []
    monkeypatch.setattr(
        fetch_fa3, "check_library", lambda version, path: checked.append(path.read_bytes())
    )
    assert main(["fetch-fa3"]) == 0
    assert checked == [b"library"]
    library = find_vllm_library()
    assert library == locate_fetched_library() and library.read_bytes() == b"library"
    assert str(library) in capfd.readouterr().out
    # And nothing of the wheel but that and its licence.
    assert sorted(path.name for path in library.parent.iterdir()) == ["LICENSE", VLLM_LIBRARY]

    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert find_vllm_library() is None  # it would not fit


def fail(capfd: pytest.CaptureFixture[str], *flags: str) -> str:
    """What the command says when it fails. Nothing is left where the engine looks."""
    assert main(["fetch-fa3", *flags]) == 2
    assert not locate_fetched_library().exists()
    return capfd.readouterr().err


def test_what_cannot_be_loaded_is_not_kept(wheels: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_wheel(wheels, "0.24.0", "2.11.0", library=b"not a library")
    said = fail(capfd)
    assert "FlashAttention-3 of vLLM 0.24.0 cannot be loaded with torch 2.11.0+cu130: " in said
    assert "OSError" in said and VLLM_LIBRARY in said


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_library_without_the_operators_is_not_kept(
    wheels: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "empty.so"
    command = ["gcc", "-shared", "-x", "c", "/dev/null", "-o", str(library)]
    subprocess.run(command, check=True)
    make_wheel(wheels, "0.24.0", "2.11.0", library.read_bytes())
    assert "has no attribute 'get_scheduler_metadata'" in fail(capfd)


def test_says_which_torch_it_wants(
    wheels: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_wheel(wheels, "0.33.0", "2.14.0")
    said = fail(capfd, "--vllm-version", "0.33.0")
    assert "vLLM 0.33.0 wants torch 2.14.0, and 2.11.0+cu130 is installed" in said

    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    said = fail(capfd)
    assert "torch 2.13.0+cu130 is installed; known to fit is torch 2.11 (vLLM 0.24.0)" in said

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "torch 2.13.0+cu130 is without CUDA" in fail(capfd)


def test_says_that_pip_has_found_nothing(wheels: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "pip could not download vllm==0.24.0" in fail(capfd)


def test_says_that_it_cannot_keep_it(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    said = fail(capfd)
    assert f"cannot write to {locate_fetched_library().parent} (Not a directory)" in said
    assert "set XDG_CACHE_HOME" in said


def test_the_image_has_the_same() -> None:
    dockerfile = (Path(__file__).parent.parent / "Dockerfile").read_text()
    defaults = dict(
        line.removeprefix("ARG ").split("=", 1)
        for line in dockerfile.splitlines()
        if line.startswith("ARG ")
    )
    release = ".".join(defaults["TORCH_VERSION"].split(".")[:2])
    assert fetch_fa3.VLLM_VERSIONS[release] == defaults["VLLM_VERSION"]
