"""Choosing by private runs: the choice is paid for, and what was not chosen is gone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.commands import refused, run

from dptorch.accounting import RunLaw, tuned_epsilon
from dptorch.cli import tune as command
from dptorch.errors import PrivacyError
from dptorch.ledger import open_ledger
from dptorch.training import selection
from dptorch.training.claims import FORMATS
from dptorch.training.job import Job, Setup, prepare
from dptorch.training.loop import Outcome, Silent, train
from dptorch.training.run_folder import RunFolder
from dptorch.training.selection import noise_for


class Killed(Exception):
    """What ends a process in these tests."""


class KillAt(Silent):
    """Ends the run after a step, as a kill would: nothing after it is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, step: int, train_loss: float) -> None:
        if step == self.step:
            raise Killed


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
    assert "There were 3; each drew" in text
    assert "All 3 runs on this data" in run("statement", "runs/chosen").output


@pytest.mark.slow
def test_a_secret_number_of_runs_is_not_published(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by what is chosen, nor by a later run whose ledger has the same data."""
    monkeypatch.chdir(tmp_path)
    same = ("--data", str(blobs), "--model", "linear", "--epochs", "1", "--epsilon", "4", "--seed")
    assert run("tune", *same, "0", "--mean-runs", "3", "--name", "chosen").exit_code == 0
    assert run("train", *same, "1", "--name", "later").exit_code == 0
    made = len(open_ledger("runs/ledger.db").runs())
    assert made > 2
    for name in ("chosen", "later"):
        for form in FORMATS:
            done = run("statement", f"runs/{name}", "--format", form)
            assert done.exit_code == 0
            assert "it would tell how many runs" in done.stderr
            assert not re.search(rf"\b(All )?{made}\b.runs|all_runs|all runs \|", done.stdout)
            assert "is secret" in done.stdout or name == "later" or form != "text"
    assert "<title>chosen:" in Path("runs/chosen/report.html").read_text()  # not the trial's number
    assert f"{made}" in run("ledger", "total", "--ledger", "runs/ledger.db").output


@pytest.mark.slow
def test_every_run_costs_what_the_choice_was_paid_for(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Banded noise has as many bands as are best for the budget, which a run alone does not know."""
    law = RunLaw("geometric", 2.0)
    job = Job(
        data=str(blobs), model="linear", epochs=8, sample_rate=0.1, target_epsilon=3.0, seed=3,
        mechanism="banded",
    )  # fmt: skip
    ran: list[Setup] = []

    def note(setup: Setup, folder: RunFolder, begun: bool) -> Any:
        ran.append(setup)
        return Outcome(folder, {"test_accuracy": 0.5}, False)

    selection.tune(job, [{"max_grad_norm": c} for c in (0.5, 1.0)], law, tmp_path / "best", note)
    plans = [setup.engine.plan for setup in ran]
    assert {plan.bands for plan in plans} == {prepare(job).engine.plan.bands} != {8}
    for setup in ran:
        plan = setup.engine.plan
        cost = tuned_epsilon(
            plan.history(plan.steps), plan.target_delta, law, adjacency=plan.adjacency
        )
        assert setup.selection is not None
        assert 2.9 < cost == setup.selection.epsilon <= 3.0
    # The broken twin: other bands under the same noise, which `tune` refuses to run.
    monkeypatch.setattr(
        selection,
        "prepare",
        lambda one: prepare(replace(one, bands="8") if one.target_epsilon is None else one),
    )
    with pytest.raises(PrivacyError, match="choice was paid for"):
        selection.tune(job, [{"max_grad_norm": 1.0}], law, tmp_path / "other", note)


@pytest.mark.slow
def test_a_choice_that_was_killed_goes_on_to_the_same_end(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number and the settings are those drawn at first; what had ended is not trained again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selection, "noise_for", lambda *_: (2.0, 3.9))  # seconds each time
    given = (
        "tune", "--data", str(blobs), "--model", "linear", "--epochs", "3", "--sample-rate", "0.25",
        "--epsilon", "4", "--grid", "0.01,1", "--mean-runs", "2", "--run-law", "fixed", "--seed", "1",
        "--name",
    )  # fmt: skip
    assert run(*given, "whole").exit_code == 0
    began: list[int] = []

    def watch(setup: Setup, folder: RunFolder, console: Any, *, resume: bool) -> Outcome:
        began.append(setup.engine.steps_done)
        observer = KillAt(step=9) if len(began) == 2 else None
        try:
            return train(setup, folder, observer=observer, resume=resume)
        finally:
            setup.engine.release_budget()

    monkeypatch.setattr(command, "watched", watch)
    assert isinstance(run(*given, "cut").exception, Killed)
    assert not Path("runs/cut").exists()
    trials = selection.trials_of(Path("runs/cut"))
    assert trials.stat().st_mode & 0o077 == 0
    assert "was not finished. Go on with it by --resume --name cut" in refused(run(*given, "cut"))
    assert "cannot be changed by --resume" in refused(run(*given, "cut", "--resume"))
    done = run("tune", "--resume", "--name", "cut")
    assert done.exit_code == 0, done.output
    assert len(began) == 3  # the second of two was begun twice
    assert not trials.exists()
    whole, cut = (load_file(f"runs/{name}/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    ledger = open_ledger("runs/ledger.db")
    assert len(ledger.runs()) == 4
    assert "runs/.cut-trials has no run" in refused(run("tune", "--resume", "--name", "cut"))

    # The broken twin forgets what had ended, and trains it again.
    began.clear()
    assert isinstance(run(*given, "again").exception, Killed)
    monkeypatch.setattr(selection, "_ended", lambda trial: None)
    run("tune", "--resume", "--name", "again")
    assert len(began) != 3


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
