"""`dptorch ledger` as a user types it, and the ledger that `dptorch train` keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.commands import QUICK, refused, run
from tests.ledger.setup import OS, plan, take

from dptorch.cli.ledger import for_new_run
from dptorch.ledger import beside, open_ledger


def parsed(*arguments: str) -> Any:
    result = run("ledger", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.slow
def test_runs_on_one_file_add_up_under_a_cap(data: Path) -> None:
    first = run("train", "--data", "points.csv", *QUICK)
    assert first.exit_code == 0, first.output
    assert "points.csv has an account of its own from now on: id:" in first.output
    (one,) = parsed("show")
    assert one["name"] == "points-1"
    assert "points-1" in run("ledger", "show").output
    about = json.loads(Path("runs/points-1/run.json").read_text())
    assert one["steps"] == one["plan"]["steps"] == 8
    assert one["repeated"] == 0
    assert not one["open"]
    assert one["dataset"].startswith("id:")
    assert about["ledger"]["run"] == one["run"]
    assert one["run"] in Path("runs/points-1/statement.txt").read_text()
    (total,) = parsed("total")
    assert total["planned"] == pytest.approx(about["result"]["epsilon"])

    # The head in run.json pins all that came before it.
    assert run("ledger", "verify", "--head", about["ledger"]["head"]).exit_code == 0
    lost = run("ledger", "verify", "--head", "0" * 64)
    assert lost.exit_code == 1
    assert "rewritten" in lost.output

    room = f"{total['adaptive'] * 1.2:.4f}"
    capped = run("ledger", "cap", one["dataset"], "--epsilon", room, "--delta", str(total["delta"]))
    assert capped.exit_code == 0, capped.output
    message = refused(run("train", "--data", "points.csv", *QUICK))
    assert "Nothing was spent" in message
    assert not Path("runs/points-2").exists()
    assert len(parsed("show")) == 1
    (budget,) = parsed("budgets")
    assert budget["committed"] <= budget["cap"]["epsilon"]
    assert budget["steps"] == 8
    for command in ("show", "total", "budgets", "verify"):
        assert one["dataset"] in run("ledger", command).output or command == "verify"
    assert one["run"] in run("ledger", "show", "--entries").output


@pytest.mark.slow
def test_a_named_data_set_in_a_shared_ledger(data: Path) -> None:
    with_ledger = ("--ledger", "shared/all.db", "--dataset", "points")
    result = run("train", "--data", "points.csv", *with_ledger, *QUICK)
    assert result.exit_code == 0, result.output
    assert not Path("runs/ledger.db").exists()
    assert not list(Path().glob("*.dptorch-id.json"))
    assert [r["dataset"] for r in parsed("show", "--ledger", "shared/all.db")] == ["points"]
    assert "no run on 'other'" in refused(
        run("ledger", "total", "--ledger", "shared/all.db", "--dataset", "other")
    )


def test_accounts_that_may_be_of_the_same_data_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def said(dataset: str | None, data: Path | None) -> str:
        account = for_new_run(None, tmp_path, dataset, data=None if data is None else str(data))
        take(account, 1)
        return capsys.readouterr().out

    of_folder = beside(folder)
    assert said(None, folder) == ""  # known
    outer = said(None, folder.parent)
    assert f"So has {folder}, and one lies in the other" in outer
    assert f"--dataset {of_folder}" in outer
    assert f"{of_folder} has an account here too" in said("cifar", folder)
    assert said("patients-2026", None) == said("patients-2026", None) == ""
    assert "patients-2026 has an account here too" in said("Patients_2026", None)
    assert said("patients-2027", None) == ""


@pytest.mark.slow
def test_without_a_ledger(data: Path) -> None:
    result = run("train", "--data", "points.csv", "--no-ledger", *QUICK)
    assert result.exit_code == 0, result.output
    assert json.loads(Path("runs/points-1/run.json").read_text())["ledger"] is None
    assert not list(Path().glob("**/ledger.db"))
    assert "There is no ledger" in refused(run("ledger", "show"))


@pytest.mark.slow
def test_a_killed_run_counts_its_lost_steps_when_it_resumes(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dptorch.cli.progress import EpochLines

    class Killed(BaseException):
        """Ends the run without any of its clean-up, as far as that can be had in one process."""

    def stepped(self: EpochLines, step: int, train_loss: float) -> None:
        if step == 6:  # the last checkpoint is of step 4
            raise Killed

    from dptorch.engine.privacy_engine import PrivacyEngine

    with monkeypatch.context() as patch:
        patch.setattr(EpochLines, "stepped", stepped)
        patch.setattr(PrivacyEngine, "release_budget", lambda self: None)
        with pytest.raises(Killed):
            run("train", "--data", "points.csv", "--name", "cut", *QUICK)
    (dead,) = parsed("show")
    assert (dead["steps"], dead["open"]) == (6, True)
    resumed = run("train", "--resume", "--name", "cut")
    assert resumed.exit_code == 0, resumed.output
    assert "2 steps were released after this checkpoint" in " ".join(resumed.output.split())
    (whole,) = parsed("show")
    assert (whole["steps"], whole["repeated"], whole["open"]) == (8, 2, False)
    about = json.loads(Path("runs/cut/run.json").read_text())
    assert about["result"]["epsilon"] == pytest.approx(whole["epsilon"])
    assert "2 repeated after a kill" in Path("runs/cut/statement.txt").read_text()


def test_a_dead_run_is_closed(data: Path) -> None:
    patients = open_ledger("ledger.db").dataset("points")
    record = patients.run(plan(), OS)
    record.count(0, plan().event(1))
    at = ("--ledger", "ledger.db")
    assert record.run in run("ledger", "total", *at).output  # named as open
    assert run("ledger", "close", record.run, *at).exit_code == 0
    assert not parsed("show", *at)[0]["open"]
    assert "does not know" in refused(run("ledger", "close", "nobody", *at))


def test_lifting_a_cap_and_contradictions() -> None:
    at = ("--ledger", "ledger.db")
    assert run("ledger", "cap", "x", "--epsilon", "3", "--delta", "1e-5", *at).exit_code == 0
    assert run("ledger", "cap", "x", "--lift", *at).exit_code == 0
    (after,) = parsed("budgets", *at)
    assert after["cap"] is None
    assert "--lift" in refused(run("ledger", "cap", "x", "--epsilon", "3", *at))


def test_help_teaches() -> None:
    text = run("ledger", "--help").output
    for command in ("show", "total", "budgets", "cap", "close", "verify"):
        assert command in text
    assert "planned" in run("ledger", "total", "--help").output
