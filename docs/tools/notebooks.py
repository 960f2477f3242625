"""Makes a notebook of a chapter and runs it, with jupytext and nbclient.

python docs/tools/notebooks.py [FOLDER]    # writes the course's notebooks, with outputs
"""

import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from chapters import COURSE, FENCE, REGION, list_chapters
from nbclient import NotebookClient

os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars among the outputs

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
SECONDS_PER_CHAPTER = 60  # the course promises less on a laptop


@dataclass(frozen=True)
class Run:
    """A chapter's notebook in JSON, and what each of its code cells printed."""

    notebook: str
    outputs: Sequence[str]
    seconds: float


def run_chapter(chapter: Path) -> Run:
    """Raises nbclient's CellExecutionError if a cell fails, ValueError if it takes too long."""
    start = time.perf_counter()
    notebook = jupytext.read(chapter, fmt="md")
    notebook.metadata["kernelspec"] = KERNEL
    client = NotebookClient(
        notebook,
        timeout=SECONDS_PER_CHAPTER,
        kernel_name=KERNEL["name"],
        extra_arguments=["--log-level=40"],  # errors
        resources={"metadata": {"path": str(COURSE)}},
    )
    client.execute()
    seconds = time.perf_counter() - start
    if seconds > SECONDS_PER_CHAPTER:
        raise ValueError(f"{chapter.name} took {seconds:.0f} s; at most {SECONDS_PER_CHAPTER}")
    print(f"{chapter.name}: {seconds:.1f} s", file=sys.stderr)
    outputs = [read_output(cell) for cell in notebook.cells if cell.cell_type == "code"]
    write: Any = nbformat.writes  # it has no types
    return Run(write(notebook), outputs, seconds)


def read_output(cell: Any) -> str:
    """The text of a cell's outputs."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif "data" in output:
            parts.append(output.data.get("text/plain", "") + "\n")
    return "".join(parts)


def show_outputs(markdown: str, run: Run) -> str:
    """The chapter with each cell's output below it."""
    outputs = iter(run.outputs)

    def add(fence: re.Match[str]) -> str:
        output = next(outputs).rstrip()
        if not output:
            return fence[0]
        return f"{fence[0]}\n\n``` {{ .text .output }}\n{output}\n```"

    pieces = []
    end = 0
    for region in REGION.finditer(markdown):
        pieces += [FENCE.sub(add, markdown[end : region.start()]), region[0]]
        end = region.end()
    pieces.append(FENCE.sub(add, markdown[end:]))
    if next(outputs, None) is not None:
        raise ValueError("the notebook has more cells than the page")
    return "".join(pieces)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else COURSE
    folder.mkdir(parents=True, exist_ok=True)
    for chapter in list_chapters():
        notebook = run_chapter(chapter).notebook
        (folder / f"{chapter.stem}.ipynb").write_text(notebook, encoding="utf-8")


if __name__ == "__main__":
    main()
