"""Draws the course's pictures from what the engine computes: docs/course/pictures/*.svg.

    python docs/tools/make_pictures.py           # or: make pictures

A test fails where a picture differs from what this gives.
"""

from collections.abc import Callable
from pathlib import Path

import draw_boards
import draw_deal
import draw_exchange
import draw_merge
import draw_mla
import draw_prompts
import draw_step
from facts import count_received_bytes, read_v2_config
from svg import Picture

FOLDER = Path(__file__).parents[1] / "course" / "pictures"

PICTURES: dict[str, Callable[[], Picture]] = {
    "dcp-wide": lambda: draw_dcp(narrow=False),
    "dcp-narrow": lambda: draw_dcp(narrow=True),
    "grid": draw_deal.draw_grid,
    "mla": lambda: draw_mla.draw_forms(read_v2_config()),
    "plan": draw_mla.draw_plan,
    "merge": draw_merge.draw_merge,
    "boards": draw_boards.draw_boards,
    "step": draw_step.draw_step,
    "prompts": draw_prompts.draw_prompts,
    "request": draw_step.draw_request,
    "exchange": lambda: draw_exchange.draw_exchange(read_v2_config()),
}


def draw_dcp(narrow: bool) -> Picture:
    size = draw_deal.LAYOUT.size
    policy = "narrow" if narrow else "wide"
    return draw_deal.draw_dcp(narrow, read_v2_config(), count_received_bytes(size, policy))


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().render(), encoding="utf-8")


if __name__ == "__main__":
    main()
