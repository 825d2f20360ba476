"""The pages of the site, written into one folder: the repository's own, and those made from code."""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from website import notebooks, reference
from website.links import LINK

ROOT = reference.ROOT
CONFIG = Path(__file__).with_name("mkdocs.yml")
#: Pages beside docs/, by where they are.
BESIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
    "SECURITY.md": "security.md",
    "README.md": "readme.md",
}
#: Files that pages link to and that are no pages.
FILES = ("CITATION.cff", "LICENSE")


def places(root: Path = ROOT) -> dict[Path, Path]:
    """Where each file of the repository is on the site, both relative."""
    found = {Path(here): Path(there) for here, there in BESIDE.items()}
    found |= {Path(name): Path(name) for name in FILES}
    found |= {
        file.relative_to(root): file.relative_to(root / "docs")
        for file in sorted((root / "docs").rglob("*"))
        if file.is_file() and file.suffix != ".jsonl"
    }
    for file in sorted((root / "examples").rglob("*")):
        here = file.relative_to(root)
        if file.name == "README.md":
            found[here] = here.with_name("index.md")
        elif file.suffix in (".py", ".ipynb"):
            found[here] = here.with_suffix(".md")
    return {here: there for here, there in found.items() if (root / here).exists()}


def rewritten(text: str, here: Path, where: dict[Path, Path]) -> str:
    """A page whose links lead to where their targets are on the site.

    A link to a file or folder that is not on the site becomes plain text.

    Raises:
        FileNotFoundError: a target is nowhere in the repository.
    """

    def moved(path: str) -> str:
        target = Path(os.path.normpath(here.parent / path))
        if target not in where:
            target = target / "README.md"
        if target in where:
            return os.path.relpath(where[target], where[here].parent)
        if not (ROOT / here.parent / path).exists():
            raise FileNotFoundError(f"{here} links to {path}, and there is no such file")
        return ""

    def link(found: re.Match[str]) -> str:
        path, mark, fragment = found[1].partition("#")
        if not path:
            return found[0]
        return f"]({to}{mark}{fragment})" if (to := moved(path)) else "]\0"  # a link no more

    pieces = re.split(r"(^```.*?^```|`[^`\n]*`)", text, flags=re.DOTALL | re.MULTILINE)
    pieces[::2] = [LINK.sub(link, piece) for piece in pieces[::2]]
    pieces[::2] = [
        re.sub(r'(?<=src=")[^":]+(?=")', lambda found: moved(found[0]), piece)
        for piece in pieces[::2]
    ]
    return re.sub(r"\[((?:`[^`]*`|[^\[\]`])*)\]\0", r"\1", "".join(pieces))


def program_page(file: Path) -> str:
    """A program as a page: its docstring, then its code."""
    code = file.read_text()
    said = (ast.get_docstring(ast.parse(code)) or file.stem).split("\n\n", 1)
    rest = f"\n\n{said[1]}" if len(said) > 1 else ""
    return f"# {file.name}\n\n{said[0]}{rest}\n\n```python\n{code}```\n"


def stage(folder: Path, root: Path = ROOT) -> None:
    """Write all pages below ``folder/docs`` and the configuration beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    docs, where = folder / "docs", places(root)
    for here, there in where.items():
        target = docs / there
        target.parent.mkdir(parents=True, exist_ok=True)
        if here.suffix == ".md":
            target.write_text(rewritten((root / here).read_text(), here, where))
        elif here.suffix == ".py":
            target.write_text(program_page(root / here))
        elif here.suffix == ".ipynb":
            shutil.copy(root / here, target.with_name(here.name))
            page = notebooks.page_of(root / here, target.parent / "pictures")
            drawn = {file.relative_to(docs) for file in target.parent.glob("pictures/*")}
            target.write_text(rewritten(page, here, where | {file: file for file in drawn}))
        else:
            shutil.copy(root / here, target)
    _write_reference(docs / "reference")
    _copy_source(folder / "src")
    modules = "\n".join(
        f"      - {module}: reference/{module}.md"
        for group in reference.MODULES.values()
        for module in group
    )
    text = CONFIG.read_text()
    (folder / "mkdocs.yml").write_text(text.replace("      # modules\n", modules + "\n"))


def _copy_source(folder: Path) -> None:
    """Copy the package; griffe knows the section "Examples:" and not "Example:"."""
    for file in sorted((reference.SOURCE / "dptorch").rglob("*.py")):
        target = folder / file.relative_to(reference.SOURCE)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = re.sub(r"^( +)Example:$", r"\1Examples:", file.read_text(), flags=re.MULTILINE)
        target.write_text(text)


def _write_reference(folder: Path) -> None:
    folder.mkdir(parents=True)
    written: dict[str, Callable[[], str]] = {
        "index": reference.index,
        "commands": reference.commands_page,
    }
    for name, make in written.items():
        (folder / f"{name}.md").write_text(make())
    for module in (module for group in reference.MODULES.values() for module in group):
        (folder / f"{module}.md").write_text(reference.page_of(module))
