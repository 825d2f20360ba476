"""`dptorch train` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.commands import QUICK, refused, run

from dptorch.accounting import Workload
from dptorch.accounting.toeplitz import coefficients_of
from dptorch.cli import train as train_command
from dptorch.plan import PrivacyPlan


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_own_data_from_csv_to_report(data: Path) -> None:
    result = run("train", "--data", "points.csv", *QUICK)
    assert result.exit_code == 0, result.output
    folder = Path("runs/points-1")
    plan = PrivacyPlan.from_json(folder / "plan.json")
    assert plan.noise_multiplier == 2.0
    assert plan.steps == 8
    assert "Report: runs/points-1/report.html" in result.output
    assert f"epsilon {plan.epsilon():.3f}" in result.output
    assert (folder / "report.html").exists()
    assert run("train", "--data", "points.csv", *QUICK).exit_code == 0
    assert Path("runs/points-2").is_dir()


@pytest.mark.slow
def test_epsilon_is_a_budget(data: Path) -> None:
    result = run(
        "train", "--data", "points.csv", "--label", "kind", "--epochs", "2", "--epsilon", "1.5"
    )
    assert result.exit_code == 0, result.output
    assert PrivacyPlan.from_json(Path("runs/points-1/plan.json")).epsilon() <= 1.5


@pytest.mark.slow
def test_style_and_mechanism_are_the_plans(data: Path) -> None:
    own = ("train", "--data", "points.csv", *QUICK, "--model", "mlp")
    result = run(*own, "--clipping-style", "1, 3.*", "--name", "blocks")
    assert result.exit_code == 0, result.output
    plan = PrivacyPlan.from_json(Path("runs/blocks/plan.json"))
    assert plan.clipping_style == "block-wise"
    assert [group.pattern for group in plan.clipping_groups] == ["1", "3.*"]
    result = run(*own, "--mechanism", "discrete_gaussian", "--accountant", "rdp", "--name", "whole")
    assert result.exit_code == 0, result.output
    plan = PrivacyPlan.from_json(Path("runs/whole/plan.json"))
    assert (plan.mechanism, plan.clipping_style) == ("discrete_gaussian", "all-layer")
    statement = Path("runs/whole/statement.txt").read_text()
    assert "discrete" in statement
    sgd = ("--coefficients", "sgd", "--momentum", "0.9")
    result = run(*own, "--mechanism", "banded", "--bands", "2", *sgd, "--name", "bands")
    assert result.exit_code == 0, result.output
    plan = PrivacyPlan.from_json(Path("runs/bands/plan.json"))
    assert (plan.mechanism, plan.sampling, plan.bands) == ("banded", "cyclic-poisson", 2)
    statement = Path("runs/bands/statement.txt").read_text()
    assert "correlated over 2 steps" in statement
    steered = coefficients_of(2, plan.steps, Workload(momentum=0.9)).tolist()
    assert list(plan.coefficients) == steered != coefficients_of(2, plan.steps, Workload()).tolist()


@pytest.mark.slow
def test_an_existing_run_is_kept_unless_told_otherwise(data: Path) -> None:
    command = ("train", "--data", "points.csv", "--name", "one", *QUICK)
    assert run(*command).exit_code == 0
    before = Path("runs/one/plan.json").read_text()
    message = refused(run(*command, "--delta", "1e-6"))
    assert "runs/one exists" in message
    assert Path("runs/one/plan.json").read_text() == before
    assert run(*command, "--delta", "1e-6", "--overwrite").exit_code == 0
    assert PrivacyPlan.from_json(Path("runs/one/plan.json")).target_delta == 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "mnst"), "Did you mean 'mnist'?"),
        (("--data", "nowhere.csv"), "nowhere.csv does not exist"),
        (("--data", "points.csv"), "no column 'label'. Found u, v, kind"),
        (("--data", "points.csv", "--recipe", "mnist"), "exclude each other"),
        (("--data", "points.csv", *QUICK, "--model", "no.such:thing"), "cannot be imported"),
        (("--data", "points.csv", *QUICK, "--bounds", "1"), "expected two numbers"),
        (("--data", "points.csv", *QUICK, "--bounds", "no.json"), "no.json"),
        (("--data", "points.csv", *QUICK, "--clipping-fn", "none"), "Valid: 'abadi'"),
        (("--data", "points.csv", *QUICK, "--clipping-mode", "gost"), "Did you mean 'ghost'?"),
        (("--data", "points.csv", *QUICK, "--clipping-mode", "non-private"), "without privacy"),
        (("--data", "points.csv", *QUICK, "--clipping-style", "layerwise"), "'layer-wise'?"),
        (("--data", "points.csv", *QUICK, "--clipping-style", "hed.*,"), "'hed.*'"),
        (("--data", "points.csv", *QUICK, "--mechanism", "gausian"), "Did you mean 'gaussian'?"),
        (("--data", "points.csv", *QUICK, "--mechanism", "discrete_gaussian"), "These do: rdp"),
        (("--data", "points.csv", *QUICK, "--sample-rate", "2"), "--sample-rate 2.0"),
        (("--data", "points.csv", *QUICK, "--name", "a/b"), "cannot name a run"),
        (("--data", "points.csv", "--label", "kind", "--epsilon", "-1"), "epsilon"),
        (
            ("--data", "points.csv", *QUICK[:4], "--epsilon", "0"),
            "--epsilon 0 asks for a model that",
        ),
        (("--resume",), "--resume needs the --name"),
        (("--resume", "--name", "x"), "not the folder of a run"),
        (("--resume", "--name", "x", "--overwrite"), "exclude each other"),
        (("--resume", "--name", "x", "--lr", "1"), "--learning-rate cannot be changed"),
        (
            ("--resume", "--name", "x", "--clipping-style", "flat"),
            "--clipping-style cannot be changed",
        ),
        (("--resume", "--name", "x", "--mechanism", "gaussian"), "--mechanism cannot be changed"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    data: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert message.replace("expected", "Expected") in refused(
        run("train", *arguments)
    ) or message in refused(run("train", *arguments))
    assert not Path("runs").exists()


def test_a_model_that_mixes_examples_is_refused_with_the_way_out(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("normed.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))\n"
    )
    message = refused(run("train", "--data", "points.csv", *QUICK, "--model", "normed:net"))
    assert "BatchNorm" in message


@pytest.mark.slow
def test_a_large_delta_is_warned_of(data: Path) -> None:
    result = run("train", "--data", "points.csv", *QUICK, "--delta", "0.1")
    assert result.exit_code == 0
    assert "Warning: target_delta=0.1" in result.stderr


@pytest.mark.slow
def test_ranges_by_column(data: Path) -> None:
    Path("ranges.json").write_text('{"u": [0, 1], "v": [0, 2]}')
    result = run("train", "--data", "points.csv", *QUICK, "--bounds", "ranges.json")
    assert result.exit_code == 0, result.output
    Path("ranges.json").write_text('{"u": [0, 1]}')
    message = refused(run("train", "--data", "points.csv", *QUICK, "--bounds", "ranges.json"))
    assert "'v' has no range" in message


@pytest.mark.slow
def test_an_interrupted_run_resumes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from dptorch.cli.progress import EpochLines

    def stepped(self: EpochLines, step: int, train_loss: float) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(EpochLines, "stepped", stepped)
        cut = run("train", "--data", "points.csv", "--name", "cut", *QUICK)
    assert cut.exit_code == 130
    assert "dptorch train --resume --name cut" in cut.output
    assert Path("runs/cut/model.safetensors").exists()
    assert "3 of 8 planned" in Path("runs/cut/statement.txt").read_text()
    resumed = run("train", "--resume", "--name", "cut")
    assert resumed.exit_code == 0, resumed.output
    assert "8 of 8 planned" in Path("runs/cut/statement.txt").read_text()
    assert "that run is complete" in refused(run("train", "--resume", "--name", "cut"))


@pytest.mark.slow
def test_a_resumed_run_keeps_its_style_and_may_change_its_mode(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json
    import signal

    from dptorch.cli.progress import EpochLines

    def stepped(self: EpochLines, step: int, train_loss: float) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    own = ("train", "--data", "points.csv", *QUICK, "--model", "mlp")
    with monkeypatch.context() as patch:
        patch.setattr(EpochLines, "stepped", stepped)
        run(*own, "--name", "cut", "--clipping-style", "layer-wise", "--clipping-mode", "BK-MixOpt")
    record = Path("runs/cut/run.json")
    assert json.loads(record.read_text())["job"]["clipping_mode"] == "BK-MixOpt"
    resumed = run("train", "--resume", "--name", "cut", "--clipping-mode", "non-ghost")
    assert resumed.exit_code == 0, resumed.output
    job = json.loads(record.read_text())["job"]
    assert (job["clipping_mode"], job["clipping_style"]) == ("non-ghost", "layer-wise")
    assert PrivacyPlan.from_json(Path("runs/cut/plan.json")).clipping_style == "layer-wise"
    assert "8 of 8 planned" in Path("runs/cut/statement.txt").read_text()


@pytest.mark.slow
def test_a_run_whose_recorded_style_was_changed_is_not_resumed(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    from dptorch.cli.progress import EpochLines

    def stepped(self: EpochLines, step: int, train_loss: float) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(EpochLines, "stepped", stepped)
        run("train", "--data", "points.csv", *QUICK, "--name", "cut")
    record = Path("runs/cut/run.json")
    record.write_text(record.read_text().replace('"all-layer"', '"layer-wise"', 1))
    assert "another plan" in refused(run("train", "--resume", "--name", "cut"))


def test_help_teaches() -> None:
    text = run("train", "--help").output
    for phrase in (
        "dptorch train --recipe mnist-features --epsilon 1",
        "Privacy",
        "mnist: 0.25, mnist-features: 0.25",
        "mnist: 3.0, mnist-features: 20.0",
        "--resume",
    ):
        assert phrase in text


@pytest.mark.slow
def test_the_bar_of_a_terminal_takes_what_a_run_tells(data: Path) -> None:
    from rich.console import Console

    from dptorch.cli.progress import ProgressBar, observer_for
    from dptorch.training import run_folder
    from dptorch.training.data import ReadOptions
    from dptorch.training.job import Job, prepare
    from dptorch.training.loop import train

    console = Console(force_terminal=True, width=120, record=True)
    job = Job(data="points.csv", reading=ReadOptions("kind"), epochs=2, noise_multiplier=2.0)
    with observer_for(console) as observer:
        assert isinstance(observer, ProgressBar)
        train(prepare(job), run_folder.create(Path("runs"), "bar"), observer=observer)
    shown = console.export_text()
    assert "step 8/8" in shown
    assert "(not private)" in shown


def test_every_option_has_help() -> None:
    import inspect

    for name, parameter in inspect.signature(train_command.train, eval_str=True).parameters.items():
        if name != "ctx":
            assert parameter.annotation.__metadata__[0].help, name
