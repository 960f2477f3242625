"""Every "auto" is decided on every machine, and impossible requests are refused by name."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, replace

import pytest
from checkpoints import STYLES
from hypothesis import given, settings
from hypothesis import strategies as st

from minidcp import EngineConfig
from minidcp.machine import Machine, find_flashinfer_error
from minidcp.model_config import ModelConfig
from minidcp.resolve import resolve

TINY = ModelConfig.from_dict(STYLES["v2"] | {"model_type": "deepseek_v2"})
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
WIDE = {"hidden_size": 256, "q_lora_rank": 128, "v_head_dim": 128}
TINY_FP8 = ModelConfig.from_dict(
    STYLES["v3"] | WIDE | {"model_type": "deepseek_v3", "quantization_config": FP8}
)
V2 = ModelConfig.from_dict(
    STYLES["v2"]
    | {"model_type": "deepseek_v2", "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    | {"qk_nope_head_dim": 128, "v_head_dim": 128}
)
HOPPER = Machine(num_gpus=8, capability=(9, 0), has_peer_access=True)


def resolve_quietly(config: EngineConfig, machine: Machine, model: ModelConfig = V2):
    heard: list[str] = []
    resolved = resolve(config, model, machine, lambda _, text: heard.append(text))
    return resolved, heard


@settings(deadline=None)
@given(
    machine=st.builds(
        Machine,
        num_gpus=st.integers(0, 8),
        capability=st.sampled_from([(8, 0), (9, 0), (10, 0)]),
        has_peer_access=st.booleans(),
        fa3_error=st.sampled_from(["", "no such file"]),
        flashinfer_error=st.sampled_from(["", "is not installed"]),
    ),
    sizes=st.sampled_from([(1, 1), (2, 1), (2, 2), (8, 4)]),
    policy=st.sampled_from(["auto", "wide", "narrow"]),
    max_num_seqs=st.sampled_from([1, 15, 16, 256]),
)
def test_nothing_stays_open(
    machine: Machine, sizes: tuple[int, int], policy: str, max_num_seqs: int
) -> None:
    tp, dcp = sizes
    config = EngineConfig(
        "model", tp_size=tp, dcp_size=dcp, exchange_policy=policy, max_num_seqs=max_num_seqs
    )
    try:
        resolved, _ = resolve_quietly(config, machine)
    except ValueError as error:
        # The only problem that "auto" cannot solve: NCCL ranks cannot share a GPU.
        assert "needs a GPU per rank" in str(error)
        assert 0 < machine.num_gpus < tp and not machine.has_peer_access
        return
    values = asdict(resolved)
    assert None not in values.values() and "auto" not in values.values()
    assert (resolved.dcp_comm_backend == "none") == (dcp == 1)
    assert resolved.dcp_comm_backend != "p2p" or resolved.comm == "symmetric"
    assert (resolved.device == "cpu") == (machine.num_gpus == 0)
    if resolved.exchanges_narrow(max_num_seqs):
        assert resolved.needs_group_heads


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, 16),
        ({"narrow_threshold": 300}, None),  # there are never more than 256 rows
        ({"narrow_threshold": 300, "q_proj": "replicated"}, 300),
        ({"exchange_policy": "narrow"}, 1),
        ({"exchange_policy": "wide"}, None),
        ({"dcp_size": 1}, None),
    ],
)
def test_the_smallest_narrow_batch(options: dict[str, object], least: int | None) -> None:
    config = EngineConfig("model", **({"tp_size": 8, "dcp_size": 8} | options))
    resolved, _ = resolve_quietly(config, HOPPER)
    sizes = range(1, 1000)
    assert next((size for size in sizes if resolved.exchanges_narrow(size)), None) == least
    assert resolved.needs_group_heads == (least is not None)


def test_what_is_chosen_on_hopper() -> None:
    resolved, heard = resolve_quietly(EngineConfig("model", tp_size=8, dcp_size=8), HOPPER)
    chosen = (resolved.attention_backend, resolved.comm, resolved.dcp_comm_backend, resolved.ranks)
    assert chosen == ("fa3", "symmetric", "p2p", "processes")
    assert heard == ["collectives: symmetric (one node, and every GPU can read its peers' memory)"]


NO_FA3 = "is not installed (no such file; get it with: minidcp fetch-fa3)"
NO_HOPPER = "needs a Hopper GPU (sm_90), this is sm_80"
NO_FLASHINFER = "is not installed; get it with: pip install 'minidcp[flashinfer]'"


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (Machine(1, (8, 0)), NO_HOPPER),
        (Machine(1, (9, 0), fa3_error="no such file"), NO_FA3),
    ],
)
def test_no_fallback_is_silent(machine: Machine, reason: str) -> None:
    resolved, heard = resolve_quietly(EngineConfig("model"), machine)
    assert resolved.attention_backend == "flashinfer"
    assert heard == [f"attention: flashinfer, because FlashAttention-3 {reason}"]
    with pytest.raises(ValueError, match="use triton or auto"):
        resolve_quietly(EngineConfig("model", attention_backend="fa3"), machine)

    machine = replace(machine, flashinfer_error=NO_FLASHINFER)
    resolved, heard = resolve_quietly(EngineConfig("model"), machine)
    assert resolved.attention_backend == "triton"
    assert heard == [
        f"attention: triton, because FlashAttention-3 {reason}, and FlashInfer {NO_FLASHINFER}"
    ]


@pytest.mark.parametrize(
    ("machine", "model", "reason"),
    [
        (replace(HOPPER, flashinfer_error=NO_FLASHINFER), V2, re.escape(NO_FLASHINFER)),
        (Machine(1, (7, 5)), V2, "needs a GPU from sm_80 on, this is sm_75"),
        (Machine(1, (8, 0)), TINY, r"rope dims .* to be multiples of 128 and 64"),
        (HOPPER, replace(V2, kv_lora_rank=384), "on Hopper, the model has 384"),
        (HOPPER, replace(V2, v_head_dim=320), "FlashAttention-2, which needs .* at most 256"),
    ],
)
def test_where_flashinfer_is_refused(machine: Machine, model: ModelConfig, reason: str) -> None:
    config = EngineConfig("model", attention_backend="flashinfer")
    with pytest.raises(ValueError, match=f"--attention-backend flashinfer: .*{reason}"):
        resolve_quietly(config, machine, model)


def test_flashinfer_can_be_asked_for_where_fa3_runs() -> None:
    config = EngineConfig("model", attention_backend="flashinfer")
    resolved, heard = resolve_quietly(config, HOPPER)
    assert resolved.attention_backend == "flashinfer" and heard == []


def test_the_machine_says_that_flashinfer_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    config = EngineConfig("model", attention_backend="flashinfer")
    assert find_flashinfer_error(config, V2, (9, 0), fa3_error="") == NO_FLASHINFER
    auto = EngineConfig("model")
    assert find_flashinfer_error(auto, V2, (9, 0), fa3_error="") == ""  # FA3 runs
    assert find_flashinfer_error(auto, V2, (9, 0), fa3_error="no") == NO_FLASHINFER
    # Nothing is compiled for drafts of mtp, with which FlashInfer is refused.
    mtp = EngineConfig("model", speculative_method="mtp")
    assert find_flashinfer_error(mtp, V2, (9, 0), fa3_error="no") == ""


def test_dims_that_only_the_reference_takes() -> None:
    with pytest.raises(ValueError, match=r"rope dims .* must be powers of two .*; use reference"):
        resolve_quietly(EngineConfig("model"), HOPPER, TINY)
    config = EngineConfig("model", attention_backend="reference")
    resolved, _ = resolve_quietly(config, HOPPER, TINY)
    assert resolved.prefill_strategy == "gather_kv"


@pytest.mark.parametrize(
    ("asked", "model", "capability", "expected"),
    [
        ("auto", V2, (9, 0), "none"),
        ("auto", TINY_FP8, (9, 0), "fp8"),
        ("auto", TINY_FP8, (8, 0), "none"),  # no tensor cores for FP8
        ("none", TINY_FP8, (9, 0), "none"),
        ("fp8", TINY_FP8, (8, 9), "fp8"),
    ],
)
def test_quantization(
    asked: str, model: ModelConfig, capability: tuple[int, int], expected: str
) -> None:
    machine = Machine(num_gpus=1, capability=capability)
    config = EngineConfig("model", quantization=asked, attention_backend="reference")
    resolved, heard = resolve_quietly(config, machine, model)
    assert resolved.quantization == expected
    is_surprising = asked == "auto" and model is TINY_FP8 and expected == "none"
    assert any("FP8 weights are dequantised" in text for text in heard) == is_surprising


def test_fp8_is_slower_than_float32_on_a_cpu() -> None:
    resolved, heard = resolve_quietly(EngineConfig("model"), Machine(), TINY_FP8)
    assert resolved.quantization == "none"
    assert "quantization: none, because CPUs are faster without" in heard[-1]
    explicit = EngineConfig("model", quantization="fp8")
    resolved, heard = resolve_quietly(explicit, Machine(), TINY)
    assert resolved.quantization == "fp8"
    assert any("slower than none on CPUs" in text for text in heard)


def test_blocks_must_fill_a_tensor_core() -> None:
    """q_lora_rank is 48 here, which blocks of 16 divide."""
    machine = Machine(num_gpus=1, capability=(9, 0))
    asked = EngineConfig("model", quantization="fp8", attention_backend="reference")
    with pytest.raises(ValueError, match="--quantization fp8: q_lora_rank 48 is in blocks of 16"):
        resolve_quietly(asked, machine, TINY)
    narrow = replace(TINY_FP8, fp8_block=(16, 24))
    config = EngineConfig("model", attention_backend="reference")
    resolved, heard = resolve_quietly(config, machine, narrow)
    assert resolved.quantization == "none"
    assert any("hidden_size 256 is in blocks of 8" in text for text in heard)


def test_fp8_needs_a_gpu_that_multiplies_it() -> None:
    config = EngineConfig("model", quantization="fp8")
    with pytest.raises(ValueError, match=r"--quantization fp8: this GPU \(sm_80\) .*; use none"):
        resolve_quietly(config, Machine(num_gpus=1, capability=(8, 0)))
