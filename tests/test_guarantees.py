"""Every *Guarantees* section of the package names a test that exists."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.source import REPOSITORY as ROOT
from tests.source import functions, trees

_SECTION = re.compile(r"^( *)Guarantees:\n((?:\1 +\S.*\n|\n)*)", re.MULTILINE)


@cache
def all_tests() -> set[str]:
    """The names of all tests."""
    named = (f.name for tree in trees().values() for f in functions(tree))
    return {name for name in named if name.startswith("test_")}


def sections(source: str) -> Iterator[tuple[str, str]]:
    """The name of what has a docstring with such a section, and the section's text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for match in _SECTION.finditer((ast.get_docstring(node) or "") + "\n"):
                yield getattr(node, "name", "module"), match[2]


def faults(source: str) -> list[str]:
    """What is wrong with the sections of a file."""
    found = []
    for name, text in sections(source):
        named = re.findall(r"`(test_\w+)`", text)
        if not named:
            found.append(f"{name}: names no test")
        found += [f"{name}: there is no {test}" for test in named if test not in all_tests()]
    return found


FILES = [p for p in sorted((ROOT / "src").rglob("*.py")) if "Guarantees:" in p.read_text()]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "src" / "dptorch")))
def test_each_guarantee_names_the_test_that_holds_it(path: Path) -> None:
    source = path.read_text()
    assert len(list(sections(source))) == source.count("Guarantees:\n")
    assert faults(source) == []


def test_a_guarantee_without_a_test_is_seen() -> None:
    """The broken twins: no test named, and one that is not there."""
    claim = 'def f():\n    """Do it.\n\n    Guarantees:\n        It is done.{}\n    """\n'
    assert faults(claim.format("")) == ["f: names no test"]
    assert faults(claim.format(" Held by `test_gone`.")) == ["f: there is no test_gone"]
    known = "test_each_guarantee_names_the_test_that_holds_it"
    assert faults(claim.format(f" Held by `{known}`.")) == []
