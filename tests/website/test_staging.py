"""The site has every page, every public name, and no link that leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tests.source import REPOSITORY
from website.__main__ import build
from website.links import broken, built_faults
from website.reference import MODULES, exported, find, page_of, without_text
from website.staging import CONFIG, places, rewritten

ROOMS = [module for group in MODULES.values() for module in group]


class Loader(yaml.SafeLoader):
    """Reads the configuration without calling what its tags name."""


Loader.add_multi_constructor("tag:yaml.org,2002:python", lambda *_: None)


def nav() -> set[str]:
    """The pages that the site's menu names."""

    def leaves(value: object) -> list[str]:
        if isinstance(value, str):
            return [value]
        values = value.values() if isinstance(value, dict) else value
        return [leaf for one in values for leaf in leaves(one)]

    return set(leaves(yaml.load(CONFIG.read_text(), Loader)["nav"]))


def test_the_menu_has_every_page_and_no_other() -> None:
    pages = {
        str(page.relative_to(REPOSITORY / "docs")) for page in (REPOSITORY / "docs").rglob("*.md")
    }
    assert pages - nav() == set()
    made = {"reference/index.md", "reference/commands.md"}
    assert nav() - {str(there) for there in places().values()} == made


def markdown() -> list[Path]:
    found = [*REPOSITORY.glob("*.md"), *(REPOSITORY / ".github").rglob("*.md")]
    return found + [
        page for folder in ("docs", "examples") for page in (REPOSITORY / folder).rglob("*.md")
    ]


@pytest.mark.parametrize("page", markdown(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    """The broken twin."""
    (tmp_path / "other.md").write_text("# What ε *means*\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text("# A\n[a](#a) [b](other.md#what-ε-means) `[c](gone.md)`\n")
    assert broken(page) == []
    page.write_text("[a](gone.md) [b](other.md#no-heading) ![c](d.png) [d](https://example.org)")
    assert broken(page) == ["gone.md", "other.md#no-heading", "d.png"]


def test_every_public_name_has_reference_text() -> None:
    assert without_text() == []
    assert sum(map(len, map(exported, ROOMS))) > 200


def test_names_are_found_through_imports() -> None:
    assert find("dptorch", "PrivacyEngine").path == "dptorch.engine.privacy_engine.PrivacyEngine"
    assert find("dptorch", "no_such_name") is None
    assert "::: dptorch.validation.gradient_check.check\n" in page_of("dptorch")


def test_what_pages_import_is_in_the_reference() -> None:
    """Whatever a reader is told to import can be looked up."""
    pattern = re.compile(r"from (dptorch[\w.]*) import (\([^)]*\)|[^\n(]*)")
    known = {*ROOMS, *(f"{module}.{name}" for module in ROOMS for name in exported(module))}
    paths = {found.path for m in ROOMS for name in exported(m) if (found := find(m, name))}
    lost = set()
    for page in [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]:
        code = "".join(
            re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        )
        for module, names in pattern.findall(code):
            for name in re.findall(r"\w+", names.split("#")[0]):
                path = f"{module}.{name}"
                found = find(module, name)
                if path not in known and (found is None or found.path not in paths):
                    lost.add(path)
    assert lost == set()


def test_links_are_moved_with_the_pages() -> None:
    where = {
        Path("docs/a.md"): Path("a.md"),
        Path("examples/x.py"): Path("examples/x.md"),
        Path("examples/README.md"): Path("examples/index.md"),
        Path("README.md"): Path("readme.md"),
    }
    text = "[x](../examples/x.py) [e](../examples) `[y](z)` [m](../Makefile) [h](#here) [w](https://w.org)"
    moved = "[x](examples/x.md) [e](examples/index.md) `[y](z)` m [h](#here) [w](https://w.org)"
    assert rewritten(text, Path("docs/a.md"), where) == moved
    assert rewritten("[a](docs/a.md#b)", Path("README.md"), where) == "[a](a.md#b)"
    kept = "rows [N, C], - [ ] a box, [`make`](../Makefile)"
    assert rewritten(kept, Path("docs/a.md"), where) == "rows [N, C], - [ ] a box, `make`"
    assert rewritten('<img src="docs/a.md">', Path("README.md"), where) == '<img src="a.md">'
    with pytest.raises(FileNotFoundError, match=r"docs/a\.md links to gone\.md"):
        rewritten("[a](gone.md)", Path("docs/a.md"), where)


def test_faults_of_a_built_site_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="x"></h1><a href="b.html#y"><a href="c.html"><a href="#x">'
    )
    (tmp_path / "b.html").write_text('<script src="https://cdn.example/x.js"></script>')
    assert list(built_faults(tmp_path)) == [
        "a.html links to b.html#y, which has no such place",
        "a.html links to c.html, which is no file",
        "b.html loads https://cdn.example/x.js",
    ]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    assert build(tmp_path) == []
    page = (tmp_path / "site" / "reference" / "dptorch.html").read_text()
    assert "Makes an ordinary training loop differentially private" in page
    assert (tmp_path / "site" / "guides" / "own_loop.html").exists()
