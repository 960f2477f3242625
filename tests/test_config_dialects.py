"""config.json in all its dialects: every key that changes results is obeyed as transformers obeys
it, or refused by name. Checkpoints with tied embeddings load as transformers loads them."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STYLES, make_checkpoint, make_prompt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2RotaryEmbedding,
    yarn_apply_mscale,
)

from minidcp import LLM, SamplingParams
from minidcp.model_config import ModelConfig
from minidcp.models.rope import inverse_frequencies

YARN = dict(
    type="yarn",
    factor=8,
    original_max_position_embeddings=64,
    beta_fast=32,
    beta_slow=1,
    mscale=0.707,
    mscale_all_dim=0.707,
)
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
# The file of hub's models, as far as it has keys that we do not read.
HUB = dict(
    architectures=["DeepseekV2ForCausalLM"],
    attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    aux_loss_alpha=0.001,
    ep_size=1,
    initializer_range=0.02,
    moe_layer_freq=1,
    num_key_value_heads=128,
    pretraining_tp=1,
    scoring_func="softmax",
    seq_aux=True,
    torch_dtype="bfloat16",
    transformers_version="4.33.1",
    use_cache=True,
)


def make_config(**changes: object) -> dict[str, Any]:
    """The content of a config.json."""
    content = STYLES["v2"] | dict(model_type="deepseek_v2", rope_theta=10000.0, rope_scaling=YARN)
    return content | changes


def yarn(**changes: object) -> dict[str, Any]:
    """YaRN's parameters with changes. None removes one."""
    return {name: value for name, value in (YARN | changes).items() if value is not None}


CONFIGS = [
    HUB,
    dict(rope_scaling=yarn(attention_factor=1.3)),
    dict(rope_scaling=yarn(attention_factor=0.8, mscale=None, mscale_all_dim=None)),
    dict(rope_scaling=yarn(factor=1, attention_factor=1.2)),
    dict(rope_scaling=yarn(truncate=False)),
    dict(rope_scaling=yarn(truncate=False, beta_fast=16, beta_slow=2.5)),
    dict(rope_scaling=yarn(beta_fast=None, beta_slow=None)),
    dict(rope_scaling=yarn(beta_fast=2, beta_slow=2)),
    dict(rope_scaling=yarn(beta_fast=2, beta_slow=2, truncate=False)),
    dict(rope_scaling=yarn(beta_fast=1, beta_slow=32)),
    dict(rope_scaling=yarn(original_max_position_embeddings=4)),
    dict(rope_scaling=yarn(original_max_position_embeddings=None)),
    dict(rope_scaling=yarn(original_max_position_embeddings=None), max_position_embeddings=None),
    dict(rope_scaling=YARN, original_max_position_embeddings=32),
    dict(rope_scaling=yarn(mscale=1.3, mscale_all_dim=0.5)),
    dict(rope_scaling=yarn(mscale_all_dim=None)),
    dict(rope_scaling=yarn(mscale=None)),
    dict(rope_scaling=yarn(mscale=0, mscale_all_dim=0)),
    dict(rope_scaling=yarn(mscale=None, mscale_all_dim=None)),
    dict(rope_scaling=yarn(rope_theta=777.0)),
    dict(rope_scaling=yarn(type="default")),
    dict(rope_scaling=YARN, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    dict(rope_scaling=None, rope_theta=777.0),
    dict(
        rope_scaling=None,
        rope_theta=None,
        rope_parameters=yarn(type=None, rope_type="yarn", rope_theta=50000, truncate=False),
    ),
]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_rotary_embedding_is_that_of_transformers(changes: dict[str, Any]) -> None:
    content = {key: value for key, value in make_config(**changes).items() if value is not None}
    ours = ModelConfig.from_dict(json.loads(json.dumps(content)))
    config = DeepseekV2Config.from_dict(json.loads(json.dumps(content)))
    theirs = DeepseekV2RotaryEmbedding(config)

    frequencies = inverse_frequencies(ours.rope, ours.qk_rope_head_dim)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    assert ours.rope.rotation_mscale() == pytest.approx(theirs.attention_scaling)
    scale = yarn_apply_mscale(config.rope_parameters, ours.qk_head_dim**-0.5)
    assert ours.softmax_scale == pytest.approx(scale)


def test_a_single_mscale_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """transformers ignores it, and DeepSeek's own code does not."""
    with caplog.at_level(logging.WARNING, "minidcp"):
        ModelConfig.from_dict(make_config(rope_scaling=yarn(mscale=1.0, mscale_all_dim=None)))
        assert not caplog.records  # the same either way
        ModelConfig.from_dict(make_config(rope_scaling=yarn(mscale_all_dim=None)))
    assert "mscale" in caplog.text and "attention_factor" in caplog.text


REFUSED = [
    (dict(rope_scaling=yarn(attn_factor=1.5)), "rope_scaling", "attn_factor 1.5", "factor"),
    (dict(rope_scaling=yarn(type=None, rope_typ="yarn")), "rope type"),
    (dict(rope_scaling=yarn(type=None)), "no rope type", "yarn"),
    (dict(rope_scaling=yarn(type="longrope", short_factor=[1.0])), "rope type 'longrope'"),
    (dict(rope_scaling={"full_attention": YARN}), "full_attention"),
    (dict(rope_scaling=yarn(partial_rotary_factor=0.5)), "partial_rotary_factor 0.5", "1"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5", "1"),
    (dict(rope_scaling=yarn(factor=0.5)), "factor is 0.5", "at least 1"),
    (dict(rope_scaling=yarn(factor=True)), "factor is True", "number"),
    (dict(rope_scaling=yarn(factor=10**400)), "factor is 1000", "number"),
    (dict(rope_scaling=yarn(factor=math.inf)), "factor is inf", "number"),
    (dict(rope_scaling=yarn(beta_fast=0)), "beta_fast is 0", "above 0"),
    (dict(rope_scaling=yarn(beta_slow="1")), "beta_slow is '1'", "number"),
    (dict(rope_scaling=yarn(attention_factor=-1.0)), "attention_factor is -1.0", "above 0"),
    (dict(rope_scaling=yarn(truncate="no")), "truncate is 'no'", "true or false"),
    (dict(rope_scaling=YARN | dict(truncate=None)), "truncate is None", "true or false"),
    (
        dict(rope_scaling=yarn(original_max_position_embeddings=64.5)),
        "original_max_position_embeddings is 64.5",
        "integer",
    ),
    (dict(rope_theta=-1.0), "rope_theta is -1.0", "above 1"),
    (dict(rope_theta="10000"), "rope_theta is '10000'", "number"),
    (dict(use_mla=False), "use_mla False", "True"),
    (dict(rope_interleave=False), "rope_interleave False", "True"),
    (dict(sliding_window=64), "sliding_window 64", "None"),
    (dict(layer_types=["sliding_attention"] * 3), "layer_types", "'full_attention'"),
    (dict(compression_config={"format": "int8"}), "compression_config", "int8"),
    (dict(quantization_config={}), "quantization_config: quant_method None", "'fp8'"),
    (dict(quantization_config=8), "quantization_config is 8", "object"),
    (dict(num_hidden_layers=True), "num_hidden_layers is True", "int"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false'", "true or false"),
    (dict(rms_norm_eps=math.inf), "rms_norm_eps is inf", "float"),
    (dict(eos_token_id="</s>"), "eos_token_id is '</s>'", "token id"),
    (dict(eos_token_id=[1, None]), "eos_token_id is [1, None]", "token id"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: str(case[0]))
def test_keys_that_are_refused(case: tuple) -> None:
    changes, *words = case
    with pytest.raises(ValueError) as refusal:
        ModelConfig.from_dict(make_config(**changes), "somewhere/config.json")
    for word in ("somewhere/config.json", *words):
        assert word in str(refusal.value)


def test_keys_that_mean_nothing_here_are_accepted() -> None:
    changes = HUB | dict(
        hidden_act="swish",
        layer_types=["full_attention"] * 3,
        partial_rotary_factor=1.0,
        quantization_config=None,
        head_dim=8,
        rope_scaling=YARN | dict(attention_factor=None, attn_factor=None),
    )
    assert ModelConfig.from_dict(make_config(**changes)) == ModelConfig.from_dict(make_config())


def test_eos_of_generation_config_is_checked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps(dict(eos_token_id=[1, 7])))
    assert ModelConfig.from_hf(tmp_path).eos_token_ids == (1, 7)
    generation.write_text(json.dumps(dict(eos_token_id=[1, "7"])))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is \[1, '7'\]"):
        ModelConfig.from_hf(tmp_path)


# Whole models.


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one file with tied embeddings, which it has once."""
    path = tmp_path_factory.mktemp("tied")
    model = make_checkpoint(path, "v2", tie_word_embeddings=True)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(path)
    assert HEAD not in load_file(path / "model.safetensors")
    return path


@pytest.fixture
def checkpoint(tied: Path, tmp_path: Path) -> Path:
    """A copy, for the test to change."""
    return Path(shutil.copytree(tied, tmp_path / "checkpoint"))


@torch.no_grad()
def check_logprobs(path: Path, tp_size: int = 2) -> None:
    """Check the log-probabilities of a prompt against those of transformers in fp32."""
    prompt = make_prompt(150, 125)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(prompt)[1:, None])[:, 0]

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    options: dict[str, Any] = dict(device="cpu", ranks="threads", dtype="float32")
    with LLM(str(path), tp_size=tp_size, dcp_size=tp_size, **options) as llm:
        output = llm.generate([prompt], params)[0]
    ours = torch.tensor([entry.logprob for entry in output.prompt_logprobs[1:]])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "rope", [yarn(attention_factor=1.3), yarn(truncate=False)], ids=["attention_factor", "truncate"]
)
def test_yarn_in_a_whole_model(checkpoint: Path, rope: dict[str, Any]) -> None:
    file = checkpoint / "config.json"
    content = json.loads(file.read_text())
    del content["rope_parameters"]
    file.write_text(json.dumps(content | dict(rope_theta=10000.0, rope_scaling=rope)))
    check_logprobs(checkpoint)


def edit_weights(path: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of the only file. None removes one."""
    file = path / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({n: t for n, t in tensors.items() if t is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("case", ["once", "copy", "head only", "other head"])
def test_tied_embeddings(checkpoint: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    """transformers ties what is the same, also if only lm_head is stored. If the two differ, it
    uses both."""
    embeddings = load_file(checkpoint / "model.safetensors")[EMBEDDINGS]
    if case == "copy":
        edit_weights(checkpoint, lm_head__weight=embeddings.clone())
    if case == "head only":
        edit_weights(
            checkpoint, lm_head__weight=embeddings.clone(), model__embed_tokens__weight=None
        )
    if case == "other head":
        other = embeddings.clone()
        other[-1] += 0.5  # of the last rank only
        edit_weights(checkpoint, lm_head__weight=other)

    with caplog.at_level(logging.WARNING, "minidcp"):
        check_logprobs(checkpoint)
    said = [r.getMessage() for r in caplog.records if r.name == "minidcp"]
    assert len(said) == (1 if case == "other head" else 0)
    assert all(HEAD in message and "as in transformers" in message for message in said)


def test_other_head_of_another_shape(checkpoint: Path) -> None:
    edit_weights(checkpoint, lm_head__weight=torch.zeros(120, 64))
    with pytest.raises(ValueError, match=r"1 of another shape: lm_head.weight \[120, 64\]"):
        LLM(str(checkpoint), device="cpu", ranks="threads").close()


def test_quantised_weights_without_a_quantization_config(checkpoint: Path) -> None:
    name = "model.norm.weight"
    edit_weights(checkpoint, model__norm__weight=torch.ones(64, dtype=torch.int8))
    with pytest.raises(ValueError, match=rf"1 of a dtype other than .*: {name} \(I8\)"):
        LLM(str(checkpoint), device="cpu", ranks="threads").close()
