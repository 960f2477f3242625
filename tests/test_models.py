"""Loading slices of weights, the router's two normalisations, and RoPE's constants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import STYLES, Oracle, make_checkpoint
from safetensors import safe_open
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minidcp import LLM
from minidcp.kernels.route import route
from minidcp.model_config import ModelConfig
from minidcp.models.rope import inverse_frequencies
from minidcp.models.weights import WHOLE, RandomSource, Shard
from minidcp.rope_config import RopeConfig


@pytest.mark.parametrize(
    ("policy", "q_proj", "dcp"),
    [
        ("wide", "sharded", 8),
        ("narrow", "sharded", 8),
        ("narrow", "sharded", 4),
        ("narrow", "replicated", 1),
        ("wide", "replicated", 4),
        ("narrow", "replicated", 8),
    ],
)
def test_a_rank_reads_its_share_only(tmp_path: Path, policy: str, q_proj: str, dcp: int) -> None:
    """At tp=8 a rank reads an eighth of the sharded weights and all of the replicated ones.

    For narrow exchanges it reads kv_b_proj for all heads of its DCP group. If the q projection is
    replicated, it reads kv_b_proj and the q projection for all of them.
    """
    make_checkpoint(tmp_path, "v2", moe_intermediate_size=64, intermediate_size=128)
    sharded = ("o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
    share = 0.0
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                size = tensors.get_tensor(name).nbytes
                replicated = q_proj == "replicated"
                if "kv_b_proj" in name:
                    share += size * (dcp if policy == "narrow" or replicated else 1) / 8
                elif "q_b_proj" in name:
                    share += size * (dcp if replicated else 1) / 8
                else:
                    share += size / 8 if any(part in name for part in sharded) else size
    options = dict(exchange_policy=policy, q_proj=q_proj, ranks="threads", device="cpu")
    with LLM(str(tmp_path), tp_size=8, dcp_size=dcp, **options) as llm:
        assert llm.engine.weight_bytes == share


class FixedSource:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.bytes_read = tensors, 0

    def read(self, name: str, shape: tuple[int, ...], shard: object = None) -> torch.Tensor:
        return self.tensors[name]


@pytest.mark.parametrize("normalise", [False, True])
def test_router_normalises_or_scales(normalise: bool) -> None:
    """Like the original code, unlike transformers, which always scales. Computed token by token."""
    torch.manual_seed(0)
    config = ModelConfig.from_dict(
        STYLES["v2"]
        | {"model_type": "deepseek_v2", "norm_topk_prob": normalise, "routed_scaling_factor": 16.0}
    )
    logits = torch.randn(20, 8) * 8
    all_weights, all_ids = route(logits, config, num_shared=2)
    assert (all_weights[:, :2] == 1).all() and (all_ids[:, :2] == torch.tensor([0, 1])).all()
    weights, ids = all_weights[:, 2:], all_ids[:, 2:] - 2
    for token in range(20):
        scores = logits[token].softmax(-1)
        groups = scores.view(4, 2).amax(-1).argsort(descending=True)[:2].tolist()
        allowed = sorted((i for i in range(8) if i // 2 in groups), key=lambda i: -scores[i])[:3]
        assert sorted(ids[token].tolist()) == sorted(allowed)
        picked = scores[ids[token].long()]
        expected = picked / picked.sum() if normalise else picked * 16
        torch.testing.assert_close(weights[token], expected)


def test_yarn_constants_of_deepseek_v2() -> None:
    rope = RopeConfig(10000.0, 40.0, 4096, 32, 1, 0.707, 0.707)
    assert rope.rotation_mscale() == 1.0
    assert 192**-0.5 * rope.attention_mscale() ** 2 == pytest.approx(0.1147214, abs=1e-6)


@pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
def test_frequencies_equal_transformers(factor: float, v2: Oracle) -> None:
    ours = inverse_frequencies(RopeConfig(10000.0, factor, 4096), 64)
    if factor == 1.0:
        theirs = 1.0 / 10000.0 ** (torch.arange(0, 64, 2) / 64)
    else:
        config = v2.model.config.__class__(
            **STYLES["v2"]
            | dict(
                qk_rope_head_dim=64,
                max_position_embeddings=int(4096 * factor),
                rope_scaling=dict(
                    type="yarn", factor=factor, original_max_position_embeddings=4096
                ),
            )
        )
        theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](config)
    torch.testing.assert_close(ours, theirs)


def test_both_dialects_of_config_mean_the_same(v2: Oracle, tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters and dtype, the hub rope_scaling and torch_dtype."""
    theirs = json.loads((v2.path / "config.json").read_text())
    assert "rope_parameters" in theirs and "dtype" in theirs
    hub = {k: v for k, v in theirs.items() if k not in ("rope_parameters", "dtype", "head_dim")}
    rope = dict(theirs["rope_parameters"])
    hub |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": theirs["dtype"]}
    rope["type"] = rope.pop("rope_type")
    hub["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(hub))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_dict(theirs)


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_random_weights_are_the_same_model_in_every_layout(dim: int, count: int) -> None:
    shape = (10, 12)
    source = RandomSource(torch.float32, torch.device("cpu"))
    whole = source.read("layers.0.up_proj.weight", shape, WHOLE)
    shards = [Shard(dim, index, count) for index in range(count)]
    parts = [source.read("layers.0.up_proj.weight", shape, shard) for shard in shards]
    assert len({part.shape for part in parts}) == 1
    joined = torch.cat(parts, dim)
    assert torch.equal(joined.narrow(dim, 0, shape[dim]), whole)
    assert not joined.narrow(dim, shape[dim], joined.shape[dim] - shape[dim]).any()
    assert not torch.equal(whole, source.read("layers.1.up_proj.weight", shape, WHOLE))
