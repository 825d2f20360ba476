"""Links that lead nowhere: in Markdown files as GitHub shows them, and in the built site."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`[^`\n]*`")
#: A link or picture, its target in group 1.
LINK = re.compile(r"\]\((?!\w+:)([^)\s]+)\)")


def prose(text: str) -> str:
    """A page without its code, in which a bracket is no link."""
    return _CODE.sub("`code`", _FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The fragments that GitHub gives to a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\]\([^)]*\)|[`*\[\]]", "", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def broken(page: Path) -> list[str]:
    """Targets of a Markdown file that are no file or folder, or no heading of one."""
    lost = []
    for target in LINK.findall(prose(page.read_text())):
        path, _, fragment = unquote(target).partition("#")
        file = page.parent / path if path else page
        known = file.exists()
        if known and fragment and file.suffix == ".md":
            known = fragment in anchors(file.read_text())
        if not known:
            lost.append(target)
    return lost


class _Targets(HTMLParser):
    """What an HTML file links to and loads, and the ids in it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.add(str(given["id"]))
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        elif tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loads.append(str(given["src"]))
        elif tag == "link" and given.get("href") and given.get("rel") != "canonical":
            self.loads.append(str(given["href"]))


def built_faults(site: Path) -> Iterator[str]:
    """Links of a built site that are dead, and what it would load from elsewhere."""
    pages: dict[Path, _Targets] = {}
    for file in sorted(site.rglob("*.html")):
        pages[file] = _Targets()
        pages[file].feed(file.read_text())
    for file, found in pages.items():
        name = file.relative_to(site)
        yield from (f"{name} loads {u}" for u in found.loads if re.match(r"(\w+:)?//", u))
        if name.name == "404.html":  # its links start at the root of the server
            continue
        for url in [*found.links, *found.loads]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = file.parent / unquote(parts.path) if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{name} links to {url}, which is no file"
            elif parts.fragment and target.suffix == ".html":
                there = pages.get(target.resolve()) or pages.get(target)
                if there and unquote(parts.fragment) not in there.ids:
                    yield f"{name} links to {url}, which has no such place"
