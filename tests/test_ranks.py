"""Tokens are the same if ranks are threads, processes, or torchrun's on one node or two."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import Oracle

from minidcp import LLM, SamplingParams

SCRIPT = """
import json, sys
from minidcp import LLM, SamplingParams

if __name__ == "__main__":
    path, prompts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    with LLM(
        path, tp_size=2, dcp_size=2, device="cpu", max_model_len=512, exchange_policy="narrow"
    ) as llm:
        params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        outputs = llm.generate(prompts, params)
        ranks = llm.engine.config.ranks
    with open(out, "w") as file:
        json.dump([ranks, [o.outputs[0].token_ids for o in outputs]], file)
"""
WHICH = (0, 3, 12, 17)


@pytest.mark.parametrize(("tp", "dcp", "comm"), [(2, 2, "a2a"), (4, 2, "ag_rs")])
def test_processes(v2: Oracle, tp: int, dcp: int, comm: str) -> None:
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    with LLM(
        str(v2.path),
        tp_size=tp,
        dcp_size=dcp,
        dcp_comm_backend=comm,
        device="cpu",
        max_model_len=512,
    ) as llm:
        assert llm.engine.config.ranks == "processes"
        outputs = llm.generate([v2.prompts[i] for i in WHICH], params)
    assert [o.outputs[0].token_ids for o in outputs] == [v2.tokens[i][:16] for i in WHICH]


def torchrun(*flags: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *flags]


def run_script(v2: Oracle, directory: Path, agents: list[list[str]]) -> None:
    script, out = directory / "script.py", directory / "out.json"
    script.write_text(SCRIPT)
    arguments = [str(script), str(v2.path), json.dumps([v2.prompts[i] for i in WHICH]), str(out)]
    running = [
        subprocess.Popen(
            [*agent, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for agent in agents
    ]
    for process in running:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert json.loads(out.read_text()) == ["torchrun", [v2.tokens[i][:16] for i in WHICH]]


def test_torchrun(v2: Oracle, tmp_path: Path) -> None:
    run_script(v2, tmp_path, [torchrun("--standalone", "--nproc-per-node", "2")])


def test_torchrun_with_two_agents(v2: Oracle, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(port),
    ]
    run_script(v2, tmp_path, [torchrun(*flags, "--node-rank", str(i)) for i in range(2)])


def test_dcp_multiplies_the_capacity(v2: Oracle) -> None:
    """The same memory per rank holds dcp times as many tokens: a prompt too long for one rank."""
    block_size, num_blocks = 4, 10
    prompt, expected = v2.prompts[-1], v2.tokens[-1][:16]
    assert len(prompt) == 300 > block_size * num_blocks
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    rows, capacities = [], []
    for dcp in (1, 8):
        with LLM(
            str(v2.path),
            tp_size=8,
            dcp_size=dcp,
            ranks="threads",
            device="cpu",
            block_size=block_size,
            num_blocks=num_blocks,
        ) as llm:
            capacities.append(llm.engine.max_model_len)
            rows.append(llm.engine.blocks.num_blocks * block_size)
            if dcp == 1:
                with pytest.raises(ValueError, match="maximum context length is 40 tokens"):
                    llm.generate(prompt, params)
            else:
                assert llm.generate(prompt, params)[0].outputs[0].token_ids == expected
    assert rows == [40, 40]  # per rank
    assert capacities == [40, 320]
