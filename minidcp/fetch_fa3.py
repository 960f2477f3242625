"""`minidcp fetch-fa3`: FlashAttention-3 for those who do not use the image. It is compiled for
DeepSeek's head dims in one shared object of vLLM's wheel, which is built against one release of
torch. The wheel comes from wherever pip takes its wheels. The Dockerfile does the same."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import torch

from minidcp.config import require
from minidcp.kernels.fa3 import VLLM_LIBRARY, locate_fetched_library, name_torch_release

# By release of torch. With these it has been run.
VLLM_VERSIONS = {"2.11": "0.24.0"}

# In a process of its own: what is loaded stays loaded, and a wrong library may end the process.
CHECK = """
import sys
from pathlib import Path
from minidcp.kernels.fa3 import load_vllm_library
ops = load_vllm_library(Path(sys.argv[1])).ops
ops.get_scheduler_metadata
names = [argument.name for argument in ops.fwd.default._schema.arguments]
expected = ["s_aux", "cp_world_size", "cp_rank", "cp_tot_seqused_k"]
if len(names) != 37 or names[-4:] != expected:
    sys.exit(f"its operator fwd takes other arguments: {names}")
"""


def fetch_fa3(vllm_version: str | None = None) -> Path:
    """Download vLLM's wheel, keep its copy of FlashAttention-3, and return where that is.

    Raises ValueError if it does not fit the installed torch, or cannot be had, kept or loaded.
    """
    require(
        torch.version.cuda is not None,
        f"fetch-fa3: torch {torch.__version__} is without CUDA; install one with it first",
    )
    version = vllm_version or find_vllm_version()
    target = locate_fetched_library()
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fetch_into(target, version)
    except OSError as error:
        raise ValueError(
            f"fetch-fa3: cannot write to {folder} ({error.strerror or error}); set XDG_CACHE_HOME "
            "to a folder where there is room and that the engine can read"
        ) from None
    return target


def fetch_into(target: Path, version: str) -> None:
    # Beside its place, so that it can be moved there at once.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        with ZipFile(download_wheel(version, Path(folder))) as wheel:
            check_torch(version, wheel)
            library = extract(wheel, rf".*/{re.escape(VLLM_LIBRARY)}", Path(folder))
            licence = extract(wheel, r"[^/]*\.dist-info/licenses/LICENSE", Path(folder))
        check_library(version, library)
        licence.replace(target.parent / "LICENSE")
        library.replace(target)


def find_vllm_version() -> str:
    """The vLLM whose FlashAttention-3 fits the installed torch."""
    known = [f"torch {torch} (vLLM {vllm})" for torch, vllm in VLLM_VERSIONS.items()]
    release = name_torch_release()
    require(
        release in VLLM_VERSIONS,
        f"fetch-fa3: torch {torch.__version__} is installed; known to fit is {', '.join(known)}. "
        "Install that torch, or name the vLLM that needs yours with --vllm-version",
    )
    return VLLM_VERSIONS[release]


def download_wheel(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"vllm=={version}"]
    run = subprocess.run(command, stdout=sys.stderr, check=False)
    require(run.returncode == 0, f"fetch-fa3: pip could not download vllm=={version}, as it says")
    return next(folder.glob("vllm-*.whl"))


def check_torch(version: str, wheel: ZipFile) -> None:
    """Raises ValueError if this vLLM was built against another torch."""
    metadata = wheel.read(find_member(wheel, r"[^/]*\.dist-info/METADATA")).decode()
    found = re.search(r"^Requires-Dist: torch==(\S+)", metadata, re.MULTILINE)
    wanted = found[1] if found else "unknown"
    require(
        wanted.split(".")[:2] == name_torch_release().split("."),
        f"fetch-fa3: vLLM {version} wants torch {wanted}, and {torch.__version__} is installed; "
        f"pip install torch=={wanted}, or name another with --vllm-version",
    )


def extract(wheel: ZipFile, pattern: str, folder: Path) -> Path:
    return Path(wheel.extract(find_member(wheel, pattern), folder))


def find_member(wheel: ZipFile, pattern: str) -> str:
    for name in wheel.namelist():
        if re.fullmatch(pattern, name):
            return name
    raise ValueError(f"fetch-fa3: {Path(wheel.filename or '').name} has no file like {pattern}")


def check_library(version: str, library: Path) -> None:
    command = [sys.executable, "-c", CHECK, str(library)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
    causes = [line for line in lines if re.match(r"\w+Error: ", line)]  # the first is behind others
    require(
        run.returncode == 0,
        f"fetch-fa3: FlashAttention-3 of vLLM {version} cannot be loaded with torch "
        f"{torch.__version__}: {[*causes, lines[-1]][0]}",
    )
