"""Two containers as two nodes, started by the command of `examples/kubernetes-two-nodes.yaml`."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
from podman import MOUNTED, READ_ONLY, answers, running
from test_manifests import fill_in, read_group

pytestmark = pytest.mark.container

# One CPU a node instead of eight GPUs.
SMALLER = {"--nproc-per-node=8": "--nproc-per-node=1", "--port=8000": "--port=0"}
SMALLER |= {"--tp-size=16": "--tp-size=2", "--dcp-size=16": "--dcp-size=2"}


def test_two_nodes_serve_together_and_end_together() -> None:
    _, pods = read_group()
    nodes = []
    with ExitStack() as stack:
        for index, pod in enumerate(pods):
            command = fill_in(pod["containers"][0]["command"], index, leader="127.0.0.1")
            assert set(SMALLER) <= set(command)
            command = [SMALLER.get(word, word) for word in command] + ["--device=cpu"]
            options = [*MOUNTED, *READ_ONLY, "--user=1000:0"]
            options.append(f"--entrypoint={json.dumps(command)}")
            nodes.append(stack.enter_context(running(options=options)))

        assert answers(nodes[0].wait_until_healthy(), "deepseek-v2")
        for node in nodes:
            node.send_sigterm()
        codes = [node.wait(40) for node in nodes]
        assert set(codes) <= {0, 1}, [node.read_output() for node in nodes]
        for node in nodes:
            assert "Killed" not in node.read_output()
