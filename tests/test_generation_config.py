"""Sampling defaults: what generation_config.json says, where requests say nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Oracle

from minidcp import LLM, EngineConfig, SamplingParams
from minidcp.generation_config import read_sampling_defaults
from minidcp_server.protocol import ChatRequest, CompletionRequest

DEEPSEEK = {
    "_from_model_config": True,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "do_sample": True,
    "temperature": 0.3,
    "top_p": 0.95,
    "transformers_version": "4.39.3",
}


def write(directory: Path, **fields: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return directory


def test_where_defaults_come_from(tmp_path: Path) -> None:
    model = write(tmp_path / "model", **DEEPSEEK)
    other = write(tmp_path / "other", top_k=20, repetition_penalty=1.05, min_p=0.1, top_p=None)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert read_sampling_defaults("auto", model) == {"temperature": 0.3, "top_p": 0.95}
    assert read_sampling_defaults("auto", empty) == {}
    for none in ("none", "vllm"):
        assert read_sampling_defaults(none, model) == {}
    for choice in (other, other / "generation_config.json"):
        found = read_sampling_defaults(str(choice), model)
        assert found == {"top_k": 20, "repetition_penalty": 1.05, "min_p": 0.1}
    for choice in (empty, tmp_path / "nowhere", "vlm"):
        with pytest.raises(
            ValueError, match=r"^--generation-config .*: must be auto, vllm or none"
        ):
            read_sampling_defaults(str(choice), model)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", "hot"), ("top_k", 1.5), ("repetition_penalty", True)],
)
def test_wrong_values_are_refused_by_name(tmp_path: Path, name: str, value: object) -> None:
    model = write(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=rf"generation_config\.json: {name} .*config none"):
        read_sampling_defaults("auto", model)


def test_what_a_request_sends_wins() -> None:
    defaults = {"temperature": 0.3, "top_p": 0.95, "top_k": 20}
    for request in (CompletionRequest(prompt="a"), ChatRequest(messages=[{"role": "user"}])):
        (params,) = request.make_sampling_params(defaults)
        assert (params.temperature, params.top_p, params.top_k) == (0.3, 0.95, 20)
        (plain,) = request.make_sampling_params({})
        assert (plain.temperature, plain.top_p, plain.top_k) == (1, 1, 0)
    request = CompletionRequest(prompt="a", temperature=0, top_p=None, top_k=0)
    (params,) = request.make_sampling_params(defaults)
    assert (params.temperature, params.top_p, params.top_k) == (0, 0.95, 0)


def test_offline(v2: Oracle, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(v2.path, model)
    write(model, temperature=0.0, top_p=0.5)
    options = dict(device="cpu", ranks="threads")
    with LLM(model, **options) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0, top_p=0.5)
        (default,) = llm.generate([5, 6, 7])
        (greedy,) = llm.generate([5, 6, 7], SamplingParams(temperature=0))
        assert default.outputs[0].token_ids == greedy.outputs[0].token_ids
        # As it is written: parameters that are given are not mixed with defaults.
        assert SamplingParams().temperature == 1
    with LLM(model, generation_config="none", **options) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
    with pytest.raises(ValueError, match="--generation-config 5: must be a str"):
        EngineConfig("model", generation_config=5)


def test_numbers_of_numpy_are_as_good_as_python_s() -> None:
    params = SamplingParams(
        max_tokens=np.int64(5),
        temperature=np.float32(0.5),
        seed=np.uint8(7),
        stop_token_ids=np.array([3, 4]),
        logit_bias={np.int32(9): np.float32(1.5)},
    )
    plain = SamplingParams(
        max_tokens=5, temperature=0.5, seed=7, stop_token_ids=[3, 4], logit_bias={9: 1.5}
    )
    assert params == plain
    assert [type(token) for token in params.stop_token_ids] == [int, int]
    assert SamplingParams(stop_token_ids=[np.int64(3)]).stop_token_ids == (3,)
    assert SamplingParams(stop_token_ids=np.int64(3)).stop_token_ids == (3,)
    with pytest.raises(ValueError, match="stop_token_ids"):
        SamplingParams(stop_token_ids=np.array([0.5]))
