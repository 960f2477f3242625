"""Checks the built site: every link within it leads somewhere, anchors too, and nothing is loaded
from elsewhere.

    python docs/tools/check_site.py build/site
"""

import re
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser loads by itself: the attribute, by tag. A link's `rel` decides for <link>.
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}
CSS_URL = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""")


class Page(HTMLParser):
    """The links, ids and loaded addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.loaded: list[str] = []
        self.feed(text)
        self.loaded += CSS_URL.findall(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED and LOADED[tag] in values:
            self.loaded.append(values[LOADED[tag]])
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(values.get("href", ""))


@cache
def read_page(file: Path) -> Page:
    return Page(file.read_text(encoding="utf-8"))


def find_faults(site: Path) -> list[str]:
    """A line for each link or resource that is wrong."""
    faults = []
    for file in sorted(site.rglob("*.html")):
        name = file.relative_to(site)
        if name.name == "404.html":  # its addresses begin at the root of whatever serves it
            continue
        page = read_page(file)
        outside = [address for address in page.loaded if urlsplit(address).netloc]
        faults += [f"{name}: loads {address}" for address in outside]
        inside = [address for address in page.loaded if not urlsplit(address).netloc]
        for address in [*page.links, *inside]:
            if not leads_somewhere(file, address):
                faults.append(f"{name}: {address} leads nowhere")
    for file in sorted(site.rglob("*.css")):
        text = file.read_text(encoding="utf-8")
        faults += [f"{file.relative_to(site)}: loads {url}" for url in CSS_URL.findall(text)]
    return faults


def leads_somewhere(file: Path, address: str) -> bool:
    """Whether a page has what another one, or itself, links to. Links to other sites pass."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return True
    target = file
    if parts.path:
        target = (file.parent / unquote(parts.path)).resolve()
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return False
    is_anchor = parts.fragment and target.suffix == ".html"
    return not is_anchor or unquote(parts.fragment) in read_page(target).ids


def main() -> None:
    site = Path(sys.argv[1])
    faults = find_faults(site)
    pages = len(list(site.rglob("*.html")))
    if faults or pages == 0:
        sys.exit("\n".join(faults) or f"{site}: no pages")
    print(f"{site}: {pages} pages, all links lead somewhere, nothing is loaded from elsewhere")


if __name__ == "__main__":
    main()
