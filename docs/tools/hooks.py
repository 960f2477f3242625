"""What mkdocs calls while it builds the site: runs the chapters and shows their outputs, brings in
the files that pages link to, and puts pictures into the pages themselves."""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

from chapters import CODE_LINK, DOCS, ROOT, find_line, list_chapters
from notebooks import Run, run_chapter, show_outputs

LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
INLINE_PICTURE = re.compile(r'<img [^>]*src="[^"]*pictures/([\w-]+)\.svg"[^>]*>')
# Pages that are not in docs/, but belong to the site.
MORE_PAGES = ("CONTRIBUTING.md", "README.md")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json"}

runs: dict[str, Run] = {}  # by the chapter's address in the site
repo_paths: dict[str, str] = {}  # by address in the site: the file of the repository


def on_files(files: Files, config: Any) -> Files:
    """Run the chapters, and add their notebooks and every file that a page links to."""
    for chapter in list_chapters():
        uri = chapter.relative_to(DOCS).as_posix()
        runs[uri] = run_chapter(chapter)
        notebook = posixpath.splitext(uri)[0] + ".ipynb"
        stored = files.get_file_from_path(notebook)  # perhaps `make notebooks` wrote it
        if stored is not None:
            files.remove(stored)
        files.append(File.generated(config, notebook, content=runs[uri].notebook))

    for file in files.documentation_pages():
        repo_paths[file.src_uri] = f"docs/{file.src_uri}"
    for path in MORE_PAGES:
        add_file(path, files, config)
    to_read = list(repo_paths.values())
    while to_read:
        path = to_read.pop()
        if path.endswith(".md"):
            to_read += add_linked_files(path, files, config)
    return files


def add_linked_files(path: str, files: Files, config: Any) -> list[str]:
    """Add what the page `path` of the repository links to. Returns what was not there yet."""
    text = (ROOT / path).read_text(encoding="utf-8")
    added = []
    for target, _ in LINK.findall(text):
        linked = join(path, target)
        is_missing = to_uri(linked) not in repo_paths and not linked.startswith("docs/")
        if is_missing and (ROOT / linked).is_file():
            add_file(linked, files, config)
            added.append(linked)
    return added


def add_file(path: str, files: Files, config: Any) -> None:
    """Add a file of the repository: an image as it is, a page, or a page that shows the file."""
    uri = to_uri(path)
    repo_paths[uri] = path
    source = ROOT / path
    if source.suffix in (".png", ".svg"):
        files.append(File.generated(config, uri, abs_src_path=str(source)))
        return
    text = source.read_text(encoding="utf-8")
    if source.suffix != ".md":
        language = LANGUAGES.get(source.suffix, "text")
        # Four ticks, because the file may have three.
        front = "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n"
        text = f'{front}# `{path}`\n\n````` {{ .{language} linenums="1" }}\n{text}\n`````\n'
    files.append(File.generated(config, uri, content=text))


def to_uri(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith((".md", ".png", ".svg")):
        return f"repo/{path}"
    return f"code/{path}.md"


def join(path: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    uri = page.file.src_uri
    path = repo_paths.get(uri)
    if path is None or not path.endswith(".md"):
        return markdown
    if path == "README.md":
        markdown = re.sub(r"^---\n.*?^---\n", "", markdown, flags=re.DOTALL | re.MULTILINE)
    markdown = CODE_LINK.sub(lambda link: add_line(link, path), markdown)
    markdown = LINK.sub(lambda link: move_link(link, path, uri), markdown)
    if uri in runs:
        markdown = add_run(show_outputs(markdown, runs[uri]), uri)
    return markdown


def add_run(markdown: str, uri: str) -> str:
    """The notebook and how long it took, behind the chapter's title."""
    title, rest = markdown.split("\n", 1)
    notebook = posixpath.basename(posixpath.splitext(uri)[0]) + ".ipynb"
    seconds = runs[uri].seconds
    note = f"This page is a notebook, [{notebook}]({notebook}). It ran in {seconds:.0f} s on a CPU."
    return f"{title}\n\n{note}\n{{ .run }}\n{rest}"


def add_line(link: re.Match[str], path: str) -> str:
    """A link to a name in a file of code leads to its line."""
    label, target = link.groups()
    try:
        line = find_line(ROOT / join(path, target), label)
    except KeyError:
        return link[0]  # not a name
    return f"[`{label}`]({target}#__span-0-{line})"


def move_link(link: re.Match[str], path: str, uri: str) -> str:
    """From a path in the repository to one in the site, both seen from the page."""
    target, fragment = link.groups()
    moved = posixpath.relpath(to_uri(join(path, target)), posixpath.dirname(uri) or ".")
    return moved + (fragment or "")


def on_page_content(html: str, **_: Any) -> str:
    """Put the pictures themselves into the page: so they follow its switch of light and dark."""

    def read(image: re.Match[str]) -> str:
        svg = (DOCS / "course" / "pictures" / f"{image[1]}.svg").read_text(encoding="utf-8")
        return f'<span class="picture">{svg}</span>'

    return INLINE_PICTURE.sub(read, html)
