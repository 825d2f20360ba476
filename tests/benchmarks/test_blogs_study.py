"""The study's command makes its page, and the page says what was measured."""

from __future__ import annotations

import json
import math

import pytest
from benchmarks.blogs_study import Result
from benchmarks.blogs_study.__main__ import app
from typer.testing import CliRunner

pytestmark = pytest.mark.slow

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    arguments = ["--quick", "--task", "digits", "--epsilon", "1", "--output", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "blogs.md" in result.output
    return path


def _rows(folder):
    return json.loads((folder / "blogs" / "results.json").read_text())["results"]


@pytest.mark.slow
def test_the_page_has_every_method_and_its_plots(folder):
    page = (folder / "blogs.md").read_text()
    for row in _rows(folder):
        assert f"| {row['method']} |" in page
        assert f"{100 * row['accuracy']:.1f} %" in page
    for plot in ("accuracy", "leakage"):
        assert f"blogs/{plot}.svg" in page
        assert (folder / "blogs" / f"{plot}.svg").read_text().lstrip().startswith("<?xml")
    assert "quick run" in page
    assert "withdrawn" in page


def test_the_shuffle_is_refuted_and_the_noise_is_not(folder):
    """The seeds of training are fixed; the game with noise is not, and its audit of a true claim
    errs at most in one of twenty; what is proved here of ε = 1 in a run is near zero."""
    rows = {row["method"]: Result(**row) for row in _rows(folder)}
    assert rows["BloGS, index 2024"].refuted
    assert rows["BloGS, index 0.1.21"].refuted
    assert not rows["DP-SGD"].refuted
    assert rows["non-private"].target == math.inf
    assert rows["non-private"].accuracy > 0.8
    page = (folder / "blogs.md").read_text()
    assert page.count("**REFUTED**") == 2 + 1  # the rows, and the explanation


@pytest.mark.slow
def test_bad_options_are_refused():
    result = CliRunner().invoke(app, ["--task", "digit"])
    assert result.exit_code == 2
    assert "Did you mean 'digits'" in result.output
    assert CliRunner().invoke(app, ["--epsilon", "-1"]).exit_code == 2
