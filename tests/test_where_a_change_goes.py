"""The tables of docs/architecture.md, "Where a change goes", and the pages of what users may choose."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from dptorch.accounting import accountant_names
from dptorch.audit.bounds import BOUNDS
from dptorch.clipping import FUNCTIONS, STYLES
from dptorch.noise import MECHANISMS
from dptorch.plan.prediction_plan import ANSWERS
from dptorch.sampling import SCHEMES
from dptorch.statement import _MECHANISMS
from dptorch.tape.gradients.clipping_modes import MODES
from tests.source import REPOSITORY, TESTS

SOURCE = REPOSITORY / "src" / "dptorch"
MAP = REPOSITORY / "docs" / "architecture.md"


def places(text: str) -> tuple[set[str], set[tuple[str, str]]]:
    """The files and folders that the tables name, and the names that they say are in a file."""
    tables = "\n".join(line for line in text.splitlines() if line.startswith("| "))
    paths = set(re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|toml|j2|md)|(?:\w+/)+)`", tables))
    paths |= set(re.findall(r"\]\(([\w./]+)\)", tables))
    inside = re.findall(
        r"`([A-Za-z_]+)(?:\(\.\.\.\))?`(?:,? and `(\w+)`)? in `([\w./]+\.py)`", tables
    )
    return paths, {(n, file) for *names, file in inside for n in names if n}


def wrong_places(text: str) -> list[str]:
    """What the tables say and the repository does not have."""
    roots = (SOURCE, TESTS, MAP.parent, REPOSITORY)
    paths, names = places(text)
    lost = [path for path in paths if not any((root / path).exists() for root in roots)]
    for name, file in names:
        sources = [root / file for root in roots if (root / file).exists()]
        if not any(re.search(rf"\b{name}\b", source.read_text()) for source in sources):
            lost.append(f"{name} in {file}")
    return sorted(lost)


def test_the_tables_of_where_a_change_goes_are_true():
    text = MAP.read_text()
    paths, names = places(text)
    assert len(paths) > 60
    assert len(names) > 30
    assert wrong_places(text) == []


def test_a_place_that_is_gone_is_found():
    """The broken twin."""
    row = "| a rule | `tape/rules/` and `tape/gone.py` | `RULES` in `tape/rules/registry.py` |\n"
    row += "| a loss | `LOSES` in `tape/rules/loss.py` | [gone.md](gone.md) |"
    assert wrong_places(row) == ["LOSES in tape/rules/loss.py", "gone.md", "tape/gone.py"]


def unsaid(choices: Iterable[str], page: str) -> list[str]:
    """Names that a user may give and that the page does not have in code type."""
    return [name for name in choices if f"`{name}`" not in page]


@pytest.mark.parametrize(
    ("page", "choices"),
    [
        ("sampling.md", SCHEMES),
        ("accounting.md", accountant_names()),
        ("clipping.md", [*FUNCTIONS, *STYLES, *MODES]),
        ("noise.md", MECHANISMS),
        ("prediction.md", ANSWERS),
        ("audit.md", BOUNDS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_user_may_choose_is_on_its_page(page, choices):
    text = (MAP.parent / page).read_text()
    assert unsaid(choices, text) == []
    assert unsaid([*choices, "newcomer"], text) == ["newcomer"]


def test_every_mechanism_has_its_words_in_the_statement():
    assert set(_MECHANISMS) == set(MECHANISMS)
