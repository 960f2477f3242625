"""`--speculative-config`, vLLM's spelling of the flags for speculative decoding."""

from __future__ import annotations

import shlex

import pytest

from minidcp.cli import build_parser, engine_config, main
from minidcp.config import EngineConfig

# From vLLM's documentation, features/speculative_decoding/acceptance_metrics.
VLLM = (
    '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, '
    '"prompt_lookup_max": 3}'
)


def parse(command: str) -> EngineConfig:
    return engine_config(build_parser().parse_args(shlex.split(command)))


@pytest.mark.parametrize("name", ["--speculative-config", "-sc"])
@pytest.mark.parametrize("command", ["serve", "generate --prompt x", "plan --gpu h100"])
def test_vllm_s_spelling(command: str, name: str) -> None:
    args = build_parser().parse_args([*command.split(), "MODEL", name, VLLM])
    assert engine_config(args, dcp_size=1) == EngineConfig(
        "MODEL",
        speculative_method="ngram",
        num_speculative_tokens=3,
        prompt_lookup_min=1,
        prompt_lookup_max=3,
    )


def test_keys_that_are_left_out_have_our_defaults() -> None:
    config = parse("""serve MODEL -sc '{"method": "ngram"}'""")
    assert config == EngineConfig("MODEL", speculative_method="ngram")


@pytest.mark.parametrize("method", ["mtp", "deepseek_mtp"])
def test_both_of_vllm_s_names_of_mtp(method: str) -> None:
    config = parse(f"""serve MODEL -sc '{{"method": "{method}", "num_speculative_tokens": 2}}'""")
    assert config == EngineConfig("MODEL", speculative_method="mtp", num_speculative_tokens=2)


def test_flags_may_give_what_the_object_does_not() -> None:
    config = parse("""serve MODEL --speculative-method ngram -sc '{"prompt_lookup_max": 3}'""")
    assert config == EngineConfig("MODEL", speculative_method="ngram", prompt_lookup_max=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{method: ngram}", "is not JSON (Expecting property name"),
        ("ngram", "is not JSON (Expecting value"),
        ('["ngram"]', "must be a JSON object, such as {"),
        ("null", "must be a JSON object, such as {"),
        (
            '{"method": "ngram", "model": "x"}',
            "unknown key 'model'; possible are method, num_speculative_tokens, prompt_lookup_max, "
            "prompt_lookup_min. Guesses come from prompt lookup or the model's MTP layer, not from "
            "another model",
        ),
        ('{"method": "eagle"}', "'method' is 'eagle'; must be one of ngram, mtp, deepseek_mtp"),
        ('{"method": null}', "'method' is None; must be one of ngram, mtp, deepseek_mtp"),
        (
            '{"method": "ngram", "num_speculative_tokens": "4"}',
            "'num_speculative_tokens' is '4'; must be an integer, at least 1",
        ),
        (
            '{"method": "ngram", "num_speculative_tokens": 0}',
            "'num_speculative_tokens' is 0; must be an integer, at least 1",
        ),
        ('{"prompt_lookup_max": true}', "'prompt_lookup_max' is True; must be an integer"),
        ('{"num_speculative_tokens": 4}', '\'method\' is missing; add "method": "ngram" or "mtp"'),
    ],
)
def test_wrong_objects(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "MODEL", "--speculative-config", text]) == 2
    assert f"minidcp: error: --speculative-config {text!r}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("value", [3, 5])  # the flag's default is no less given than another value
def test_a_key_that_is_a_flag_as_well(value: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = '{"method": "ngram", "num_speculative_tokens": 4}'
    flags = ["-sc", text, "--num-speculative-tokens", str(value)]
    assert main(["serve", "MODEL", *flags]) == 2
    assert (
        f"--speculative-config {text!r}: 'num_speculative_tokens' is given twice, "
        f"also as --num-speculative-tokens {value}; leave one of them out"
    ) in capsys.readouterr().err
