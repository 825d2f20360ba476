"""docs/migrating.md: every call of another library names the test that holds its row."""

import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.source import REPOSITORY, functions, trees

PAGE = (REPOSITORY / "docs" / "migrating.md").read_text()


@cache
def names_of_tests() -> set[str]:
    return {f.name for tree in trees().values() for f in functions(tree) if f.name[:5] == "test_"}


def rows(page: str) -> Iterator[tuple[str, list[str]]]:
    """The first cell and the named tests of each row of a table of calls, whose heads begin "Old"."""
    of_calls = False
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            of_calls = False
        elif cells[0].startswith("Old "):
            of_calls = True
            assert cells[-1] == "Test", f"{line}: its last column is to be the test"
        elif of_calls and not line.startswith("|---"):
            yield cells[0], re.findall(r"`(test_\w+)`", cells[-1])


def faults(page: str) -> list[str]:
    """What is wrong with the rows."""
    found = [f"{call}: names no test" for call, tests in rows(page) if not tests]
    return found + [
        f"{call}: there is no {test}" for call, tests in rows(page) for test in tests
        if test not in names_of_tests()
    ]  # fmt: skip


def test_every_call_names_its_test() -> None:
    assert faults(PAGE) == []
    assert len(list(rows(PAGE))) > 90


@pytest.mark.parametrize(
    ("cell", "said"), [("", "f(): names no test"), ("`test_gone`", "f(): there is no test_gone")]
)
def test_a_call_without_its_test_is_seen(cell: str, said: str) -> None:
    page = f"| Old call | New call | Test |\n|---|---|---|\n| f() | the same | {cell} |\n"
    assert faults(page) == [said]
