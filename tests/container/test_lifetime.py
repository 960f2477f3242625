"""How containers of the image start and end: signals, a dead rank, a read-only root file system, an
unknown user id, a new volume.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import httpx
import pytest
from hub_server import REPOSITORY, serve_hub
from podman import DEMO, MOUNTED, READ_ONLY, SERVE, answers, get_health, podman, running
from servers import Api

pytestmark = pytest.mark.container

HUB = "/home/minidcp/.cache/huggingface"


def test_sigterm_waits_for_a_stream() -> None:
    with running("/model", *SERVE, options=MOUNTED) as container:
        url = container.wait_until_healthy()
        begun = threading.Event()
        lines: list[str] = []

        def read_stream() -> None:
            body = Api(url, "/model").body(max_tokens=200, stream=True)
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
                for line in response.iter_lines():
                    lines.extend([line] if line else [])
                    begun.set()

        reader = threading.Thread(target=read_stream)
        reader.start()
        assert begun.wait(60)
        container.send_sigterm()
        reader.join(60)
        assert len(lines) == 201 and lines[-1] == "data: [DONE]"
        assert container.wait(30) == 0


def test_sigterm_ends_a_server_that_is_loading() -> None:
    flags = [*SERVE, "--tp-size", "2"]
    with running("/model", *flags, options=MOUNTED) as container:
        url = container.wait_until_listening()
        assert get_health(url) == 503
        container.send_sigterm()
        assert container.wait(10) == 0
        assert "Serving" not in container.read_output()


def test_a_killed_rank_ends_the_container() -> None:
    with running("/model", *SERVE, "--tp-size", "2", options=MOUNTED) as container:
        container.wait_until_healthy()
        _, _, _, rank = container.find_processes()
        os.kill(rank, signal.SIGKILL)
        assert container.wait(30) == 1
        assert "rank 1: its process ended (exit code -9)" in container.read_output()


def test_a_read_only_root_twice() -> None:
    """A container that is started again finds what its first run has left."""
    with running("/model", *SERVE, options=[*MOUNTED, *READ_ONLY]) as container:
        container.wait_until_healthy()
        container.send_sigterm()
        assert container.wait(30) == 0
        container.start_again()
        assert answers(container.wait_until_healthy())
        assert container.check_health()


def test_a_user_id_without_an_entry_in_passwd() -> None:
    options = [*MOUNTED, "--user=4711"]
    with running("/model", *SERVE, options=options) as container:
        url = container.wait_until_healthy()
        assert answers(url)
        assert container.check_health()
        (status,) = {Path(f"/proc/{p}").stat().st_uid for p in container.find_processes()}
        assert status == 4711
        for folder in ("", "/.triton", "/.cache", "/.cache/huggingface"):
            podman("exec", container.id, "touch", f"/home/minidcp{folder}/written")


def test_a_new_volume_for_the_hub() -> None:
    """The first container downloads the model, the second finds it and needs no hub."""
    volume = f"--volume=minidcp-hub:{HUB}"
    common = ["--env=OMP_NUM_THREADS=1", volume]
    try:
        with serve_hub(DEMO) as endpoint:
            options = [*common, f"--env=HF_ENDPOINT={endpoint}"]
            with running(REPOSITORY, *SERVE, options=options) as container:
                assert answers(container.wait_until_healthy(), REPOSITORY)
        options = [*common, "--env=HF_HUB_OFFLINE=1"]
        with running(REPOSITORY, *SERVE, options=options) as container:
            assert answers(container.wait_until_healthy(), REPOSITORY)
    finally:
        podman("volume", "rm", "--force", "minidcp-hub")
