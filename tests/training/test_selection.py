"""Choosing by private runs: the choice is paid for, and what was not chosen is gone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.cli.commands import refused, run

from dptorch.accounting import RunLaw, tuned_epsilon
from dptorch.training import selection
from dptorch.training.job import Job, prepare
from dptorch.training.selection import noise_for


@pytest.mark.slow
def test_the_best_of_several_runs_costs_the_budget(job: Job) -> None:
    plan = prepare(replace(job, noise_multiplier=None, target_epsilon=3.0)).engine.plan
    for law in (RunLaw("geometric", 4.0), RunLaw("fixed", 3)):
        noise, epsilon = noise_for(plan, 3.0, law)
        with_noise = replace(plan, noise_multiplier=noise, target_epsilon=None)
        history = with_noise.history(plan.steps)
        again = tuned_epsilon(history, plan.target_delta, law, adjacency=plan.adjacency)
        assert epsilon == again
        assert 2.9 < epsilon <= 3.0
        # The broken twin charges for one run alone: with its noise the best of several costs more.
        one = tuned_epsilon(
            plan.history(plan.steps), plan.target_delta, law, adjacency=plan.adjacency
        )
        assert one > 3.3
        assert noise > plan.noise_multiplier


@pytest.mark.slow
def test_other_runs_leave_nothing(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three runs, of which the best is kept, with the cost of the choice as its ε."""
    monkeypatch.chdir(tmp_path)
    scores: list[float] = []
    plain = selection._score

    def scored(row: Any) -> float:
        scores.append(plain(row))
        return scores[-1]

    monkeypatch.setattr(selection, "_score", scored)
    done = run(
        "tune", "--data", str(blobs), "--model", "linear", "--epochs", "2", "--epsilon", "4",
        "--grid", "0.01,1", "--learning-rates", "0.5,2", "--mean-runs", "3", "--run-law", "fixed",
        "--seed", "1", "--name", "chosen",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert len(scores) == 3
    assert sorted(p.name for p in Path("runs").iterdir() if not p.name.startswith("ledger")) == [
        "chosen"
    ]
    about = json.loads(Path("runs/chosen/run.json").read_text())
    assert about["result"]["test_accuracy"] == max(scores)
    assert about["job"]["max_grad_norm"] in (0.01, 1.0)
    assert about["job"]["learning_rate"] in (0.5, 2.0)
    assert 3.8 < about["result"]["epsilon"] == about["statement"]["epsilon"] <= 4.0
    text = Path("runs/chosen/statement.txt").read_text()
    assert "this run is the best of several" in text
    assert "max_grad_norm of 0.01, 1; learning_rate of 0.5, 2" in text
    assert f"epsilon {about['statement']['epsilon']:.3f}" in done.output.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--noise-multiplier", "0.1"), "is not private, and no ε covers what was chosen by it"),
        (("--grid", "0,1"), "expected positive numbers"),
        (("--grid", "a"), "expected positive numbers"),
        (("--mean-runs", "0.5"), "does not fit a geometric number of runs"),
        (("--shards", "3"), "do not go with dptorch tune"),
    ],
)
def test_mistakes_are_named(
    arguments: tuple[str, ...], message: str, blobs: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in refused(run("tune", "--data", str(blobs), *arguments))
    assert not Path("runs").exists()
