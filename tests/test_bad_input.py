"""What a user can get wrong: options, checkpoints, prompts, sampling parameters, the command line.
Each is a ValueError that names the flag or field and the value, leaves no thread or process behind,
and harms no other request.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from servers import wait_until
from test_faults import children_of, needs_proc

from minidcp import LLM, EngineConfig, SamplingParams
from minidcp.cli import main
from minidcp.model_config import ModelConfig
from minidcp.request import RequestOutput

Cli = Callable[..., tuple[object, str]]
HEADS, VOCAB, POSITIONS = 8, 128, 1024
INDEX = "model.safetensors.index.json"
NORM, GATE = "model.norm.weight", "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint with several shards and without a tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    make_checkpoint(path, "v2")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the good checkpoint, for the test to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


def edit(file: Path, **changes: object) -> None:
    """Change the JSON object in a file. None removes a key."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def find_ours() -> set[object]:
    """The children of this process, and the threads of engines."""
    threads = {t for t in threading.enumerate() if "rank" in t.name or t.name == "engine"}
    return threads | set(children_of(os.getpid()) if Path("/proc/self/stat").exists() else ())


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Check that the test leaves no thread and no process."""
    before = find_ours()
    yield
    wait_until(lambda: find_ours() <= before, 2, "threads or processes are left")


def refuse(model: str | Path, *words: object, **options: object) -> None:
    """Check that LLM() raises a ValueError with all these words, and leaves nothing behind."""
    before = find_ours()
    with pytest.raises(ValueError) as refusal:
        LLM(str(model), **(dict(device="cpu", ranks="threads") | options)).close()
    for word in words:
        assert str(word) in str(refusal.value)
    wait_until(lambda: find_ours() <= before, 2, "threads or processes are left")


WRONG_OPTIONS = [
    (dict(tp_size=0), "--tp-size 0", "at least 1"),
    (dict(dcp_size=-1), "--dcp-size -1", "at least 1"),
    (dict(tp_size=3), "--tp-size 3", f"{HEADS} attention heads", "1, 2, 4, 8"),
    (dict(tp_size=16), "--tp-size 16", f"{HEADS} attention heads", "1, 2, 4, 8"),
    (dict(tp_size=4, dcp_size=3), "--dcp-size 3", "--tp-size 4", "1, 2, 4"),
    (dict(tp_size=2, dcp_size=4), "--dcp-size 4", "--tp-size 2", "1, 2"),
    (dict(block_size=0), "--block-size 0", "1, 2, 4, 8, 16, 32"),
    (dict(block_size=64), "--block-size 64", "1, 2, 4, 8, 16, 32"),
    (dict(dcp_comm_backend="nccl"), "--dcp-comm-backend 'nccl'", "p2p, a2a, ag_rs"),
    (dict(attention_backend="fa2"), "--attention-backend 'fa2'", "auto"),
    (dict(comm="mpi"), "--comm 'mpi'", "gloo"),
    (dict(comm="nccl"), "--comm nccl", "CPUs use gloo"),
    (dict(quantization="awq"), "--quantization 'awq'", "fp8"),
    (dict(load_format="pickle"), "--load-format 'pickle'", "dummy"),
    (dict(exchange_policy="thin"), "--exchange-policy 'thin'", "wide, narrow"),
    (dict(narrow_threshold=0), "--narrow-threshold 0", "at least 1"),
    (dict(device="tpu"), "--device 'tpu'", "auto, cpu, cuda"),
    (dict(dtype="float16"), "--dtype 'float16'", "bfloat16"),
    (dict(ranks="mpi"), "--ranks 'mpi'", "threads, processes"),
    (dict(num_blocks=0), "--num-blocks 0", "at least 1"),
    (dict(max_model_len=0), "--max-model-len 0", "at least 1"),
    (dict(max_model_len=POSITIONS + 1), f"--max-model-len {POSITIONS + 1}", POSITIONS),
    (
        dict(max_model_len=512, num_blocks=31),
        "--max-model-len 512",
        "holds 496 tokens",
        "--num-blocks",
    ),
    (dict(max_num_seqs=0), "--max-num-seqs 0", "at least 1"),
    (dict(max_num_batched_tokens=0), "--max-num-batched-tokens 0", "at least 1"),
    (
        dict(max_num_batched_tokens=7, max_num_seqs=8),
        "--max-num-batched-tokens 7",
        "--max-num-seqs 8",
    ),
    (dict(gpu_memory_utilization=0), "--gpu-memory-utilization 0", "(0, 1]"),
    (dict(gpu_memory_utilization=1.1), "--gpu-memory-utilization 1.1", "(0, 1]"),
    (dict(tensor_parallel=2), "unknown option tensor_parallel", "tp_size"),
]
MISTYPED_OPTIONS = [
    (dict(tp_size="4"), "--tp-size '4'"),
    (dict(tp_size=2.0), "--tp-size 2.0"),
    (dict(block_size=16.0), "--block-size 16.0"),
    (dict(num_blocks="many"), "--num-blocks 'many'"),
    (dict(max_model_len=512.0), "--max-model-len 512.0"),
    (dict(device=None), "--device None"),
    (dict(gpu_memory_utilization="all"), "--gpu-memory-utilization 'all'"),
    (dict(prefix_cache="no"), "--prefix-cache 'no'"),
]


@pytest.mark.parametrize("case", WRONG_OPTIONS + MISTYPED_OPTIONS, ids=lambda case: str(case[0]))
def test_options(tiny: Path, case: tuple) -> None:
    options, *words = case
    refuse(tiny, *words, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_device_that_is_not_there(tiny: Path) -> None:
    refuse(tiny, "--device cuda", "no CUDA device", device="cuda")


def test_block_size_of_a_config_is_checked_without_a_model() -> None:
    with pytest.raises(ValueError, match="--block-size 3: must be one of"):
        EngineConfig("nowhere", block_size=3)


def test_path_that_is_no_directory(tiny: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tiny / "config.json"):
        refuse(path, "--model-path", repr(str(path)), "no such directory")
        with pytest.raises(ValueError, match="no such directory"):
            LLM(path)  # type: ignore[arg-type]
    refuse(tmp_path, tmp_path / "config.json", "no such file")


WRONG_CONFIGS = [
    (dict(model_type="llama"), "model_type", "'llama'", "'deepseek_v2'"),
    (dict(model_type=None), "model_type", "None", "'deepseek_v2'"),
    (dict(topk_method="noaux_tc"), "topk_method 'noaux_tc'", "'greedy', 'group_limited_greedy'"),
    (dict(scoring_func="sigmoid"), "scoring_func 'sigmoid'", "'softmax'"),
    (dict(hidden_act="gelu"), "hidden_act 'gelu'", "'silu'"),
    (dict(mlp_bias=True), "mlp_bias True", "False"),
    (dict(quantization_config={"quant_method": "fp8"}), "quantization_config", "weight_block_size"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "rope type 'llama3'", "yarn"),
    (
        dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 8.0}),
        "rope type 'linear'",
        "yarn",
    ),
    (dict(rope_parameters={"rope_type": "yarn"}), "yarn", "factor"),
    (dict(rope_parameters={"rope_type": "yarn", "factor": "x"}), "factor", "'x'"),
    (dict(rope_parameters="yarn"), "rope", "'yarn'"),
    (dict(hidden_size=None), "hidden_size is missing"),
    (dict(hidden_size="64"), "hidden_size is '64'"),
    (dict(num_attention_heads=0), "num_attention_heads", "0"),
    (dict(moe_layer_freq=0), "moe_layer_freq", "0"),
    (dict(n_group=0), "n_group", "0"),
    (dict(qk_rope_head_dim=7), "qk_rope_head_dim 7", "odd"),
    (dict(n_group=3), "n_group 3", "n_routed_experts 8"),
    (dict(topk_group=5), "topk_group 5", "n_group 4"),
    (dict(num_experts_per_tok=5), "num_experts_per_tok 5", "of 4 experts"),
    (dict(num_experts_per_tok=None), "num_experts_per_tok 0"),
    (dict(moe_intermediate_size=None), "moe_intermediate_size is missing"),
]


@pytest.mark.parametrize("case", WRONG_CONFIGS, ids=lambda case: str(case[0]))
def test_configs(checkpoint: Path, case: tuple) -> None:
    changes, *words = case
    edit(checkpoint / "config.json", **changes)
    refuse(checkpoint, checkpoint / "config.json", *words)
    with pytest.raises(ValueError):
        ModelConfig.from_hf(checkpoint)


@pytest.mark.parametrize("content", ["", "{bad", "[1]", '"text"', "\udcff"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_files_that_are_no_json_object(checkpoint: Path, name: str, content: str) -> None:
    (checkpoint / name).write_text(content, errors="surrogateescape")
    refuse(checkpoint, checkpoint / name)


def shard_of(checkpoint: Path, tensor: str) -> Path:
    return checkpoint / json.loads((checkpoint / INDEX).read_text())["weight_map"][tensor]


def rewrite(file: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    """Add or replace tensors of a shard. None removes a tensor."""
    with safe_open(file, framework="pt") as shard:
        held = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    file.unlink()
    save_file({name: t for name, t in (held | tensors).items() if t is not None}, file)


def edit_index(checkpoint: Path, **changes: str | None) -> None:
    weight_map = json.loads((checkpoint / INDEX).read_text())["weight_map"] | changes
    edit(checkpoint / INDEX, weight_map={k: v for k, v in weight_map.items() if v is not None})


def test_no_weights(checkpoint: Path) -> None:
    for file in (*checkpoint.glob("*.safetensors"), checkpoint / INDEX):
        file.unlink()
    refuse(checkpoint, checkpoint, "model.safetensors", INDEX)


def test_missing_shard(checkpoint: Path) -> None:
    shard = shard_of(checkpoint, NORM)
    shard.unlink()
    refuse(checkpoint, shard, "no such file")
    refuse(checkpoint, shard, "no such file", tp_size=4, dcp_size=2)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_shard(checkpoint: Path, size: int) -> None:
    shard = shard_of(checkpoint, NORM)
    shard.write_bytes(shard.read_bytes()[:size])
    refuse(checkpoint, shard, "truncated or not safetensors", tp_size=2)


@needs_proc
def test_truncated_shard_seen_by_processes(checkpoint: Path) -> None:
    shard = shard_of(checkpoint, NORM)
    shard.write_bytes(shard.read_bytes()[:-1])
    refuse(
        checkpoint, shard, "truncated or not safetensors", ranks="processes", tp_size=2, dcp_size=2
    )


def test_truncated_single_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "v2-lite")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refuse(tmp_path, file, "truncated or not safetensors")


def test_missing_tensors_are_listed(checkpoint: Path) -> None:
    edit_index(checkpoint, **{NORM: None, GATE: None})
    refuse(checkpoint, "2 missing", NORM, GATE, tp_size=2)


def test_tensor_that_only_the_index_has(checkpoint: Path) -> None:
    rewrite(shard_of(checkpoint, NORM), {NORM: None})
    refuse(checkpoint, "1 missing", NORM, shard_of(checkpoint, NORM).name)


def test_more_missing_tensors_than_anybody_reads(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", num_hidden_layers=4)
    refuse(checkpoint, "missing", "model.layers.3.input_layernorm.weight", "more")


def test_left_over_tensors_are_listed(checkpoint: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(shard_of(checkpoint, NORM), {name: torch.zeros(8, 8)})
    edit_index(checkpoint, **{name: shard_of(checkpoint, NORM).name})
    refuse(checkpoint, "1 not part of this model", name)


def test_tensors_of_another_shape_are_listed(checkpoint: Path) -> None:
    rewrite(shard_of(checkpoint, NORM), {NORM: torch.ones(65)})
    rewrite(shard_of(checkpoint, GATE), {GATE: torch.ones(64, 32)})
    refuse(checkpoint, "2 of another shape", f"{NORM} [65]", "[64]", f"{GATE} [64, 32]", "[32, 64]")


def test_all_problems_are_told_at_once(checkpoint: Path) -> None:
    edit_index(checkpoint, **{NORM: None, "a.weight": shard_of(checkpoint, NORM).name})
    edit(checkpoint / "config.json", vocab_size=100)
    refuse(
        checkpoint, f"1 missing: {NORM}", "1 not part of this model: a.weight", "2 of another shape"
    )


def test_a_good_checkpoint_works_after_all_that(tiny: Path, nothing_left: None) -> None:
    before = find_ours()
    with LLM(str(tiny), device="cpu", ranks="threads", tp_size=2) as llm:
        # Two ranks and their two readers: the tests above would have noticed them.
        assert len(find_ours() - before) == 4
        assert tokens_of(llm.generate(GOOD, GREEDY))


WRONG_PARAMS = [
    ("max_tokens", 0),
    ("max_tokens", -3),
    ("temperature", -0.5),
    ("temperature", 1000.0),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_k", -2),
    ("top_k", 10**30),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_p", float("nan")),
    ("seed", 2**63),
    ("seed", -(2**64)),
    ("logprobs", -1),
    ("stop", ("a", "")),
    ("stop", (5,)),
    ("stop_token_ids", ("a",)),
]
MISTYPED_PARAMS = [
    ("max_tokens", 1.5),
    ("max_tokens", "many"),
    ("temperature", None),
    ("temperature", "hot"),
    ("top_k", 1.5),
    ("seed", 1.5),
    ("logprobs", 1.5),
    ("stop", 5),
    ("stop_token_ids", None),
]


@pytest.mark.parametrize(("field", "value"), WRONG_PARAMS + MISTYPED_PARAMS)
def test_sampling_params(field: str, value: object) -> None:
    with pytest.raises(ValueError) as refusal:
        SamplingParams(**{field: value})
    message = str(refusal.value)
    assert message.startswith(f"{field} ")
    assert repr(value) in message
    assert "must be" in message


GOOD = [[5, 6, 7], [8] * 40]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(str(tiny), device="cpu", ranks="threads", tp_size=2, dcp_size=2) as llm:
        yield llm


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
    return tokens_of(llm.generate(GOOD, GREEDY))


@pytest.fixture
def unharmed(llm: LLM, expected: list[list[int]]) -> Iterator[None]:
    """Check that after the test the engine holds nothing, and answers as before."""
    yield
    blocks = llm.engine.blocks
    assert llm.engine.requests == {}
    assert not llm.engine.scheduler.waiting and not llm.engine.scheduler.running and not blocks.live
    assert len(blocks.free) + len(blocks.cached) == blocks.num_blocks
    assert tokens_of(llm.generate(GOOD, GREEDY)) == expected


WRONG_PROMPTS = [
    ([[]], SamplingParams(), "prompt: is empty"),
    ([[5], []], SamplingParams(), "prompt: is empty"),
    (
        [VOCAB],
        SamplingParams(),
        f"token id {VOCAB} is out of range; the vocabulary has {VOCAB} tokens",
    ),
    ([[5], [6, -1]], SamplingParams(), "token id -1 is out of range"),
    ([10**30], SamplingParams(), f"token id {10**30} is out of range"),
    ([[5, 1.5]], SamplingParams(), "token id 1.5"),
    ("text", SamplingParams(), "no tokenizer; give token ids"),
    ([[5], "text"], SamplingParams(), "no tokenizer; give token ids"),
    ([5, [6]], SamplingParams(), "prompts"),  # is this one prompt, or two?
    ([5, "text"], SamplingParams(), "prompts"),
    ([5, 1.5], SamplingParams(), "prompts"),
    (
        [5] * POSITIONS,
        SamplingParams(max_tokens=None),
        f"maximum context length is {POSITIONS} tokens",
    ),
    ([5] * 10 * POSITIONS, SamplingParams(), f"{10 * POSITIONS} in the prompt"),
    ([5], SamplingParams(max_tokens=POSITIONS), f"you requested {POSITIONS + 1} tokens"),
    ([5], SamplingParams(max_tokens=10**30), f"{10**30} in the completion"),
    (
        [5],
        SamplingParams(logprobs=VOCAB + 1),
        f"logprobs {VOCAB + 1}: the vocabulary has {VOCAB} tokens",
    ),
    (
        [5],
        SamplingParams(stop="x"),
        "stop ('x',): the checkpoint has no tokenizer; use stop_token_ids",
    ),
    ([[5], [6]], [SamplingParams()], "sampling_params: 1 for 2 prompts"),
    ([5], [SamplingParams()] * 2, "sampling_params: 2 for 1 prompts"),
]


@pytest.mark.parametrize(
    ("prompts", "params", "words"), WRONG_PROMPTS, ids=[case[2] for case in WRONG_PROMPTS]
)
def test_prompts(llm: LLM, unharmed: None, prompts: object, params: object, words: str) -> None:
    with pytest.raises(ValueError) as refusal:
        llm.generate(prompts, params)
    assert words in str(refusal.value)


def test_a_refused_request_does_not_disturb_one_that_runs(
    llm: LLM, unharmed: None, expected: list[list[int]]
) -> None:
    engine = llm.engine
    engine.add_request("good", GOOD[0], GREEDY)
    tokens: list[int] = []
    while engine.has_work:
        for delta in engine.step():
            tokens += delta.token_ids
        with pytest.raises(ValueError, match="out of range"):
            engine.add_request("bad", [VOCAB], GREEDY)
        if len(tokens) < GREEDY.max_tokens:
            with pytest.raises(ValueError, match="'good' is in use"):
                engine.add_request("good", [5], GREEDY)
    assert tokens == expected[0]


def test_the_longest_request_is_not_refused(llm: LLM, unharmed: None) -> None:
    """A check of the bounds above: these requests are one token shorter than refused ones."""
    (output,) = llm.generate(
        [5] * (POSITIONS - 1), SamplingParams(max_tokens=None, ignore_eos=True)
    )
    assert len(output.outputs[0].token_ids) == 1
    (output,) = llm.generate(
        [VOCAB - 1], SamplingParams(max_tokens=1, logprobs=VOCAB, top_k=2**63 - 1)
    )
    assert len(output.outputs[0].logprobs[0].top) == VOCAB


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], nothing_left: None) -> Cli:
    """Runs a command line. Returns the exit code and stderr, and checks that stdout is empty."""

    def run(*argv: object) -> tuple[object, str]:
        try:
            code: object = main([str(arg) for arg in argv])
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        return code, captured.err

    return run


CPU = ("--device", "cpu", "--ranks", "threads")
WRONG_COMMANDS = [
    (("-tp", 3), "--tp-size 3 must divide the model's 8 attention heads"),
    (("--tensor-parallel-size", 4, "-dcp", 3), "--dcp-size 3 must divide --tp-size 4"),
    (("--block-size", 64), "--block-size 64: must be one of"),
    (("--max-model-len", POSITIONS + 1), f"--max-model-len {POSITIONS + 1}"),
    (("--model", "elsewhere"), "--model-path 'elsewhere': MODEL is given twice"),
]


@pytest.mark.parametrize(
    "command", [("serve", "--port", 0), ("generate", "--prompt", "x")], ids=lambda c: c[0]
)
@pytest.mark.parametrize(("flags", "words"), WRONG_COMMANDS, ids=lambda case: str(case[0]))
def test_command_line(tiny: Path, cli: Cli, command: tuple, flags: tuple, words: str) -> None:
    code, stderr = cli(*command, tiny, *CPU, *flags)
    assert code == 2
    assert stderr.startswith(f"minidcp: error: {words}")


def test_a_flag_outside_its_choices(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["serve", str(tiny), "--device", "tpu"])
    assert refusal.value.code == 2
    assert "argument --device: invalid choice: 'tpu'" in capsys.readouterr().err


def test_command_line_without_a_good_model(cli: Cli, tmp_path: Path, checkpoint: Path) -> None:
    for command in (("serve", "--port", 0), ("generate", "--prompt", "x")):
        assert cli(*command) == (
            2,
            "minidcp: error: MODEL is missing: a checkpoint directory or a Hugging Face name\n",
        )
        code, stderr = cli(*command, tmp_path / "nowhere")
        assert code == 2
        assert stderr == f"minidcp: error: --model-path '{tmp_path}/nowhere': no such directory\n"
    edit(checkpoint / "config.json", model_type="llama")
    code, stderr = cli("generate", checkpoint, "--prompt", "x")
    assert code == 2
    assert stderr.startswith(f"minidcp: error: {checkpoint}/config.json: model_type 'llama' is")
    shard_of(checkpoint, NORM).unlink()
    edit(checkpoint / "config.json", model_type="deepseek_v2")
    code, stderr = cli("generate", checkpoint, "--prompt", "x", *CPU)
    assert code == 2
    # The progress bar comes before it.
    assert f"minidcp: error: {shard_of(checkpoint, NORM)}: no such file" in stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--temperature", -1), "temperature -1.0: must be in [0, 100]"),
        (("--max-tokens", 0), "max_tokens 0: must be at least 1"),
        (("--seed", 2**63), f"seed {2**63}: must be a 64-bit integer"),
        ((), "prompt: the checkpoint has no tokenizer"),
    ],
)
def test_command_line_of_generate(tiny: Path, cli: Cli, flags: tuple, words: str) -> None:
    code, stderr = cli("generate", tiny, *CPU, "--prompt", "x", *flags)
    assert code == 2
    assert f"minidcp: error: {words}" in stderr


def test_command_line_with_a_port_that_cannot_be(tiny: Path, cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        for port in (occupied.getsockname()[1], 70000, -1):
            code, stderr = cli("serve", tiny, *CPU, "--port", port)
            assert code == 2
            assert stderr.startswith(
                f"minidcp: error: --host 127.0.0.1 --port {port}: cannot listen there"
            )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "required: command"),
        (("train",), "'train'"),
        (("serve", "x", "--tensor-parallel", 2), "--tensor-parallel"),
        (("serve", "x", "--tp-size", "two"), "'two'"),
        (("serve", "x", "--dtype", "float16"), "'float16'"),
        (("generate", "x"), "--prompt"),
    ],
)
def test_command_line_that_cannot_be_parsed(cli: Cli, argv: tuple, words: str) -> None:
    code, stderr = cli(*argv)
    assert code == 2
    assert stderr.startswith("usage: minidcp")
    assert words in stderr
