"""`minidcp plan` compared with real models, engines and exchanges."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CLASSES, STYLES
from exchange import count_bytes

from minidcp.attention.reference import ReferenceBackend
from minidcp.cli import main
from minidcp.config import EngineConfig
from minidcp.engine.engine import LLMEngine
from minidcp.hardware import GPUS
from minidcp.model_config import ModelConfig
from minidcp.models.deepseek import DeepseekForCausalLM
from minidcp.models.mtp import build_prediction_layer
from minidcp.models.weights import RandomSource, Weights
from minidcp.parallel.state import build_thread_states
from minidcp.plan import Deployment, find_gpu
from minidcp.plan_drafts import Pass, list_passes
from minidcp.plan_memory import count_bytes_beside_cache
from minidcp.worker.model_runner import CPU_KV_BYTES

CONFIGS = Path(__file__).parents[1] / "benchmarks" / "configs"
V2 = str(CONFIGS / "deepseek-v2")
TWO_RANKS = {"tp_size": 2, "dcp_size": 2}
R1 = str(CONFIGS / "deepseek-r1")


@pytest.fixture(params=sorted(STYLES))
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    make_config, _ = CLASSES[request.param]
    (tmp_path / "config.json").write_text(
        json.dumps(STYLES[request.param] | {"model_type": make_config.model_type})
    )
    return str(tmp_path)


@pytest.fixture
def shallow(tmp_path: Path) -> str:
    """V2 with only two of its 60 layers."""
    return make_shallow(V2, tmp_path)


def make_shallow(model: str, directory: Path) -> str:
    config = json.loads(Path(model, "config.json").read_text()) | {"num_hidden_layers": 2}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def model_pass(plan: Deployment, rows: int) -> Pass:
    """What the model computes for so many rows."""
    weights = (plan.weights, plan.prediction_weights)
    return list_passes(*weights, plan.config, plan.model_config, rows, 0)[0]


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
    if type(what).__module__.startswith(("minidcp.models", "minidcp.kernels.fp8")):
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
        (4, 1, {"dtype": "bfloat16"}),
        (1, 1, {"quantization": "fp8"}),
        (2, 1, {"quantization": "fp8"}),
        (2, 2, {"quantization": "fp8", "dtype": "bfloat16"}),
        (8, 8, {"quantization": "fp8"}),
    ],
)
def test_weights_are_those_of_the_model_that_is_built(
    tiny: str, tp: int, dcp: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny models have narrower blocks than tensor cores can multiply.
    monkeypatch.setattr("minidcp.resolve.MIN_BLOCK", 1)
    options = {"dtype": "float32", "attention_backend": "reference"} | options
    config = EngineConfig(tiny, tp_size=tp, dcp_size=dcp, **options)
    model_config = ModelConfig.from_hf(tiny)
    plan = Deployment(config, GPUS["h100"], 100)
    states, _ = build_thread_states(config.tp_size, config.dcp_size)
    attention = ReferenceBackend(1.0)
    fp8 = plan.config.quantization == "fp8"
    source = RandomSource(getattr(torch, config.dtype), torch.device("cpu"), fp8)
    weights = Weights(source)
    model = DeepseekForCausalLM(model_config, plan.config, states[0], attention, weights)
    assert plan.memory["weight_bytes"] == count_held(model, set())


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_the_layer_that_makes_drafts_is_counted(
    tmp_path: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minidcp.resolve.MIN_BLOCK", 1)
    config_file = tmp_path / "config.json"
    own = {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}
    config_file.write_text(json.dumps(STYLES["v3"] | own))
    config = EngineConfig(
        str(tmp_path),
        tp_size=2,
        attention_backend="reference",
        speculative_method="mtp",
        quantization=quantization,
    )
    plan = Deployment(config, GPUS["h100"], 100)
    states, _ = build_thread_states(config.tp_size, config.dcp_size)
    fp8 = plan.config.quantization == "fp8"
    source = RandomSource(torch.bfloat16, torch.device("cpu"), fp8)
    parts = (plan.model_config, plan.config, states[0], ReferenceBackend(1.0), Weights(source))
    model = DeepseekForCausalLM(*parts)
    layer = build_prediction_layer(*parts, model)
    assert plan.memory["weight_bytes"] == count_held([model, layer], set())
    without = Deployment(replace(config, speculative_method="none"), GPUS["h100"], 100)
    assert plan.block_bytes * 3 == without.block_bytes * 4


def test_r1_has_as_many_parameters_as_its_report_says() -> None:
    """671 billion, of which a token uses 37 (arXiv:2412.19437, §1)."""
    config = EngineConfig(R1, quantization="none")
    held = Deployment(config, GPUS["h200"] | {"memory": 2e12}, 4750).weights
    used = held.others.products + held.kv_b_proj.products + held.router.products
    used += held.shared_experts.products + held.routed_experts.products * 8 / 256
    assert held.num_bytes / 2 == pytest.approx(671e9, rel=1e-3)
    assert used == pytest.approx(37e9, rel=0.02)


@pytest.mark.parametrize(("gpu", "quantization"), [("h200", "fp8"), ("a100", "none")])
def test_a_checkpoint_in_fp8_stays_so_where_the_gpu_can_multiply_it(
    gpu: str, quantization: str, tmp_path: Path
) -> None:
    config = EngineConfig(make_shallow(R1, tmp_path), tp_size=8)
    assert Deployment(config, GPUS[gpu], 4750).config.quantization == quantization


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
    some = Deployment(config, GPUS["h100"] | {"memory": 2.5e9}, 100)
    block = some.memory["kv_bytes"] * config.block_size * dcp // some.memory["capacity"]
    beside = 2.5e9 - some.memory["kv_bytes"]  # except for less than a block
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
    assert alone["capacity"] == pytest.approx(173_056, rel=0.01)  # of the emulated rank
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


@pytest.mark.parametrize(
    ("model", "layers", "parallel", "tokens_per_rank"),
    [("deepseek-v2-lite", 27, {}, 2_728_032), ("deepseek-v2", 15, TWO_RANKS, 3_305_424)],
)
def test_caches_are_as_large_as_on_h200s(
    tmp_path: Path, model: str, layers: int, parallel: dict[str, int], tokens_per_rank: int
) -> None:
    """What engines on one and two H200s had room for (`c7f9b1a`, 2026-11-28)."""
    config = json.loads((Path(V2).parent / model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    options = EngineConfig(
        str(tmp_path),
        max_num_seqs=512,
        max_model_len=16384,
        gpu_memory_utilization=0.8,
        **parallel,
    )
    capacity = Deployment(options, GPUS["h200"], 4000).memory["capacity"]
    dcp_size = parallel.get("dcp_size", 1)
    assert capacity / dcp_size == pytest.approx(tokens_per_rank, rel=0.01)


def test_the_mtp_layer_has_no_graphs_for_prompts() -> None:
    """What it holds of 8,192 tokens comes on top of what the other layers' graphs keep."""

    def count_held(**options: Any) -> int:
        plan = Deployment(EngineConfig(R1, tp_size=8, **options), GPUS["h200"], 4000)
        return count_bytes_beside_cache(plan.config, plan.model_config)

    mtp = dict(speculative_method="mtp", num_speculative_tokens=1)
    outputs_of_experts = 8192 * 9 * 7168 * 2
    assert count_held(**mtp) > count_held() + outputs_of_experts
    assert count_held(**mtp, cuda_graph=False) == count_held(cuda_graph=False)


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


def plan_in_fp8(model: str, **rates: float) -> Deployment:
    config = EngineConfig(model, tp_size=8, quantization="fp8")
    return Deployment(config, GPUS["h200"] | rates, 4750)


def test_a_step_reads_the_bytes_of_experts_in_fp8(shallow: str) -> None:
    """One token takes 6 experts and 2 shared ones. A rank has 192 columns of their down_proj."""
    plan = plan_in_fp8(shallow, bandwidth=1e9, flops=1e30)
    gate_and_up = 2 * 192 * 5120 * (1 + 4 / 128)
    down = 5120 * 192 * (1 + 4 / 64)
    router = 160 * 5120 * 2  # in bf16
    expected = 8 * (gate_and_up + down) + router
    assert 1e9 * plan.bound_experts(model_pass(plan, 1)).seconds == pytest.approx(expected)


def test_products_of_experts_in_fp8_take_half_the_time(shallow: str) -> None:
    plan = plan_in_fp8(shallow, bandwidth=1e30, flops=1e15)
    experts = 8 * 3 * 192 * 5120
    router = 160 * 5120
    assert 1e15 * plan.bound_experts(model_pass(plan, 1)).seconds == pytest.approx(
        2 * (experts / 2 + router)
    )


def test_projections_in_fp8_are_read_in_half_the_time(shallow: str) -> None:
    """But the head and W_UK and W_UV stay in bf16."""
    plan = plan_in_fp8(shallow, bandwidth=1e9, flops=1e30)
    projections = 5120 * (1536 + 576) + 1536 * 16 * 192 + 5120 * 16 * 128  # q_a, kv_a, q_b, o
    dense = 3 * 1536 * 5120  # the first layer's MLP
    scales = (2 * projections + dense) * 4 / 128
    in_bf16 = 2 * 16 * 256 * 512 + 102400 // 8 * 5120
    expected = 2 * projections + dense + scales + 2 * in_bf16
    assert 1e9 * plan.bound_projections(model_pass(plan, 1)).seconds == pytest.approx(
        expected, rel=1e-3
    )


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
    (received, collectives), (without, fewer) = (
        plan.count_received(model_pass(plan, 2)),
        alone.count_received(model_pass(alone, 2)),
    )
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
    assert f"{shallow} in bfloat16, tp 8, " in output
    assert "longest context" in output and "most requests" in output
    assert output.count("\n| 4 | ") == output.count("\n| 8 | ") == 3 and "| 8 | 600 | " in output
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plan", *command.split(), "--plot", "plan.png"]) == 2
    assert "--plot plan.png: needs matplotlib: pip install" in capsys.readouterr().err


def test_a_gpu_in_numbers() -> None:
    assert find_gpu("memory=80e9,bandwidth=3e12,flops=790e12,link=350e9")["memory"] == 80e9
    assert find_gpu("h200,link=1e11") == GPUS["h200"] | {"link": 1e11}
    assert find_gpu("h200,capability=8.0") == GPUS["h200"] | {"capability": 8.0}


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
            "--tp-size 4: 119.0 GB of weights leave no room for KV; raise it, "
            "or --gpu-memory-utilization, or use --quantization fp8",
        ),
        (
            "--gpu a100 --tp-size 8 --quantization fp8",
            "--quantization fp8: this GPU (sm_80) cannot multiply FP8; use none",
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
        ("--gpu h100 --tp-size 8 --num-blocks 99999", "--num-blocks 99999: 10897 fit"),
        (
            "--gpu h100 --tp-size 8 --num-blocks 3",
            "--context 4096: the KV cache holds 48 tokens; raise --dcp-size",
        ),
        (
            "--gpu h100 --tp-size 8 --acceptance 0.6",
            "--acceptance 0.6: there are no drafts to accept; add --speculative-method, such as",
        ),
        (
            "--gpu h100 --tp-size 8 --speculative-method ngram --acceptance 60",
            "--acceptance 60.0: must be a probability, from 0 to 1",
        ),
        (
            "--gpu h100 --tp-size 8 --speculative-method ngram --acceptance nan",
            "--acceptance nan: must be a probability, from 0 to 1",
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


SPECULATIVE = "--speculative-method ngram --num-speculative-tokens"


@pytest.mark.parametrize("most", [1, 3, 7])
def test_tokens_of_a_step_with_drafts(
    shallow: str, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equation 1 of arXiv:2211.17192."""
    flags = f"{SPECULATIVE} {most} --acceptance 0.6 --concurrency 1,8"
    result = run(capsys, f"{shallow} --gpu h200 {flags}")
    expected = (1 - 0.6 ** (most + 1)) / (1 - 0.6)
    for step, requests in zip(result["steps"], [1, 8], strict=True):
        assert step["running"] == requests
        assert step["tokens_per_step"] == pytest.approx(requests * expected)
        rate = 1e3 * step["tokens_per_step"] / step["step_ms"]
        assert step["tokens_per_s"] == pytest.approx(rate)


def test_a_draft_costs_as_much_as_a_request(
    shallow: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"{shallow} --gpu h200 --tp-size 8 --dcp-size 8 --concurrency"
    (with_drafts,) = run(capsys, f"{flags} 2 {SPECULATIVE} 3 --acceptance 0.5")["steps"]
    (without,) = run(capsys, f"{flags} 8")["steps"]
    for name in ("parts_ms", "floor_ms", "received_bytes"):
        assert with_drafts[name] == without[name]


def test_a_full_step_has_room_for_few_drafts(
    shallow: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the engine, where --max-num-seqs requests still decode together."""
    flags = f"{SPECULATIVE} 3 --acceptance 0.5 --max-num-seqs 256 --concurrency 64,96,256"
    steps = run(capsys, f"{shallow} --gpu h200 {flags}")["steps"]
    assert [step["drafts"] for step in steps] == [192, 160, 0]
    # 96 first drafts and 64 second ones.
    assert steps[1]["tokens_per_step"] == 96 + 96 * 0.5 + 64 * 0.25


def test_what_making_drafts_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The layer of R1 is like the 58 others with experts, and reads the head once more."""
    layers = {}
    for num_layers in (10, 11):
        folder = tmp_path / str(num_layers)
        folder.mkdir()
        config = json.loads(Path(R1, "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
        layers[num_layers] = f"{folder} --gpu h200 --tp-size 8 --concurrency 8 --acceptance 0.8"
    times = {}
    for method in ("ngram", "mtp"):
        for count in (1, 2):
            flags = f"--speculative-method {method} --num-speculative-tokens {count}"
            (step,) = run(capsys, f"{layers[10]} {flags}")["steps"]
            times[method, count] = step["step_ms"]
    (deeper,) = run(capsys, f"{layers[11]} --speculative-method ngram --num-speculative-tokens 1")[
        "steps"
    ]
    one_layer = deeper["step_ms"] - times["ngram", 1]
    head_ms = 1.3e3 * 129280 * 7168 * 2 / 8 / GPUS["h200"]["bandwidth"]
    cost = times["mtp", 1] - times["ngram", 1]
    assert cost == pytest.approx(one_layer + head_ms, rel=0.05)
    second = times["mtp", 2] - times["ngram", 2] - cost
    assert 0.5 * cost < second < 1.1 * cost  # over fewer rows, which go to fewer experts


def test_without_an_acceptance_no_drafts_are_counted(
    shallow: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = f"{shallow} --gpu h200 --concurrency 8"
    assert run(capsys, f"{flags} {SPECULATIVE} 3")["steps"] == run(capsys, flags)["steps"]
    (record,) = caplog.records
    assert record.getMessage().startswith("--speculative-method ngram: estimated without drafts")
    assert "--acceptance 0.6" in record.getMessage()


def test_only_the_config_of_a_hub_model_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        wanted.append(allow_patterns)
        return V2

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    Deployment(EngineConfig("deepseek-ai/DeepSeek-V2", tp_size=8), GPUS["h100"], 4750)
    assert wanted == [["config.json"]]
