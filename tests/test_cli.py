"""What users type: SGLang's launch commands, vLLM's spellings, and `minidcp generate`."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import decode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidcp.cli import build_parser, engine_config, main, read_options
from minidcp.config import EngineConfig, ServeConfig
from minidcp.machine import Machine
from minidcp.model_config import ModelConfig
from minidcp.resolve import resolve
from minidcp.worker.cuda_graph import ladder

# SGLang's pull request 21637, verbatim but for the program's name.
SEED = """
--model-path deepseek-ai/DeepSeek-V2 --tp-size 8 --dcp-size 8 --dcp-comm-backend ag_rs --attention-backend flashinfer --enable-symm-mem --disable-radix-cache --trust-remote-code
--model-path deepseek-ai/DeepSeek-V2 --tp-size 8 --dcp-size 8 --dcp-comm-backend a2a   --attention-backend fa3        --enable-symm-mem --disable-radix-cache --trust-remote-code
--model-path deepseek-ai/DeepSeek-V2 --tp-size 8 --dcp-size 8 --dcp-comm-backend ag_rs --attention-backend fa3        --enable-symm-mem --disable-radix-cache --trust-remote-code
"""  # noqa: E501
EIGHT_HOPPERS = Machine(num_gpus=8, capability=(9, 0), has_peer_access=True)
SEED_COMMANDS = SEED.strip().splitlines()


def parse(command: str) -> EngineConfig:
    return engine_config(build_parser().parse_args(command.split()))


@pytest.mark.parametrize(
    ("flags", "exchange", "attention"),
    [
        (SEED_COMMANDS[0], "ag_rs", "flashinfer"),
        (SEED_COMMANDS[1], "a2a", "fa3"),
        (SEED_COMMANDS[2], "ag_rs", "fa3"),
    ],
)
def test_the_launch_commands_of_the_seed(flags: str, exchange: str, attention: str) -> None:
    config = parse(f"serve {flags}")
    assert config == EngineConfig(
        "deepseek-ai/DeepSeek-V2",
        tp_size=8,
        dcp_size=8,
        dcp_comm_backend=exchange,
        attention_backend=attention,
        comm="symmetric",
        prefix_cache=False,
    )
    v2 = ModelConfig.from_hf(Path(__file__).parent.parent / "benchmarks/configs/deepseek-v2")
    resolved = resolve(config, v2, EIGHT_HOPPERS, report=lambda level, text: None)
    assert (resolved.attention_backend, resolved.dcp_comm_backend) == (attention, exchange)


@pytest.mark.parametrize(
    "flags",
    [
        "MODEL --tp-size 8 --dcp-size 4",
        "--model MODEL -tp 8 -dcp 4",
        "--model-path MODEL --tensor-parallel-size 8 --decode-context-parallel-size 4",
    ],
)
def test_spellings(flags: str) -> None:
    assert parse(f"serve {flags}") == EngineConfig("MODEL", tp_size=8, dcp_size=4)


def test_defaults_are_the_config_s() -> None:
    assert parse("serve MODEL") == EngineConfig("MODEL")
    assert parse("serve MODEL --enforce-eager") == EngineConfig("MODEL", cuda_graph=False)
    assert parse("serve MODEL --no-prefix-cache") == EngineConfig("MODEL", prefix_cache=False)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == "minidcp 0.1.0\n"


def test_a_command_shows_its_own_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("serve", "generate --prompt x", "plan --gpu h100"):
        name = command.split()[0]
        with pytest.raises(SystemExit) as end:
            main([*command.split(), "MODEL", "--tp-sise", "8"])
        stderr = capsys.readouterr().err
        assert end.value.code == 2
        assert stderr.startswith(f"usage: minidcp {name} ") and "--tp-size" in stderr
        assert stderr.endswith(f"minidcp {name}: error: unrecognized arguments: --tp-sise 8\n")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("MODEL", None),
        ("MODEL --served-model-name a", ("a",)),
        ("MODEL --served-model-name a b", ("a", "b")),
        ("--served-model-name a b --model MODEL", ("a", "b")),
        ("--served-model-name a MODEL", ("a",)),
        ("--served-model-name a b MODEL", ("a", "b")),
    ],
)
def test_names_and_the_model(flags: str, names: tuple[str, ...] | None) -> None:
    args = build_parser().parse_args(f"serve {flags}".split())
    assert engine_config(args) == EngineConfig("MODEL")
    assert ServeConfig(**read_options(args, ServeConfig)).served_model_name == names


def test_the_decode_benchmark_tells_users_their_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, words in (
        ("nowhere", "--model-path 'nowhere': no such directory"),
        ("nowhere --batch x", "--batch 'x': must be rising integers"),
        ("nowhere --input-len 0", "--input-len 0: must be at least 1"),
        ("nowhere -tp 3 -dcp 2", "--dcp-size 2 must divide --tp-size 3"),
    ):
        monkeypatch.setattr(sys, "argv", ["decode.py", *flags.split()])
        assert decode.main() == 2
        assert capsys.readouterr().err.startswith(f"decode.py: error: {words}")


def test_generate_prints_the_completion_and_the_rate(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    maker = str(root / "examples" / "make_demo_checkpoint.py")
    subprocess.run([sys.executable, maker, str(tmp_path)], check=True, capture_output=True)
    seed = "--disable-radix-cache --trust-remote-code"
    flags = f"--tp-size 2 --dcp-size 2 --device cpu --ranks threads {seed}"
    command = [sys.executable, "-m", "minidcp", "generate", str(tmp_path), *flags.split()]
    command += ["--prompt", "Once upon a time", "--max-tokens", "5", "--ignore-eos"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Once upon a time")
    assert "5 tokens in" in run.stderr and "tokens/s" in run.stderr and "100%" in run.stderr
    assert "in all (dcp 2)" in run.stderr


@given(st.integers(1, 1024))
def test_ladder(most: int) -> None:
    """There is a graph for every batch, with little padding."""
    sizes = ladder(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most and sizes[0] == 1
    for size, following in pairwise(sizes):
        assert following <= (2 * size if size <= 8 else 1.5 * size)
