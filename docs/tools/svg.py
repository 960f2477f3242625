"""A small way to write SVG: shapes, text and arrows, with colours for light and dark. What is drawn
is in the `draw_*.py` files beside this one."""

from collections.abc import Sequence
from html import escape

# A picture is as wide as a column of text, so that a phone need not shrink it much.
WIDTH = 560

# By variable: in light, in dark. r0 … r3 are the colours of ranks.
COLOURS = {
    "bg": ("#ffffff", "#1b1e27"),
    "fg": ("#1f2430", "#e4e7ee"),
    "soft": ("#5a6270", "#a4adbd"),
    "line": ("#8b93a3", "#7b8496"),
    "box": ("#eef0f4", "#2a2f3c"),
    "mark": ("#c2185b", "#ff7eb0"),
    "r0": ("#a9cdf7", "#1f4f86"),
    "r1": ("#ffd08a", "#7a4d05"),
    "r2": ("#b4e0b0", "#24602a"),
    "r3": ("#e3bdf0", "#63357a"),
}

STYLE = """
.pic { background: var(--bg); border-radius: 6px; font-family: system-ui, "Segoe UI", Roboto,
  Helvetica, Arial, sans-serif; font-size: 14px; }
.pic text { fill: var(--fg); }
.pic .soft { fill: var(--soft); }
.pic .small { font-size: 12px; }
.pic .bold { font-weight: 600; }
.pic .code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 12.5px; }
.pic text.mark { fill: var(--mark); }
.pic .middle { text-anchor: middle; }
.pic .end { text-anchor: end; }
.pic .box { fill: var(--box); }
.pic .edge { fill: none; stroke: var(--line); }
.pic .dash { stroke-dasharray: 4 3; }
.pic .line { stroke: var(--line); fill: none; stroke-width: 1.3; }
.pic .tip { fill: var(--line); }
.pic .marked { stroke: var(--mark); stroke-width: 2; fill: none; }
"""


class Picture:
    """One SVG. Add shapes, then `render`."""

    def __init__(self, title: str, description: str, height: float, width: float = WIDTH) -> None:
        """`title` and `description` are for readers who do not see it."""
        self.title = title
        self.description = description
        self.width = width
        self.height = height
        self.parts: list[str] = []
        self.styles: list[str] = []

    def add(self, markup: str) -> None:
        self.parts.append(markup)

    def rect(
        self, x: float, y: float, width: float, height: float, css: str = "box", extra: str = ""
    ) -> None:
        self.add(
            f'<rect x="{fmt(x)}" y="{fmt(y)}" width="{fmt(width)}" height="{fmt(height)}" '
            f'rx="3" class="{css}"{space(extra)}/>'
        )

    def text(self, x: float, y: float, text: str, css: str = "", extra: str = "") -> None:
        attribute = f' class="{css}"' if css else ""
        self.add(f'<text x="{fmt(x)}" y="{fmt(y)}"{attribute}{space(extra)}>{escape(text)}</text>')

    def line(self, *points: tuple[float, float], css: str = "line") -> None:
        path = " ".join(f"{fmt(x)},{fmt(y)}" for x, y in points)
        self.add(f'<polyline points="{path}" class="{css}"/>')

    def arrow(self, *points: tuple[float, float], css: str = "line") -> None:
        """A polyline with a tip at its end."""
        self.line(*points, css=css)
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        ux, uy = (x1 - x0) / length * 7, (y1 - y0) / length * 7
        tip = [(x1, y1), (x1 - ux - uy / 2, y1 - uy + ux / 2), (x1 - ux + uy / 2, y1 - uy - ux / 2)]
        path = " ".join(f"{fmt(x)},{fmt(y)}" for x, y in tip)
        self.add(f'<polygon points="{path}" class="tip"/>')

    def labelled(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        lines: Sequence[str],
        css: str = "box",
        text_css: str = "middle",
    ) -> None:
        """A box with lines of text in its middle."""
        self.rect(x, y, width, height, css)
        first = y + height / 2 + 5 - 8.5 * (len(lines) - 1)
        for index, line in enumerate(lines):
            self.text(x + width / 2, first + 17 * index, line, text_css)

    def render(self) -> str:
        light = write_variables(0)
        dark = write_variables(1)
        fills = "".join(f".pic .r{i} {{ fill: var(--r{i}); }}\n" for i in range(4))
        style = (
            f"\nsvg.pic {{ {light} }}\n"
            f"@media (prefers-color-scheme: dark) {{ svg.pic {{ {dark} }} }}\n"
            # In the site, its switch decides.
            f"[data-md-color-scheme=default] svg.pic {{ {light} }}\n"
            f"[data-md-color-scheme=slate] svg.pic {{ {dark} }}\n"
            f"@media print {{ svg.pic, [data-md-color-scheme] svg.pic {{ {light} }} }}"
            f"{STYLE}{fills}{''.join(self.styles)}"
        )
        size = f"{fmt(self.width)} {fmt(self.height)}"
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="pic" viewBox="0 0 {size}" '
            f'width="{fmt(self.width)}" height="{fmt(self.height)}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n<desc>{escape(self.description)}</desc>\n"
            f"<style>{style}</style>\n"
            f'<rect width="{fmt(self.width)}" height="{fmt(self.height)}" rx="6" '
            f'style="fill: var(--bg)"/>\n{body}\n</svg>\n'
        )


def write_variables(index: int) -> str:
    return " ".join(f"--{name}: {both[index]};" for name, both in COLOURS.items())


def fmt(number: float) -> str:
    """At most one decimal, so that rounding on another machine changes nothing."""
    return f"{number:.1f}".removesuffix(".0")


def space(extra: str) -> str:
    return f" {extra}" if extra else ""
