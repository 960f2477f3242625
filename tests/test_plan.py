"""`minidcp plan` compared with real models, engines and exchanges."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STYLES
from exchange import count_bytes

from minidcp.attention.reference import ReferenceBackend
from minidcp.cli import main
from minidcp.config import EngineConfig
from minidcp.engine.engine import LLMEngine
from minidcp.hardware import GPUS
from minidcp.model_config import ModelConfig
from minidcp.models.deepseek import DeepseekForCausalLM
from minidcp.models.weights import RandomSource, Weights
from minidcp.parallel.state import build_thread_states
from minidcp.plan import Deployment, find_gpu
from minidcp.worker.model_runner import CPU_KV_BYTES

V2 = str(Path(__file__).parents[1] / "benchmarks" / "configs" / "deepseek-v2")


@pytest.fixture(params=sorted(STYLES))
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(
        json.dumps(STYLES[request.param] | {"model_type": "deepseek_v2"})
    )
    return str(tmp_path)


@pytest.fixture
def shallow(tmp_path: Path) -> str:
    """V2 with only two of its 60 layers."""
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads(Path(V2, "config.json").read_text()) | {"num_hidden_layers": 2})
    )
    return str(tmp_path)


def run(capsys: pytest.CaptureFixture[str], command: str) -> Any:
    assert main(f"plan {command} --json".split()) == 0
    return json.loads(capsys.readouterr().out)


def count_held(what: object, seen: set[int]) -> int:
    """Count the bytes of memory of all tensors that can be reached from `what`."""
    if isinstance(what, torch.Tensor):
        storage = what.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if isinstance(what, list):
        return sum(count_held(item, seen) for item in what)
    if type(what).__module__.startswith("minidcp.models"):
        return sum(count_held(item, seen) for item in vars(what).values())
    return 0


@pytest.mark.parametrize(
    ("tp", "dcp", "options"),
    [
        (1, 1, {}),
        (4, 1, {}),
        (4, 4, {}),
        (8, 2, {}),
        (8, 8, {"q_proj": "replicated"}),
        (4, 2, {"max_num_seqs": 4}),
    ],
)
def test_weights_are_those_of_the_model_that_is_built(
    tiny: str, tp: int, dcp: int, options: dict[str, Any]
) -> None:
    config = EngineConfig(tiny, tp_size=tp, dcp_size=dcp, dtype="float32", **options)
    model_config = ModelConfig.from_hf(tiny)
    plan = Deployment(config, GPUS["h100"], 100)
    states, _ = build_thread_states(config.tp_size, config.dcp_size)
    attention = ReferenceBackend(1.0)
    weights = Weights(RandomSource(torch.float32, torch.device("cpu")))
    model = DeepseekForCausalLM(model_config, plan.config, states[0], attention, weights)
    assert plan.memory["weight_bytes"] == count_held(model, set())


@pytest.mark.parametrize(("tp", "dcp"), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_capacity_is_that_of_an_engine_with_as_much_memory(tiny: str, tp: int, dcp: int) -> None:
    config = EngineConfig(
        tiny,
        tp_size=tp,
        dcp_size=dcp,
        dtype="float32",
        device="cpu",
        load_format="dummy",
        ranks="threads",
        max_num_seqs=6000,
        max_num_batched_tokens=6000,
        gpu_memory_utilization=1.0,
    )
    engine = LLMEngine(config)
    engine.close()
    some = Deployment(config, GPUS["h100"] | {"memory": 3e9}, 100)
    block = some.memory["kv_bytes"] * config.block_size * dcp // some.memory["capacity"]
    beside = 3e9 - some.memory["kv_bytes"]  # except for less than a block
    plan = Deployment(config, GPUS["h100"] | {"memory": CPU_KV_BYTES // tp + beside}, 100)
    assert abs(plan.memory["kv_bytes"] // block - engine.blocks.num_blocks) <= 1
    held = engine.blocks.num_blocks * engine.blocks.tokens_per_block
    assert plan.memory["capacity"] == pytest.approx(held, rel=1e-3)
    assert held > 1e6  # so large that --max-num-seqs is no limit
    few = replace(config, max_num_seqs=2)
    assert Deployment(few, GPUS["h100"], 100).memory["capacity"] == 2 * 1024


def test_the_plateau_of_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    """8 H100s, prompts of 4,000 and outputs of 1,500 tokens.

    Without DCP, throughput stops rising between 32 and 64 requests. With DCP it rises beyond 128.
    """
    result = run(
        capsys,
        f"{V2} --gpu h100 --tp-size 8 --dcp-size 1,2,4,8 --context 4750 --concurrency 1..512",
    )
    alone, *_, whole = result["memory"]
    assert [m["dcp_size"] for m in result["memory"]] == [1, 2, 4, 8]
    assert 32 < alone["most_requests"] < 64 and 128 < whole["most_requests"] < 512
    assert 5500 * 32 <= alone["capacity"] < 5500 * 64
    assert whole["weight_bytes"] - alone["weight_bytes"] == pytest.approx(1.76e9, rel=0.01)
    by_dcp = {d: [s["tokens_per_s"] for s in result["steps"] if s["dcp_size"] == d] for d in (1, 8)}
    assert [s["concurrency"] for s in result["steps"][:10]] == [1 << i for i in range(10)]
    assert by_dcp[1][6:] == [by_dcp[1][6]] * 4 and by_dcp[1] == sorted(by_dcp[1])
    assert by_dcp[8][-1] > 2 * by_dcp[1][-1] and by_dcp[8][0] < by_dcp[1][0]
    for step in result["steps"]:
        assert step["floor_ms"] < step["step_ms"] == pytest.approx(sum(step["parts_ms"].values()))


def test_costs_give_the_steps_that_they_were_fitted_to() -> None:
    """One of 8 ranks of V2 on an H200. Its collectives were local copies, about 6 % of a step."""
    plan = Deployment(
        EngineConfig(V2, tp_size=8, dcp_size=8, max_num_seqs=512),
        GPUS["h200"] | {"link": 1e15},
        4750,
    )
    measured = {
        1: (5.3, 1.5, 1.6, 0.8),
        32: (17.2, 11.0, 10.5, 1.8),
        128: (23.6, 16.2, 14.9, 3.5),
        512: (44.5, 24.5, 19.2, 14.2),
    }
    for rows, (step, floor, experts, attention) in measured.items():
        result = plan.time_step(rows)
        parts = result["parts_ms"]
        assert parts["experts"] == pytest.approx(experts, rel=0.1)
        assert parts["attention"] == pytest.approx(attention, rel=0.15)
        assert result["floor_ms"] == pytest.approx(floor, rel=0.1)
        assert 0.85 * step < result["step_ms"] - parts["exchange"] < step


@pytest.mark.parametrize(("label", "dcp"), [("TP8", 1), ("TP8 DCP8 p2p", 8)])
def test_steps_and_cache_are_as_measured(label: str, dcp: int) -> None:
    """One of 8 ranks of V2 on an H200 with 79.1 GiB, from `benchmarks/serving_emulated.py`."""
    measured = json.loads((Path(V2).parents[1] / "steps" / "h200.json").read_text())["times"][label]
    gpu = GPUS["h200"] | {"memory": 79.1 * 2**30}
    config = EngineConfig(V2, tp_size=8, dcp_size=dcp, max_num_seqs=512, max_model_len=6602)
    assert Deployment(config, gpu, 4750).memory["kv_bytes"] == pytest.approx(
        measured["kv_bytes"], rel=0.01
    )
    for i, context in enumerate(measured["contexts"]):
        plan = Deployment(config, gpu | {"memory": 1e13}, context)  # so that every batch fits
        for batch, *seconds in measured["decode"]:
            assert plan.time_step(batch)["step_ms"] == pytest.approx(1e3 * seconds[i], rel=0.15), (
                batch,
                context,
            )
    assert {batch for batch, *_ in measured["decode"]} >= {1, 32, *((128, 512) if dcp > 1 else ())}


@pytest.mark.parametrize("exchange", ["a2a", "ag_rs"])
@pytest.mark.parametrize("policy", ["wide", "narrow"])
@pytest.mark.parametrize("q_proj", ["sharded", "replicated"])
def test_bytes_are_those_that_a_layer_receives(
    shallow: str, exchange: str, policy: str, q_proj: str
) -> None:
    options = dict(exchange_policy=policy, q_proj=q_proj, dcp_comm_backend=exchange)
    plan, alone = (
        Deployment(EngineConfig(shallow, tp_size=8, dcp_size=n, **options), GPUS["h200"], 4750)
        for n in (8, 1)
    )
    (received, collectives), (without, fewer) = plan.count_received(2), alone.count_received(2)
    assert (received - without) / 2 / 2 == count_bytes(exchange, policy, q_proj)
    assert without == 2 * 2 * (7 * 2 * 5120 * 2) and fewer == 2 * 2
    assert collectives == 2 * (4 + (exchange == "ag_rs") - (q_proj == "replicated"))


def test_output(
    shallow: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = f"{shallow} --gpu h100,link=200e9 --tp-size 8 --dcp-size 4,8 --concurrency 8,600"
    assert main(["plan", *command.split(), "--plot", str(tmp_path / "plan.png")]) == 0
    output = capsys.readouterr().out
    assert "longest context" in output and "most requests" in output
    assert output.count("\n| 4 | ") == output.count("\n| 8 | ") == 3 and "| 8 | 600 | " in output
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plan", *command.split(), "--plot", "plan.png"]) == 2
    assert "--plot plan.png: needs matplotlib: pip install" in capsys.readouterr().err


def test_a_gpu_in_numbers() -> None:
    assert find_gpu("memory=80e9,bandwidth=3e12,flops=790e12,link=350e9")["memory"] == 80e9
    assert find_gpu("h200,link=1e11") == GPUS["h200"] | {"link": 1e11}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--gpu h300",
            "--gpu 'h300': give h100, h200, a100, b200, or all of memory=80e9,bandwidth=3e12",
        ),
        ("--gpu memory=80e9", "--gpu 'memory=80e9': give h100"),
        ("--gpu h100,link=0", "--gpu 'h100,link=0': give h100"),
        ("--gpu h100,memory=inf", "--gpu 'h100,memory=inf': give h100"),
        (
            "--gpu h100 --tp-size 8 --dcp-size 1,3",
            "--dcp-size 3 must divide --tp-size 8; possible: 1, 2, 4, 8",
        ),
        (
            "--gpu h100 --tp-size 3",
            "--tp-size 3 must divide the model's 128 attention heads; possible: 1, 2, 4",
        ),
        (
            "--gpu h100 --tp-size 4",
            "--tp-size 4: 119.0 GB of weights leave no room for KV; raise it",
        ),
        (
            "--gpu h100 --tp-size 8 --concurrency 8..x",
            "--concurrency '8..x': must be rising integers, such as 1,8,64",
        ),
        (
            "--gpu h100 --tp-size 8 --concurrency 0..8",
            "--concurrency '0..8': must be rising integers",
        ),
        ("--gpu h100 --tp-size 8 --dcp-size 8,1", "--dcp-size '8,1': must be rising integers"),
        ("--gpu h100 --tp-size 8 --context 0", "--context 0: must be in 1..163840"),
        (
            "--gpu h100 --tp-size 8 --max-model-len 4000 --context 4096",
            "--context 4096: must be in 1..4000",
        ),
        (
            "--gpu h100 --tp-size 8 --block-size 5",
            "--block-size 5: must be one of 1, 2, 4, 8, 16, 32",
        ),
        ("--gpu h100 --tp-size 8 --max-num-seqs 0", "--max-num-seqs 0: must be at least 1"),
        ("--gpu h100 --tp-size 8 --num-blocks 99999", "--num-blocks 99999: 11234 fit"),
        (
            "--gpu h100 --tp-size 8 --num-blocks 3",
            "--context 4096: the KV cache holds 48 tokens; raise --dcp-size",
        ),
        ("--gpu h100 --tp-size 8 --plot plan.pdf", "--plot 'plan.pdf': must end in .png or .svg"),
        (
            "--gpu h100 --tp-size 8 --plot /nowhere/plan.png",
            "--plot /nowhere/plan.png: cannot be written",
        ),
    ],
)
def test_wrong_options(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", V2, *flags.split()]) == 2
    assert f"minidcp: error: {message}" in capsys.readouterr().err


def test_no_more_run_than_max_num_seqs(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(
        capsys, f"{V2} --gpu h200 --tp-size 8 --dcp-size 8 --max-num-seqs 64 --concurrency 32,512"
    )
    assert result["memory"][0]["most_requests"] == 64
    assert [step["running"] for step in result["steps"]] == [32, 64]


def test_only_the_config_of_a_hub_model_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        wanted.append(allow_patterns)
        return V2

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    Deployment(EngineConfig("deepseek-ai/DeepSeek-V2", tp_size=8), GPUS["h100"], 4750)
    assert wanted == [["config.json"]]
