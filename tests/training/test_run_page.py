"""The report: complete, self-contained, and honest about what is not private."""

from __future__ import annotations

import copy
import html
import math
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.browser import browser

from dptorch.errors import DataError
from dptorch.training import run_page
from dptorch.training.run_folder import RunFolder

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


class Outline(HTMLParser):
    """Collects the text and every address that a browser would fetch."""

    FETCHES = frozenset({"src", "href", "srcset", "data", "action", "poster"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in self.FETCHES]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder: RunFolder, **changes: Any) -> str:
    about = copy.deepcopy(folder.read_json("run.json"))
    about["statement"].update(changes.pop("statement", {}))
    about.update(changes)
    statement = (folder.path / "statement.txt").read_text()
    return run_page.render(folder.path.name, about, folder.read_metrics(), statement)


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_the_page_holds_what_was_promised(finished: RunFolder) -> None:
    page = Outline((finished.path / "report.html").read_text())
    about, last = finished.read_json("run.json"), finished.read_metrics()[-1]
    assert not page.open  # every tag is closed
    assert f"{100 * last['test_accuracy']:.1f}%" in page.text
    assert run_page._rounded_up(last["epsilon"]) in page.text
    assert "10⁻⁵" in page.text
    statement = (finished.path / "statement.txt").read_text()
    assert " ".join(statement.split()) in page.text
    assert str(about["statement"]["plan"]["noise_multiplier"]).rstrip(".0") in page.text
    assert about["statement"]["versions"]["torch"] in page.text
    assert "Not private: diagnostics" in page.text
    assert len([a for a in page.addresses if a.startswith("data:image/svg+xml")]) == 5


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_the_page_loads_nothing(finished: RunFolder) -> None:
    text = (finished.path / "report.html").read_text()
    assert all(address.startswith("data:") for address in Outline(text).addresses)
    assert not re.search(r"@import|url\(|<script|<link|<iframe", text)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.usefixtures("drawn")
def test_the_page_fits_a_narrow_screen_in_light_and_dark(
    finished: RunFolder, tmp_path: Path
) -> None:
    """Measured by a browser in a frame of 400 pixels; dark colours are those of the style."""
    about = finished.read_json("run.json")
    assert about["groups"]
    inner = html.escape((finished.path / "report.html").read_text())
    script = (
        "<script>addEventListener('load', () => { const d = frames[0].document;"
        "document.title = [d.documentElement.scrollWidth, frames[0].innerWidth,"
        "frames[0].getComputedStyle(d.body).backgroundColor, d.images.length].join('|') })</script>"
    )
    outer = tmp_path / "outer.html"
    outer.write_text(f'<iframe width="400" height="900" srcdoc="{inner}"></iframe>{script}')
    for scheme, colour in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 25, 31)")):
        dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
        dom = subprocess.run(
            [browser(), "--headless", "--no-sandbox", "--disable-gpu", *dark, "--dump-dom",
             "--virtual-time-budget=5000", f"--user-data-dir={tmp_path}/{scheme}",
             outer.as_uri()],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        found = re.search(r"<title>(\d+)\|(\d+)\|([^|]*)\|(\d+)</title>", dom)
        assert found is not None
        assert int(found[1]) <= int(found[2]) <= 400
        assert found[3] == colour
        assert int(found[4]) == 5


@pytest.mark.slow
def test_a_run_with_a_seed_protects_nobody_and_says_so(finished: RunFolder) -> None:
    text = Outline(page_of(finished)).text
    assert "This run is not private" in text
    assert "What the guarantee means" not in text
    private = Outline(page_of(finished, statement={"key_provenance": "operating system"})).text
    assert "This run is not private" not in private
    assert "What the guarantee means" in private


@pytest.mark.slow
def test_the_guarantee_in_words_follows_from_epsilon(finished: RunFolder) -> None:
    secret = {"key_provenance": "operating system"}
    strong = Outline(page_of(finished, statement={"epsilon": 1.0, **secret})).text
    share = math.ceil(1000 * (math.exp(1.0) * 0.01 + 1e-5)) / 10  # a bound is rounded up
    assert f"at most {share:.1f}% of those who were" in strong
    for weak in (8.0, math.inf):
        page = Outline(page_of(finished, statement={"epsilon": weak, **secret})).text
        assert "does not prevent it" in page


@pytest.mark.slow
def test_other_sampling_is_not_called_poisson(finished: RunFolder) -> None:
    page = page_of(
        finished, statement={"sampling_run": {"the user's own loader": 16}, "sampling_holds": False}
    )
    assert "ε is stated without amplification" in Outline(page).text


@pytest.mark.slow
def test_an_interrupted_run_is_labelled(finished: RunFolder) -> None:
    assert "This run was interrupted" in Outline(page_of(finished, status="interrupted")).text
    assert "This run was interrupted" not in Outline(page_of(finished)).text


@pytest.mark.slow
def test_names_are_escaped(finished: RunFolder) -> None:
    about = finished.read_json("run.json")
    about["data"]["source"] = "<script>alert(1)</script>"
    page = run_page.render("x", about, finished.read_metrics(), "a < b")
    assert "<script>" not in page
    assert "a &lt; b" in page


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_the_same_run_gives_the_same_page(finished: RunFolder) -> None:
    first = (finished.path / "report.html").read_text()
    run_page.write_report(finished)
    assert (finished.path / "report.html").read_text() == first


@pytest.mark.parametrize(
    ("value", "shown"), [(2.99991, "3.000"), (3.0, "3.000"), (3.00001, "3.001"), (math.inf, "∞")]
)
def test_a_bound_is_never_shown_smaller_than_it_is(value: float, shown: str) -> None:
    assert run_page._rounded_up(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1e-5, "10⁻⁵"), (1e-10, "10⁻¹⁰"), (2e-6, "2 · 10⁻⁶"), (0.001, "0.001"), (0.5, "0.5")],
)
def test_small_numbers_are_powers_of_ten(value: float, shown: str) -> None:
    assert run_page._power(value) == shown


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (5, 10), (10, 10), (948, 1000)])
def test_wilson_interval_solves_its_equation(successes: int, n: int) -> None:
    """Its ends p satisfy |share - p| = z sqrt(p (1 - p) / n)."""
    share, z = successes / n, 1.96
    low, high = run_page.wilson_interval(share, n, z)
    assert 0 <= low <= share <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            assert abs(share - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), abs=1e-12)


def test_a_folder_without_a_run_is_named(tmp_path: Any) -> None:
    with pytest.raises(DataError, match="not the folder of a finished run"):
        run_page.write_report(RunFolder(tmp_path))
