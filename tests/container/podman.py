"""Containers of the image under test, run by podman as the documentation runs them with Docker."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from servers import Api, wait_until
from test_faults import children_of

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
# A server of the demo model, with the files mounted read-only.
MOUNTED = ["--env=OMP_NUM_THREADS=1", f"--volume={DEMO}:/model:ro"]
SERVE = ["--device", "cpu", "--port", "0"]
# As docs/operations.md says it; unlike Docker, podman makes /tmp writable by itself if it may.
READ_ONLY = ["--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp"]
READ_ONLY += ["--tmpfs=/home/minidcp/.triton:exec"]
# README.md has this question and this answer.
QUESTION = (
    "Question: Rosa has 17 stamps. Max has 3 times as many stamps as Rosa. Ivy has 12 fewer stamps "
    "than Max. How many stamps do Rosa, Max and Ivy have together?\nAnswer:"
)
ANSWER = " 17 * 3 = 51. 51 - 12 = 39. 17 + 51 = 68. 68 + 39 = 107. The answer is 107."
# The network is the tests' own, where each server has its own port.
OPTIONS = ["--cgroups=disabled", "--network=host", "--ulimit=host", "--cap-drop=ALL"]
OPTIONS += ["--security-opt=no-new-privileges"]


def podman(*arguments: str) -> str:
    """Run podman. Returns what it prints."""
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Container:
    """A container that has been started."""

    def __init__(self, options: list[str], command: list[str]) -> None:
        image = os.environ["MINIDCP_TEST_IMAGE"]
        self.id = podman("run", "--detach", *OPTIONS, *options, image, *command)
        self.pid = self.read_pid()

    def read_pid(self) -> int:
        """The process id of the container's first process, as seen from outside."""
        return int(podman("inspect", "--format", "{{.State.Pid}}", self.id))

    def start_again(self) -> None:
        podman("start", self.id)
        self.pid = self.read_pid()

    def read_output(self) -> str:
        """Standard output and error so far."""
        done = subprocess.run(["podman", "logs", self.id], capture_output=True, text=True)
        return done.stdout + done.stderr

    def check_health(self) -> bool:
        """Run the image's health check."""
        done = subprocess.run(["podman", "healthcheck", "run", self.id], capture_output=True)
        assert done.returncode in (0, 1), done.stderr  # 125: there is none
        return done.returncode == 0

    def wait_until_listening(self) -> str:
        """Wait until the server has written its address. Returns it."""
        wait_until(lambda: self.read_address() or self.has_ended(), 120, "nobody listens")
        assert not self.has_ended(), self.read_output()
        return self.read_address()

    def read_address(self) -> str:
        """What the server has written to the image's MINIDCP_ADDRESS_FILE."""
        file = Path(f"/proc/{self.pid}/root/tmp/minidcp-address")
        return file.read_text() if file.exists() else ""

    def wait_until_healthy(self) -> str:
        """Wait until requests can be sent. Returns the server's address."""
        url = self.wait_until_listening()
        wait_until(lambda: get_health(url) == 200 or self.has_ended(), 120, "it is not healthy")
        assert not self.has_ended(), self.read_output()
        return url

    def has_ended(self) -> bool:
        return not Path(f"/proc/{self.pid}").exists()

    def wait(self, seconds: float) -> int:
        """Wait for the end. Returns the exit code."""
        wait_until(self.has_ended, seconds, "the container has not ended")
        return int(podman("wait", self.id))

    def send_sigterm(self) -> None:
        podman("kill", "--signal=TERM", self.id)

    def find_processes(self) -> list[int]:
        """Process ids, as seen from outside: tini, the server, and its ranks."""
        (server,) = children_of(self.pid)
        return [self.pid, server, *children_of(server)]


def get_health(url: str) -> int | None:
    """The status of /health, or None if nobody listens."""
    try:
        return httpx.get(f"{url}/health", timeout=10).status_code
    except httpx.TransportError:
        return None


@contextmanager
def running(*command: str, options: list[str]) -> Iterator[Container]:
    """A container that is removed at the end, whatever happened."""
    container = Container(options, list(command))
    try:
        yield container
    finally:
        podman("rm", "--force", "--time=0", "--volumes", container.id)


def answers(url: str, model: str = "/model") -> bool:
    """Whether the demo model gives the answer that it was trained for."""
    completion = Api(url, model).complete(QUESTION, max_tokens=64, ignore_eos=False)
    return completion.choices[0].text.startswith(ANSWER)
