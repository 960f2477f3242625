"""Containers of the image answer, without rights. `run` builds the image (`make test-container`).
How they start and end in other ways is in `test_lifetime.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from podman import MOUNTED, SERVE, Container, answers, podman, running

pytestmark = pytest.mark.container


@dataclass
class Served:
    container: Container
    url: str
    was_healthy_at_first: bool


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """Two ranks that serve the demo model."""
    with running("/model", *SERVE, "--tp-size", "2", options=MOUNTED) as container:
        healthy = container.check_health()
        yield Served(container, container.wait_until_healthy(), healthy)


def test_no_arguments_print_the_help() -> None:
    with running(options=[]) as container:
        assert container.wait(60) == 0
        assert "usage: minidcp serve" in container.read_output()
        assert "--dcp-size" in container.read_output()


def test_a_wrong_path_is_a_message_and_code_2() -> None:
    with running("/no/model", "--tp-size", "8", options=[]) as container:
        assert container.wait(60) == 2
        assert "minidcp: error: --model-path '/no/model'" in container.read_output()


def test_no_flags_but_the_model_serve_on_port_8000() -> None:
    """The port that the documentation publishes. Nothing else uses it in this network."""
    with running("/model", "--device", "cpu", options=MOUNTED) as container:
        assert container.wait_until_healthy() == "http://127.0.0.1:8000"
        assert answers("http://127.0.0.1:8000")


def test_it_answers(served: Served) -> None:
    assert answers(served.url)


def test_nothing_runs_with_rights(served: Served) -> None:
    processes = served.container.find_processes()
    assert len(processes) >= 4  # tini, the driver, two ranks
    for process in processes:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines)
        assert status["Uid"].split() == ["1000"] * 4
        assert status["Gid"].split() == ["1000"] * 4
        assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd")} == {0}


def test_health_is_bad_before_and_good_after(served: Served) -> None:
    assert not served.was_healthy_at_first
    assert served.container.check_health()


def test_fa3_is_there(served: Served) -> None:
    """Where torch has CUDA, the build has also loaded it."""
    script = "from minidcp.kernels.fa3 import find_vllm_library as f; print(f())"
    library = podman("exec", served.container.id, "python", "-c", script)
    assert library.startswith("/opt/fa3/vllm/"), library
    for operator in ("_vllm_fa3_C", "get_scheduler_metadata"):
        podman("exec", served.container.id, "grep", "--quiet", operator, library)

    linked = podman("exec", served.container.id, "ldd", library).splitlines()
    missing = {line.split()[0] for line in linked if line.endswith("=> not found")}
    # The host's driver brings this one, CUDA or torch the others. Nothing else may be missing.
    assert "libcuda.so.1" in missing
    assert all(name.startswith(("libcu", "libtorch", "libc10")) for name in missing), missing


def test_an_api_key() -> None:
    options = [*MOUNTED, "--env=MINIDCP_API_KEY=secret"]
    with running("/model", *SERVE, options=options) as container:
        url = container.wait_until_healthy()
        statuses = [
            httpx.get(f"{url}/v1/models", headers=headers).status_code
            for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Bearer secret"})
        ]
        assert statuses == [401, 401, 200]
        assert container.check_health()
