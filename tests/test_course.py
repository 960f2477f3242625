"""The course: its cells run, its exercises can be solved, and what it says of the code is there."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "docs" / "tools"), str(ROOT / "docs" / "course")]

import checks  # noqa: E402
from chapters import (  # noqa: E402
    COURSE,
    DOCS,
    QUOTED_LINE,
    find_line,
    find_lines,
    list_chapters,
    read_cells,
    read_code_links,
    read_exercises,
)
from check_site import find_faults  # noqa: E402
from make_pictures import FOLDER, PICTURES  # noqa: E402

CHAPTERS = list_chapters()
PAGES = sorted(DOCS.glob("**/*.md"))


def name_of(file: Path) -> str:
    return file.stem


@pytest.mark.parametrize("chapter", CHAPTERS, ids=name_of)
def test_cells_run_and_solutions_pass_their_checks(chapter: Path) -> None:
    """Unanswered, every check says no. With the solution in the reader's place it says yes."""
    text = chapter.read_text(encoding="utf-8")
    exercises = {exercise.check: exercise for exercise in read_exercises(text)}
    assert len(exercises) >= 2
    names: dict[str, Any] = {}
    for cell in read_cells(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(cell, str(chapter), "exec"), names)
        exercise = exercises.pop(cell.strip().splitlines()[-1], None)
        if exercise is not None:
            assert f"{exercise.name}: not answered yet" in printed.getvalue()
            exec(exercise.solution, names)
            assert eval(exercise.check, names).is_right, exercise.name
    assert not exercises


def forget_to_mask(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp()[:, None], (lse_b - lse).exp()[:, None]
    return weight_a * out_a + weight_b * out_b, lse


@pytest.mark.parametrize(
    ("check", "answers", "said"),
    [
        (checks.values_per_rank, [{"gqa": 512, "mla": 144, "mla with dcp 4": 144}], "mla"),
        (checks.multiply_adds, [{"decompressed": 192, "absorbed": 576}], "decompressed, absorbed"),
        (checks.find_token, [lambda layout, table, rank, row: row], "it gives"),
        (checks.shared_tokens, [{"dcp 1": 1000, "dcp 8": 1000}], "dcp 1, dcp 8"),
        (checks.merge_two, [forget_to_mask], "NaN"),
        (checks.shard_weights, [[0.0, 1.0, 0.0]], "the first, the second"),
        (checks.dcp_group, [[1, 3, 5, 7], 2], "the group"),
        (checks.reduce_scatter, [lambda group, x: group.all_reduce(x[:, 0])], "off by"),
        (checks.count_received, [lambda size, heads, q, out: 2 * heads * (q + out)], "244160"),
        (checks.row_lengths, [[10, 10, 5, 1, 1, 1, 1]], "7 steps"),
        (checks.list_local_lens, [lambda layout, p: [p // layout.size] * layout.size], "it gives"),
        (checks.gathered_places, [[0, 1, 2, 3, 0, 1, 2], [0, 0, 1, 1, 2, 2, 3]], "sent_index"),
        (checks.draft_lens, [[5, 5, 5, 5]], "not right"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(
    check: Any, answers: list[Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not check(*answers).is_right
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("chapter", CHAPTERS, ids=name_of)
def test_a_cell_fits_on_a_screen(chapter: Path) -> None:
    for cell in read_cells(chapter.read_text(encoding="utf-8")):
        assert len(cell.splitlines()) <= 30
        assert max(map(len, cell.splitlines())) <= 78  # what a page shows without scrolling


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_code_that_pages_point_to_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in read_code_links(text, page):
        assert (ROOT / link.path).is_file(), link.path
        if link.name is not None:
            find_line(ROOT / link.path, link.name)  # raises KeyError if it is not there
    if page in CHAPTERS:
        assert len(read_code_links(text, page)) >= 2


def test_the_lines_that_the_course_quotes_are_there() -> None:
    quoted = QUOTED_LINE.findall((COURSE / "index.md").read_text(encoding="utf-8"))
    assert len(quoted) >= 5
    for line, name, target in quoted:
        file = (COURSE / target).resolve()
        first, last = find_lines(file, name)
        body = file.read_text(encoding="utf-8").splitlines()[first - 1 : last]
        assert line in [code.strip() for code in body], f"{name}: {line}"


def test_functions_that_the_architecture_names_are_there() -> None:
    """`minidcp/worker/worker.py: watch` in a text, also over a line's end."""
    text = re.sub(r"\s+", " ", (DOCS / "architecture.md").read_text(encoding="utf-8"))
    named = re.findall(r"`((?:minidcp|server)/[\w/]+\.py): ([\w.]+)`", text)
    assert len(named) > 20
    for path, name in named:
        find_line(ROOT / path, name)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_what_the_engine_says(name: str) -> None:
    drawn = PICTURES[name]().render()
    stored = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == stored, "run: make pictures"


def test_the_site_check_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "good.html").write_text(
        '<p id="here"><a href="#here">x</a><a href="good.html">y</a>'
    )
    assert find_faults(tmp_path) == []
    faulty = '<script src="https://cdn.example/x.js"></script><a href="good.html#gone">x</a>'
    (tmp_path / "bad.html").write_text(
        faulty + '<img src="gone.png"><a href="https://a.example">y</a>'
    )
    (tmp_path / "bad.css").write_text("@import url(//fonts.example/x.css);")
    faults = find_faults(tmp_path)
    for part in ("cdn.example", "good.html#gone", "gone.png", "fonts.example"):
        assert sum(part in fault for fault in faults) == 1, part
    assert len(faults) == 4  # a link to another site is none


def test_every_picture_is_made_by_the_script_and_shown() -> None:
    assert {file.stem for file in FOLDER.glob("*")} == set(PICTURES)
    shown = " ".join(page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "README.md"])
    for name in PICTURES:
        assert f"pictures/{name}.svg" in shown, name
