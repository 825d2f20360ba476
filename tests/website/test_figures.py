"""Pictures: what they show in words too, and in grey too."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.source import REPOSITORY

from dptorch.bench.cost_plots import _styles
from dptorch.training.run_charts import DASHES, MARKS

ALT = re.compile(r"!\[([^\]]*)\]\(|<img\b(?:(?!alt=)[^>])*(?:alt=[\"']([^\"']*))?")


def wordless(text: str) -> list[str]:
    """The alternative texts that say too little, or nothing."""
    found = [first or second for first, second in ALT.findall(text)]
    return [said for said in found if len(said) < 15]


def test_every_picture_has_an_alternative_text() -> None:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]
    pages += (REPOSITORY / "src").rglob("*.j2")
    assert {str(page): lost for page in pages if (lost := wordless(page.read_text()))} == {}
    assert sum(len(ALT.findall(page.read_text())) for page in pages) > 10


def test_a_picture_without_words_is_found() -> None:
    assert wordless('![plot](a.svg) <img src="b.png"> <img alt="a curve that rises" src="c">') == [
        "plot",
        "",
    ]


def test_engines_are_told_apart_by_their_marks() -> None:
    engines = [f"dptorch/{i}" for i in range(8)] + ["opacus/a", "fastdp/b", "private-vision/c"]
    styles = _styles([SimpleNamespace(engine=engine) for engine in engines])
    assert len({mark for _, mark in styles.values()}) == len(engines)
    assert len({colour for colour, _ in styles.values()}) == 4
    assert len(set(MARKS)) == len(MARKS)
    assert len({str(dashes) for dashes in DASHES}) == len(DASHES)


@pytest.mark.slow
def test_pictures_are_those_of_the_code() -> None:
    """Their words and their curves; the exact bytes depend on matplotlib."""
    pytest.importorskip("matplotlib")
    from website.figures import bible, epsilon_by_steps, model_size, reviews, trade_off

    folder = Path(REPOSITORY / "docs")
    for name, made in (
        ("concepts/pictures/trade_off", trade_off()),
        ("concepts/pictures/epsilon_by_steps", epsilon_by_steps()),
        ("pictures/reviews", reviews()),
        ("pictures/model_size", model_size()),
        ("pictures/bible", bible()),
    ):
        kept = (folder / f"{name}.svg").read_text()
        words = [re.findall(r">([^<>\n]+)</text>", text) for text in (made, kept)]
        assert words[0] == words[1]
        assert len(words[0]) > 8
        if name.endswith(("reviews", "bible")):
            continue  # lines of three and five points
        curves = [re.findall(r"<path d=\"(M [^\"]{400,})\"", text) for text in (made, kept)]
        assert len(curves[0]) == len(curves[1])
