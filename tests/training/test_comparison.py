"""Several runs on one page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.browser import browser
from tests.cli.commands import refused, run

from dptorch.errors import ConfigurationError, DataError
from dptorch.training import run_folder
from dptorch.training.comparison import compare
from dptorch.training.job import Job, prepare
from dptorch.training.loop import train

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run of four epochs, one of two with more noise, and one that says it had no privacy."""
    root = tmp_path_factory.mktemp("runs")
    draw = np.random.default_rng(0)
    y = draw.integers(0, 2, 120)
    np.savez(root / "data.npz", x=draw.normal(size=(120, 4)) + 3.0 * y[:, None], y=y)
    settings: dict[str, Any] = {"data": str(root / "data.npz"), "model": "linear", "seed": 3}
    job = Job(sample_rate=0.5, epochs=4, noise_multiplier=2.0, **settings)
    long = run_folder.create(root, "long")
    train(prepare(job), long)
    short = run_folder.create(root, "short")
    train(prepare(replace(job, epochs=2, noise_multiplier=4.0)), short)
    plain = run_folder.create(root, "plain")
    for file in long.path.iterdir():
        (plain.path / file.name).write_bytes(file.read_bytes())
    about = plain.read_json("run.json")
    about["result"]["epsilon"] = float("inf")
    about["confusion"] = [[30, 2], [1, 27]]
    about["pictures"] = [
        {"image": "data:image/png;base64,AA", "class": "0", "said": "1", "probability": 0.9}
    ]
    plain.write_json("run.json", about)
    return [long.path, short.path, plain.path]


@pytest.mark.slow
def test_runs_are_ordered_by_what_they_cost(runs: list[Path]) -> None:
    found = compare(runs)
    assert [r.name for r in found.runs] == ["plain", "short", "long"]
    assert [r.private for r in found.runs] == [False, True, True]
    assert found.runs[1].epsilon < found.runs[2].epsilon
    assert found.same_test
    assert dict(found.differing)["epochs"] == (4, 2, 4)
    low, high = found.runs[2].interval or (1.0, 0.0)
    assert low < found.runs[2].result <= high


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_the_command_writes_a_page_that_loads_nothing(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    done = run("compare", *map(str, runs))
    assert done.exit_code == 0, done.output
    assert re.search(r"plain +\d+\.\d % +no privacy", done.output)
    page = (runs[0].parent / "comparison.html").read_text()
    assert not re.search(r"@import|url\(|<script|<link|<iframe|https?://", page)
    assert page.count("data:image/svg+xml") == 1
    assert "plain: which classes it takes for which" in page
    assert "it is 0" in page
    assert "dptorch ledger total" in page
    found = json.loads(
        run("compare", *map(str, runs), "--json", "--out", str(tmp_path / "c")).output
    )
    assert [row["epsilon"] is None for row in found["runs"]] == [True, False, False]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.usefixtures("drawn")
def test_the_page_fits_a_narrow_screen(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "comparison.html"
    page.write_text(compare(runs).to_html())
    script = (
        "<script>addEventListener('load', () => { const d = frames[0].document;"
        "document.title = [d.documentElement.scrollWidth, frames[0].innerWidth].join('|') })</script>"
    )
    outer = tmp_path / "outer.html"
    inner = page.read_text().replace("&", "&amp;").replace('"', "&quot;")
    outer.write_text(f'<iframe width="400" height="900" srcdoc="{inner}"></iframe>{script}')
    dom = subprocess.run(
        [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--virtual-time-budget=5000", f"--user-data-dir={tmp_path}/profile", outer.as_uri()],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    measured = re.search(r"<title>(\d+)\|(\d+)</title>", dom)
    assert measured is not None
    assert int(measured[1]) <= int(measured[2]) <= 400


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="expected at least two"):
        compare(runs[:1])
    copied = tmp_path / "copied"
    shutil.copytree(runs[0], copied)
    runs = [copied, *runs[1:]]
    about = json.loads((copied / "run.json").read_text())
    (runs[0] / "metrics.csv").write_text("epoch,step,epsilon,test_rmse\n1,2,3,4\n")
    with pytest.raises(ConfigurationError, match="no test result in common"):
        compare(runs)
    del about["result"]
    (runs[0] / "run.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="no run with test results"):
        compare(runs)
    assert "cannot be read" in refused(run("compare", str(tmp_path), str(runs[1])))
