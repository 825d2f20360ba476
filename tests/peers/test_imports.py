"""Import lines are changed, and nothing else; a failure without a reason stays unexplained."""

from __future__ import annotations

import re

import pytest

from tests.peers.examples import error_in
from tests.peers.imports import with_other_imports
from tests.peers.page import render
from tests.peers.reasons import NOT_APPLICABLE, REFUSED, Reason, Verdict, judge
from tests.source import REPOSITORY

PACKAGES = {"opacus": "dptorch.compat.opacus"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from opacus import PrivacyEngine", "from dptorch.compat.opacus import PrivacyEngine"),
        (
            "from opacus.a.b import (\n    c,\n)",
            "from dptorch.compat.opacus.a.b import (\n    c,\n)",
        ),
        ("import opacus", "import dptorch.compat.opacus as opacus"),
        ("import torch, opacus", "import torch, dptorch.compat.opacus as opacus"),
        ("import opacus.layers as l", "import dptorch.compat.opacus.layers as l"),
        ("def f():\n    from opacus import g", "def f():\n    from dptorch.compat.opacus import g"),
        ("from opacus_tools import a", "from opacus_tools import a"),
        ("from .opacus import a", "from .opacus import a"),
        ('x = "from opacus import y"', 'x = "from opacus import y"'),
        ("opacus.PrivacyEngine()  # import opacus", "opacus.PrivacyEngine()  # import opacus"),
    ],
)
def test_import_lines_alone_are_changed(before: str, after: str) -> None:
    assert with_other_imports(before, PACKAGES) == after


def test_a_failure_needs_a_reason_that_fits_its_error() -> None:
    reasons = [
        Reason(REFUSED, "test_a", "is refused", "Why."),
        Reason(NOT_APPLICABLE, "b", "", "No."),
    ]
    found = judge(
        {
            "f::test_a": ("failed", "ValueError: it\nis refused"),
            "f::test_a2": ("failed", "another error"),
            "f::test_b": ("failed", "any"),
            "f::test_c": ("passed", ""),
            "f::test_d": ("skipped", "Skipped: no GPU"),
        },
        reasons,
    )
    kinds = [verdict.kind for verdict in found.values()]
    assert kinds == [REFUSED, "unexplained", NOT_APPLICABLE, "passed", NOT_APPLICABLE]
    assert found["f::test_d"].why == "Skipped by its own suite: no GPU."


def test_a_library_that_was_not_run_keeps_its_part_of_the_page() -> None:
    first = {"A": ({"a_test.py::t": Verdict("passed")}, {}), "B": ({}, {"b.py": Verdict("passed")})}
    page = render(["A", "B"], first, {"A": "commit 1", "B": "commit 2"}, "make peers", 3)
    later = {"A": ({"a_test.py::t": Verdict(REFUSED, "Why.")}, {})}
    again = render(["A", "B"], later, {"A": "commit 3"}, "make peers", 3, page)
    assert again.count("Run on commit 3.") == again.count("Run on commit 2.") == 1
    assert "commit 1" not in again
    assert "| B | examples | 1 | 0 | 0 | 0 |" in again
    assert again.split("## B")[1] == page.split("## B")[1]
    assert render(["A", "B"], later | {"B": first["B"]}, {"A": "commit 3", "B": "commit 2"},
        "make peers", 3) == again  # fmt: skip


def test_an_error_is_found_before_what_progress_bars_print() -> None:
    assert error_in("a\nfoo.errors.ConfigurationError: b is c.\n 10%|#  |\n") == (
        "foo.errors.ConfigurationError: b is c."
    )
    assert error_in("a\nb\n\n") == "b"


def unexplained(page: str) -> list[str]:
    """What the page could not explain."""
    rows = re.findall(r"^- (.*)$|^\| `.*` \| unexplained: (.*) \|$", page, re.MULTILINE)
    of_tests = page.split("### Tests unexplained\n")[1:]
    listed = [line for part in of_tests for line in part.split("\n## ")[0].splitlines() if line]
    return [line.removeprefix("- ") for line in listed] + [e for _, e in rows if e]


def test_nothing_on_the_page_is_unexplained() -> None:
    """docs/compatibility.md as it was written last; `make peers` writes it anew."""
    page = (REPOSITORY / "docs" / "compatibility.md").read_text()
    assert page.count("\n| `") > 40
    assert unexplained(page) == []


def test_what_is_unexplained_is_seen() -> None:
    """The broken twins: a test, and an example."""
    tests = "### Tests unexplained\n\n- KeyError: x (`test_a`)\n- not run to its end (`b.py`)\n"
    example = "| example | outcome |\n|---|---|\n| `a.py` | unexplained: KeyError |\n"
    ended = ["KeyError: x (`test_a`)", "not run to its end (`b.py`)"]
    assert unexplained(tests) == ended
    assert unexplained(tests + "\n## Another\n\n" + example) == [*ended, "KeyError"]
