"""Models from a hub, which is here a server of files. transformers' own loader is the oracle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hub_server import serve_hub
from tokenizer_files import make_v3, write_tokenizer

# Each of the two loaders has an empty cache.
SCRIPT = """
import json, sys
from minidcp.engine.tokenizer import load_tokenizer
from minidcp.models.weights import find_model
from transformers import AutoTokenizer
path = find_model("me/model")
files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
theirs = AutoTokenizer.from_pretrained("me/model", cache_dir=sys.argv[1])
templates = [tokenizer.chat_template for tokenizer in (load_tokenizer(path), theirs)]
print(json.dumps({"files": files, "templates": templates}))
"""


def test_what_transformers_would_load_is_downloaded(tmp_path: Path) -> None:
    root = write_tokenizer(tmp_path / "repository", make_v3(), chat_template="inline")
    (root / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    templates = {"chat_template.jinja": "default", "additional_chat_templates/rag.jinja": "rag"}
    for name in (*templates, "model.safetensors", "pytorch_model.bin", "README.md"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(templates.get(name, ""))

    with serve_hub(root) as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, tmp_path / "theirs"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = found["templates"]
    assert ours == theirs == {"default": "default", "rag": "rag"}
    assert found["files"] == [
        "README.md",
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
