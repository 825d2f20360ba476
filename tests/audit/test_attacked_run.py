"""The sampling attack on runs: every way of answering is drawn, whatever the run is."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import norm
from tests.cli.commands import refused, run

from dptorch.audit import attack_run, attacked_run
from dptorch.audit.attacked_run import _allowed_by, _gaussian_auc, _votes
from dptorch.errors import ConfigurationError


def test_what_is_allowed():
    assert _gaussian_auc(0.0, 10) == 0.5
    # The area under Φ(Φ^-1(x) + μ).
    x = np.linspace(0, 1, 100_001)
    wanted = trapezoid(norm.cdf(norm.ppf(x) + np.sqrt(3) * 0.8), x)
    assert _gaussian_auc(0.8, 3) == pytest.approx(wanted, abs=1e-4)
    assert _allowed_by(0.0, 0.1) == pytest.approx(0.595, abs=1e-4)
    assert _allowed_by(50.0, 1e-5) == pytest.approx(1.0, abs=1e-4)


def test_votes_are_those_of_most_models():
    says = lambda k: lambda x: torch.eye(3)[k].expand(len(x), -1)
    assert _votes([says(2), says(1), says(2)])(torch.zeros(4, 1)).tolist() == [2] * 4


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch):
    """Whatever the run is, all ways of answering are drawn; only the run itself for much data."""
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"{i % 50}.25,{i % 7}.5,{i % 2}" for i in range(200))
    Path("points.csv").write_text("u,v,kind\n" + rows)
    own = ("train", "--data", "points.csv", "--label", "kind", "--epochs", "1")
    for more in (
        ("--shards", "4", "--name", "shards"),
        ("--noise-multiplier", "2", "--name", "dp"),
    ):
        found = run(*own, *more)
        assert found.exit_code == 0, found.output
    fewer = partial(attack_run, queries=(1, 3, 10))
    monkeypatch.setattr(attacked_run, "attack_run", fewer)
    found = run("audit", "--sampling-attack", "runs/shards")
    assert found.exit_code == 0, found.output
    assert found.output.count("at most") == 4
    assert "thrown away: the private model (epsilon 8)." in found.output
    values = json.loads(Path("runs/shards/sampling_attack.json").read_text())
    assert [len(curve["auc"]) for curve in values["curves"]] == [3] * 6
    assert "<img" in Path("runs/shards/sampling_attack.html").read_text()
    before = sorted(path.name for path in Path("runs/dp").iterdir())
    found = json.loads(run("audit", "--sampling-attack", "runs/dp", "--json").output)
    assert {path.name for path in Path("runs/dp").iterdir()} - set(before) == {
        "sampling_attack.json", "sampling_attack.html"
    }  # fmt: skip
    named = {curve["name"]: curve for curve in found["curves"]}
    assert [name.partition(",")[0] for name in named] == (
        ["plain model"] * 3 + ["votes of 10 shards"] * 2 + ["trained privately"]
    )
    assert "the plain model, 10 models on disjoint parts" in found["notes"][-1]
    limits = [curve["allowed"] for curve in named.values()]
    assert [limit is None for limit in limits] == [True, False, False, True, False, False]
    assert 0.5 < limits[5][0] < 1.0
    assert "is not the folder of a run" in refused(run("audit", "--sampling-attack", "points.csv"))
    monkeypatch.setattr(attacked_run, "_MOST_EXAMPLES", 100)
    found = fewer("runs/dp")
    assert [curve.name.partition(",")[0] for curve in found.curves] == ["trained privately"]
    assert "at most 100 examples" in str(found)


def test_a_run_of_another_command_is_refused_in_words(tmp_path):
    (tmp_path / "run.json").write_text('{"job": {"task": "vision"}}')
    with pytest.raises(ConfigurationError, match=r"a run of dptorch train vision\."):
        attack_run(tmp_path)
