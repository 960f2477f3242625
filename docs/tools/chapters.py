"""Reads the course's chapters. A chapter is a Markdown file that is a notebook as well: jupytext
takes its ```python blocks for cells, except those between region marks, which hold the solutions.
What is here needs neither jupytext nor mkdocs."""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
COURSE = DOCS / "course"

REGION = re.compile(r"<!-- #region -->.*?<!-- #endregion -->", re.DOTALL)
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SUMMARY = re.compile(r"<summary>Solution of (\d\.\d)</summary>")
EXERCISE = re.compile(r"^# Exercise (\d\.\d)", re.MULTILINE)
# [`Class.method`](../../minidcp/file.py), or a sentence of code in place of the name.
CODE_LINK = re.compile(r"\[`([^`]+)`\]\(((?:\.\./)+[\w/.-]+\.py)\)")
# A row of the table of lines: the line itself, and the function that has it.
QUOTED_LINE = re.compile(r"^\|[^|]*\| `([^`]+)` \| \[`([\w.]+)`\]\(([^)]+)\)", re.MULTILINE)


@dataclass(frozen=True)
class Exercise:
    """A cell whose last line checks the reader's answer, and the code that answers it."""

    name: str
    check: str
    solution: str


@dataclass(frozen=True)
class CodeLink:
    """A pointer to the code: a file of the repository, and a name in it, or none."""

    path: str
    name: str | None


def list_chapters() -> list[Path]:
    return sorted(COURSE.glob("[0-9]-*.md"))


def read_cells(text: str) -> list[str]:
    """The code of each cell, as the notebook has it."""
    return FENCE.findall(REGION.sub("", text))


def read_exercises(text: str) -> list[Exercise]:
    """Every exercise with its solution. Raises ValueError if one of the two is missing."""
    solutions = {}
    for region in REGION.findall(text):
        summary = SUMMARY.search(region)
        if summary is not None:
            solutions[summary[1]] = "".join(FENCE.findall(region))

    exercises = []
    for cell in read_cells(text):
        title = EXERCISE.search(cell)
        if title is not None:
            check = cell.strip().splitlines()[-1]
            exercises.append(Exercise(title[1], check, solutions.pop(title[1], "")))
    unsolved = [exercise.name for exercise in exercises if not exercise.solution]
    if solutions or unsolved:
        raise ValueError(f"without exercise: {list(solutions)}; without solution: {unsolved}")
    return exercises


def read_code_links(text: str, file: Path) -> list[CodeLink]:
    """The pointers to code in a page, with paths from the repository's root."""
    links = []
    for label, target in CODE_LINK.findall(text):
        path = (file.parent / target).resolve().relative_to(ROOT)
        is_name = re.fullmatch(r"[A-Za-z_][\w.]*", label) and not label.endswith(".py")
        links.append(CodeLink(str(path), label if is_name else None))
    return links


def find_line(path: Path, name: str) -> int:
    """The line of `Class.method`, or of another name, that a file defines.

    Raises KeyError if it does not.
    """
    first, _ = find_lines(path, name)
    return first


def find_lines(path: Path, name: str) -> tuple[int, int]:
    """The first and the last line of what a file defines under that name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    first, *rest = name.split(".")
    # In the module itself, or else within a function.
    found = find_name(tree.body, first) or find_name(ast.walk(tree), first)
    for part in rest:
        found = find_name(getattr(found, "body", []), part)
    if found is None:
        raise KeyError(f"{path.relative_to(ROOT)} defines no {name}")
    return found.lineno, found.end_lineno or found.lineno


def find_name(nodes: Iterable[ast.AST], name: str) -> ast.stmt | None:
    """The first statement among these that defines the name."""
    for node in nodes:
        if isinstance(node, ast.stmt) and name in list_names(node):
            return node
    return None


def list_names(node: ast.stmt) -> list[str]:
    """The names that a statement of a module or a class defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []
