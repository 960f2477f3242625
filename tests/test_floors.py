"""The shape of the code: imports run only downwards, and files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("minidcp/**/*.py"), *ROOT.glob("server/**/*.py")])
# Lowest first. A module may import from its own floor and from those below.
FLOORS = [
    (
        "config",
        "speculative_config",
        "console",
        "model_config",
        "generation_config",
        "rope_config",
        "fp8_config",
        "request",
        "structured_outputs",
        "hardware",
        "kernels",
    ),
    ("fetch_fa3", "machine"),
    ("choose_attention", "kv_cache"),
    ("resolve",),
    ("parallel", "batch"),
    ("attention",),
    ("models",),
    ("worker",),
    ("engine",),
    ("llm", "plan", "plan_drafts", "plan_memory", "plan_report", "plan_weights"),
    ("__init__",),
    ("server",),
    ("cli", "__main__"),
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
# The engine runs where no web framework is installed, and each back-end where its kernels are.
LAZY = {"cli.py": "minidcp_server", "attention/__init__.py": "minidcp.attention"}


def find_module(file: Path) -> str:
    """The name of a file's module or package, as FLOORS has it."""
    parts = file.relative_to(ROOT).parts
    return parts[0] if parts[0] == "server" else parts[1].removesuffix(".py")


def own_imports(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """(node, module) for each import of our own modules."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node, node.module or "") if not node.level else (node, "minidcp_server"))
    return [(n, m) for n, m in found if m.split(".")[0] in ("minidcp", "minidcp_server")]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_downwards(file: Path) -> None:
    tree = ast.parse(file.read_text())
    top_level = set(map(id, tree.body))
    for node, module in own_imports(tree):
        name = str(file.relative_to(ROOT / file.relative_to(ROOT).parts[0]))
        if id(node) not in top_level:
            assert module.startswith(LAZY.get(name, "-")), (
                f"line {node.lineno}: lazy import of {module}"
            )
        parts = module.split(".")
        target = "server" if parts[0] == "minidcp_server" else [*parts, "__init__"][1]
        assert FLOOR[target] <= FLOOR[find_module(file)], (
            f"line {node.lineno}: {module} is above {find_module(file)}"
        )


def test_only_plans_and_results_cross_between_engine_and_worker() -> None:
    """The driver starts ranks and speaks to them through `worker.py`, and knows no other part."""
    for file in FILES:
        if find_module(file) == "engine":
            modules = {module for _, module in own_imports(ast.parse(file.read_text()))}
            inner = {m for m in modules if m.startswith("minidcp.worker.")}
            assert inner <= {"minidcp.worker.worker"}, file


def test_sizes() -> None:
    lines = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in FILES}
    assert not {name: count for name, count in lines.items() if count >= 400}


def test_only_parallel_asks_for_ranks() -> None:
    for file in FILES:
        if find_module(file) != "parallel":
            assert "get_rank(" not in file.read_text(), file


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_modules_say_what_they_are(file: Path) -> None:
    tree = ast.parse(file.read_text())
    if tree.body:
        doc = ast.get_docstring(tree)
        assert doc, "no docstring"
        assert len(doc.splitlines()) <= 5
