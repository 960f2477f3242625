"""Files of a checkpoint that cannot be read: each ends a command with a message that names the file
and the reason, and with exit code 2, without a traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import ONE_THREAD

from minidcp import LLM
from minidcp.cli import main
from minidcp.models.weights import find_model

pytest_plugins = ["servers"]

INDEX = "model.safetensors.index.json"
WEIGHTS = "model-00002-of-000002.safetensors"
FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
FILES += [INDEX, WEIGHTS]
OPTIONAL = ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]

# Root reads everything. Without its capabilities it is a user like others.
DROP_CAPABILITIES = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]
DENY = """
import sys
from pathlib import Path
from minidcp.cli import main

checkpoint = Path(sys.argv[1])
for name in sys.argv[2:]:
    file = checkpoint / name
    file.chmod(0)
    arguments = ["generate", str(checkpoint), "--prompt", "a", "--device", "cpu"]
    code = main([*arguments, "--ranks", "threads"])
    file.chmod(0o644)
    print(name, code)
checkpoint.parent.chmod(0)
print("the folder", main(arguments))
checkpoint.parent.chmod(0o755)
"""


@pytest.fixture
def checkpoint(demo: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint with a tokenizer, for the test to damage."""
    return Path(shutil.copytree(demo, tmp_path / "parent" / "checkpoint"))


def test_permission_denied(checkpoint: Path) -> None:
    command = [sys.executable, "-c", DENY, str(checkpoint)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may read everything, and there is no setpriv")
        command = DROP_CAPABILITIES + command
    for name in OPTIONAL:
        (checkpoint / name).write_text("{}")
    names = FILES + OPTIONAL
    run = subprocess.run(
        [*command, *names], env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False
    )
    assert run.stdout.splitlines() == [*(f"{name} 2" for name in names), "the folder 2"], run.stderr
    for name in names:
        expected = f"minidcp: error: {checkpoint / name}: cannot be read (Permission denied)"
        assert expected in run.stderr.splitlines()
    assert f"--model-path '{checkpoint}'" in run.stderr.splitlines()[-1]
    assert "Permission denied" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def make_directory(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def make_broken_link(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("nowhere")


def make_link_to_itself(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(file.name)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def fill_with_noise(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00\x80" * 20)


NO_FILE = {
    make_directory: "cannot be read (Is a directory)",
    make_broken_link: "links to a file that is not there",
    make_link_to_itself: "cannot be read (Too many levels of symbolic links)",
}
NO_JSON = {
    truncate: "not valid JSON",
    empty: "not valid JSON",
    fill_with_noise: "not valid UTF-8",
}


def check_refused(checkpoint: Path, name: str, words: str) -> None:
    with pytest.raises(ValueError) as refusal:
        LLM(str(checkpoint), device="cpu", ranks="threads").close()
    assert str(refusal.value).startswith(f"{checkpoint / name}: {words}")


@pytest.mark.parametrize("damage", NO_FILE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES + OPTIONAL)
def test_what_is_no_file(checkpoint: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(checkpoint / name)
    check_refused(checkpoint, name, NO_FILE[damage])


@pytest.mark.parametrize("damage", NO_JSON, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES[:-1])
def test_what_is_no_json(checkpoint: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(checkpoint / name)
    check_refused(checkpoint, name, NO_JSON[damage])


@pytest.mark.parametrize("damage", NO_JSON, ids=lambda damage: damage.__name__)
def test_what_is_no_safetensors(checkpoint: Path, damage: Callable[[Path], None]) -> None:
    damage(checkpoint / WEIGHTS)
    check_refused(checkpoint, WEIGHTS, "truncated or not safetensors")


@pytest.mark.parametrize("content", ['{"weight_map": []}', '{"weight_map": {"a": 5}}', "{}"])
def test_index_without_a_map_of_files(checkpoint: Path, content: str) -> None:
    (checkpoint / INDEX).write_text(content)
    check_refused(checkpoint, INDEX, "not a safetensors index")


@pytest.mark.parametrize("damage", NO_FILE, ids=lambda damage: damage.__name__)
def test_single_file_of_weights(checkpoint: Path, damage: Callable[[Path], None]) -> None:
    (checkpoint / INDEX).unlink()
    damage(checkpoint / "model.safetensors")
    check_refused(checkpoint, "model.safetensors", NO_FILE[damage])


def test_deeply_nested_json(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[" * 100_000)
    check_refused(checkpoint, "config.json", "not valid JSON")


def test_home_of_nobody() -> None:
    with pytest.raises(ValueError, match="--model-path '~no-such-user/model': cannot be read"):
        find_model("~no-such-user/model")


@pytest.mark.parametrize("command", ["generate", "plan", "serve"])
def test_commands_say_it(
    checkpoint: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_directory(checkpoint / "config.json")
    arguments = {
        "generate": ["--prompt", "a", "--device", "cpu"],
        "plan": ["--gpu", "h100"],
        "serve": ["--device", "cpu", "--port", "0"],
    }
    assert main([command, str(checkpoint), *arguments[command]]) == 2
    said = capsys.readouterr().err
    assert f"minidcp: error: {checkpoint / 'config.json'}: cannot be read" in said
