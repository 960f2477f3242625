"""DeepSeek-V3's router, its relatives' config.json, and what is left out of their checkpoints. That
whole models equal transformers' is in `test_oracle.py`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import STYLES, make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from minidcp import LLM, SamplingParams
from minidcp.kernels.route import route
from minidcp.model_config import ModelConfig
from minidcp.models.checkpoint import CheckpointSource
from minidcp.models.layers import MoE
from minidcp.models.weights import Weights
from minidcp.parallel.state import build_thread_states

V3 = STYLES["v3"] | dict(model_type="deepseek_v3")


@settings(deadline=None, max_examples=50)
@given(
    num_groups=st.sampled_from([1, 2, 4]),
    group_size=st.integers(2, 8),
    normalise=st.booleans(),
    num_shared=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_the_router_is_transformers_own(
    num_groups: int, group_size: int, normalise: bool, num_shared: int, seed: int
) -> None:
    torch.manual_seed(seed)
    num_experts = num_groups * group_size
    sizes = dict(
        n_routed_experts=num_experts,
        n_group=num_groups,
        topk_group=(num_groups + 1) // 2,
        num_experts_per_tok=2,
        norm_topk_prob=normalise,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3TopkRouter(
        SimpleNamespace(
            **sizes, hidden_size=16, num_local_experts=num_experts, topk_method="noaux_tc"
        )
    )
    theirs.weight.data.normal_()
    theirs.e_score_correction_bias.uniform_(7.0, 7.5)
    x = torch.randn(20, 16)
    logits, their_weights, their_ids = theirs(x)

    config = ModelConfig.from_dict(V3 | sizes)
    weights, ids = route(logits.detach(), config, num_shared, theirs.e_score_correction_bias)
    assert torch.equal(ids[:, :num_shared], torch.arange(num_shared).expand(20, -1).int())
    assert (weights[:, :num_shared] == 1).all()

    def spread(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(20, num_experts).scatter(1, ids.long(), weights.detach())

    ours = spread(weights[:, num_shared:], ids[:, num_shared:] - num_shared)
    torch.testing.assert_close(ours, spread(their_weights, their_ids))


def test_the_bias_is_not_rounded(tmp_path: Path) -> None:
    """In bf16, 7.01 and 7.02 are both 7.0."""
    bias = make_checkpoint(tmp_path, "v3", seed=1).model.layers[1].mlp.gate.e_score_correction_bias
    assert not torch.equal(bias, bias.bfloat16().float())
    source = CheckpointSource(tmp_path, torch.bfloat16, torch.device("cpu"))
    states, _ = build_thread_states(1, 1)
    scope = Weights(source).scope("model.layers.1.mlp")
    moe = MoE(ModelConfig.from_hf(tmp_path), states[0].tp, scope)
    source.close()
    assert moe.gate_bias is not None
    assert torch.equal(moe.gate_bias, bias)


def test_layers_that_predict_a_second_token_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpoint(tmp_path, "v3", seed=1, max_position_embeddings=64)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    options = dict(ranks="threads", device="cpu", tp_size=2)
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    with LLM(str(tmp_path), **options) as llm:
        expected = llm.generate([[3, 4, 5]], params)[0].outputs[0].token_ids

    extra = {
        "model.layers.3.eh_proj.weight": torch.zeros(64, 128),
        "model.layers.3.enorm.weight": torch.zeros(64),
        "model.layers.3.self_attn.o_proj.weight": torch.zeros(64, 128),
    }
    save_file(tensors | extra, file, {"format": "pt"})
    config_file = tmp_path / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | dict(num_nextn_predict_layers=1)))
    caplog.set_level(logging.INFO, "minidcp")
    with LLM(str(tmp_path), **options) as llm:
        assert llm.generate([[3, 4, 5]], params)[0].outputs[0].token_ids == expected
    assert "left out 3 tensors from model.layers.3 on" in caplog.text

    config_file.write_text(json.dumps(config | dict(num_nextn_predict_layers=0)))
    with pytest.raises(ValueError, match=r"3 not part of this model: model\.layers\.3\.eh_proj"):
        LLM(str(tmp_path), **options)


def test_kimi_k2_is_read_as_deepseek_v3() -> None:
    assert ModelConfig.from_dict(V3 | dict(model_type="kimi_k2")) == ModelConfig.from_dict(V3)


def test_options_as_the_hub_has_them() -> None:
    hub = dict(scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, ep_size=1)
    assert ModelConfig.from_dict(V3 | hub) == ModelConfig.from_dict(V3)


def test_dense_layers_in_both_spellings() -> None:
    glm = STYLES["glm"] | dict(model_type="glm4_moe_lite", first_k_dense_replace=None)
    listed = ModelConfig.from_dict(glm)
    counted = ModelConfig.from_dict(glm | dict(mlp_layer_types=None, first_k_dense_replace=1))
    assert listed == counted
    assert [listed.is_moe_layer(layer) for layer in range(3)] == [False, True, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model_type="deepseek_v32"), "'deepseek_v32' is not supported: its attention is"),
        (dict(model_type="kimi_k25"), "'kimi_k25' is not supported: it takes images"),
        (dict(model_type=["deepseek_v3"]), "supported: 'deepseek_v2', 'deepseek_v3'"),
        (dict(index_topk=2048), "index_topk 2048 is not supported"),
        (dict(scoring_func="softmax"), "scoring_func 'softmax' is not supported"),
        (dict(topk_method="greedy"), "topk_method 'greedy' is not supported; supported: 'noaux"),
        (dict(rope_interleave=False), "rope_interleave False is not supported"),
        (dict(n_group=16), "n_group 16 leaves fewer than 2 of 16 experts"),
        (dict(mlp_layer_types=["sparse", "dense"]), "mlp_layer_types"),
        (dict(mlp_layer_types="dense"), "mlp_layer_types 'dense' is not supported"),
    ],
)
def test_what_cannot_run_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json: ") as refused:
        ModelConfig.from_dict(V3 | changes)
    assert words in str(refused.value)
