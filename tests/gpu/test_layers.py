"""One rank: layers compared with fp32 on the CPU, and steps that never wait for the device."""

from __future__ import annotations

import pytest
import torch
from backends import NEEDS_FLASHINFER
from checkpoints import Oracle

from minidcp.batch import Admission, CacheQueries, StepPlan
from minidcp.config import EngineConfig
from minidcp.kernels.experts import ExpertOutputs
from minidcp.machine import detect_machine
from minidcp.model_config import ModelConfig
from minidcp.parallel.exchange import make_exchange
from minidcp.parallel.group import Group
from minidcp.parallel.state import ParallelState
from minidcp.request import SamplingParams
from minidcp.resolve import resolve
from minidcp.worker.model_runner import ModelRunner

pytestmark = pytest.mark.gpu


def make_runner(oracle: Oracle, device: str, dtype: str, **options: object) -> ModelRunner:
    config = EngineConfig(
        str(oracle.path),
        dcp_comm_backend="a2a",
        device=device,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        **({"cuda_graph": False} | options),
    )
    model_config = ModelConfig.from_hf(oracle.path)
    resolved = resolve(config, model_config, detect_machine(config, model_config))
    group = Group()
    state = ParallelState(group, group, make_exchange(resolved.dcp_comm_backend, group))
    runner = ModelRunner(resolved, model_config, state, torch.device(device))
    if resolved.cuda_graph and device == "cuda":
        runner.make_prompt_graphs()
    runner.allocate_cache(64)
    return runner


def make_plans() -> list[StepPlan]:
    """A prompt in two chunks, then a decode row beside a chunk of another prompt."""
    first = StepPlan(0, [0], [0], [200], [0] * 200, [(0, i, i) for i in range(20)])
    second = StepPlan(0, [0], [200], [99], [0] * 99)
    mixed = StepPlan(1, [0, 1], [299, 0], [1, 17], [0] * 17, [(1, i, 30 + i) for i in range(2)])
    return [first, second, mixed]


@torch.inference_mode()
def test_layers(checkpoint: Oracle) -> None:
    cpu = make_runner(checkpoint, "cpu", "float32")
    gpu = make_runner(checkpoint, "cuda", "bfloat16")
    torch.manual_seed(0)
    for plan in make_plans():
        batches = []
        for runner in (cpu, gpu):
            runner.tables.update(plan)
            batches.append(runner.build_batch(plan))
            for rows in (batches[-1].decode, *batches[-1].context):
                if isinstance(rows, CacheQueries):
                    runner.attention.prepare(rows)
        for i, (ours, theirs) in enumerate(zip(gpu.model.layers, cpu.model.layers, strict=True)):
            x = torch.randn(sum(plan.lengths), 256).bfloat16()
            outputs = []
            for runner, layer, batch in ((cpu, theirs, batches[0]), (gpu, ours, batches[1])):
                own = x.to(runner.device, runner.dtype)
                cos_sin = runner.model.cos_sin[batch.positions]
                attended = layer.self_attn(own, cos_sin, runner.cache[i], batch)
                mlp = layer.mlp(own)
                mlp = mlp.sum() if isinstance(mlp, ExpertOutputs) else mlp
                outputs.append((attended.float().cpu(), mlp.float().cpu()))
            for name, expected, actual in zip(("attention", "mlp"), *outputs, strict=True):
                error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
                # In bf16 a token may choose another expert, if two are nearly equally good.
                assert error.median() < 1.5e-2, f"layer {i}, {name}: {error.median():.3e}"
                assert (error > 4e-2).float().mean() < 0.05, f"layer {i}, {name}: {error.max():.3e}"


@pytest.mark.parametrize(
    ("attention", "strategy"),
    [
        ("fa3", "gather_kv"),
        pytest.param("flashinfer", "gather_q", marks=NEEDS_FLASHINFER),
        ("triton", "gather_q"),
    ],
)
def test_steps_never_wait_for_the_device(checkpoint: Oracle, attention: str, strategy: str) -> None:
    """Prefill, a chunk on context, a mixed step, and decode steps in graphs."""
    runner = make_runner(
        checkpoint,
        "cuda",
        "bfloat16",
        cuda_graph=True,
        attention_backend=attention,
        prefill_strategy=strategy,
    )
    plans = make_plans()
    plans += [StepPlan(2, [0, 1], [300 + i, 17 + i], [1, 1]) for i in range(2)]
    for temperature, plan in zip([0.0, 0.0, 0.7, 0.7, 0.0], plans, strict=True):
        plan.sampling = list(range(len(plan.slots)))
        for slot in plan.slots:
            params = SamplingParams(
                temperature=temperature,
                top_k=5,
                top_p=0.9,
                logprobs=2,
                presence_penalty=0.5 * slot,
                repetition_penalty=1.2,
                logit_bias={3: 1.0},
                min_tokens=9,
            )
            plan.admitted.append(Admission(slot, params, 1, 2, (4,), history=(5, 6, 6)))
    for plan in plans:  # compile kernels and initialise libraries
        runner.execute(plan).wait()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = [runner.execute(plan) for plan in plans]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(p.wait().tokens) for p in pending] == [1, 1, 2, 2, 2]
