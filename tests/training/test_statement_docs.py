"""The numbers of docs/statement.md are those of the code."""

import re

from tests.source import REPOSITORY

from dptorch.risk import guessed_right, in_words, recognised
from dptorch.training.claims import FORMATS

PAGE = (REPOSITORY / "docs" / "statement.md").read_text()


def test_the_table_of_risks_is_computed() -> None:
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+)% \| ([\d.]+)% \|$", PAGE, re.MULTILINE)
    assert len(rows) == 6
    for epsilon, found, right in rows:
        # Bounds are rounded up.
        for bound, shown in (
            (recognised(float(epsilon), 1e-5), found),
            (guessed_right(float(epsilon), 1e-5), right),
        ):
            assert 0 <= float(shown) - 100 * bound < 0.1 + 1e-9
    words = in_words(3.0, 1e-5, "example", 60000)[0]
    assert "20.1%" in words
    assert "20.1%" in PAGE
    assert "95.3%" in words
    assert "95.3%" in PAGE


def test_every_format_is_on_the_page() -> None:
    assert [form for form in FORMATS if f"--format {form}" not in PAGE and form != "text"] == []
