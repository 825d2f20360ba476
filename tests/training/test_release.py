"""A release holds what the guarantee covers and nothing else."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dptorch.cli.app import app
from dptorch.errors import ConfigurationError, DataError
from dptorch.training import load_model, run_folder
from dptorch.training.job import Job, prepare
from dptorch.training.loop import Silent, train
from dptorch.training.release import COLUMNS, TEST_COLUMNS, release
from dptorch.training.run_folder import NOT_PRIVATE, RunFolder

FILES = {
    "model.safetensors",
    "plan.json",
    "statement.txt",
    "statement.json",
    "metrics.csv",
    "run.json",
    "report.html",
}


class Listen(Silent):
    """Every exact number that the run computed from private data."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def stepped(self, step: int, train_loss: float) -> None:
        self.losses.append(train_loss)


@pytest.fixture
def private_run(job: Job, tmp_path: Path) -> tuple[RunFolder, list[float]]:
    listener = Listen()
    folder = run_folder.create(tmp_path / "runs", "small")
    train(prepare(replace(job, seed=None)), folder, observer=listener)
    # The clock's own numbers may be those of anything: these are no other's.
    timed = [{**row, "seconds": 71934.8211 + i} for i, row in enumerate(folder.read_metrics())]
    folder.write_metrics(timed)
    return folder, listener.losses


def private_values(folder: RunFolder, losses: list[float]) -> dict[str, str]:
    """Text of each private number -> where it comes from. Four digits on, none by accident."""
    found = {f"{loss:.4f}": "loss of a step" for loss in losses}
    for row in folder.read_metrics():
        for name, value in row.items():
            if name not in COLUMNS:
                found[f"{value:.4f}"] = name
                found[repr(value)] = name
    return {k: v for k, v in found.items() if float(k) not in (0.0, 1.0) and len(k) > 5}


def leaks(folder: Path, values: dict[str, str]) -> set[str]:
    """Names of the private values whose digits are in any file of the folder."""
    content = "\n".join(p.read_bytes().decode("latin1") for p in folder.iterdir())
    return {name for text, name in values.items() if text in content}


@pytest.mark.slow
def test_no_private_value_is_in_a_release(
    private_run: tuple[RunFolder, list[float]], tmp_path: Path
) -> None:
    folder, losses = private_run
    values = private_values(folder, losses)
    names = set(values.values())
    assert {"loss of a step", "test_accuracy", "seconds"} <= names
    assert {n for n in names if n.startswith(NOT_PRIVATE)} == {
        f"{NOT_PRIVATE}{n}"
        for n in ("train_loss", "mean_gradient_norm", "clipped_fraction", "mean_batch_size")
    }
    made = release(folder, tmp_path / "out")
    assert {p.name for p in made.path.iterdir()} == FILES
    assert leaks(made.path, values) == set()
    # Negative control: the run folder itself is full of them.
    assert leaks(folder.path, values) >= {"test_accuracy", f"{NOT_PRIVATE}train_loss"}
    assert (made.path / "report.html").read_text().count("data:image") == 1, "only that of epsilon"
    everything = "\n".join(p.read_bytes().decode("latin1") for p in made.path.iterdir())
    assert NOT_PRIVATE not in everything
    assert str(tmp_path) not in everything, "paths tell of the machine and the data"


@pytest.mark.slow
def test_test_results_are_kept_on_request(
    private_run: tuple[RunFolder, list[float]], tmp_path: Path
) -> None:
    folder, losses = private_run
    made = release(folder, tmp_path / "out", with_test_results=True)
    kept = set(made.read_metrics()[0])
    assert kept == {*COLUMNS, "test_accuracy", "test_loss"} <= {*COLUMNS, *TEST_COLUMNS}
    shown = (
        made.path / "metrics.csv"
    ).read_text()  # four digits of a loss may be a test loss's too
    hidden = {
        text: name
        for text, name in private_values(folder, losses).items()
        if name not in TEST_COLUMNS and text not in shown
    }
    assert {f"{NOT_PRIVATE}train_loss", "seconds"} <= set(hidden.values())
    assert leaks(made.path, hidden) == set()
    assert "Test accuracy" in (made.path / "report.html").read_text()


@pytest.mark.slow
def test_what_a_later_version_adds_stays_in_the_run(
    private_run: tuple[RunFolder, list[float]], tmp_path: Path
) -> None:
    folder, _ = private_run
    about = folder.read_json("run.json")
    secret: dict[str, Any] = {"new": "secret-7391"}
    for part in (about, about["job"], about["data"], about["result"]):
        part.update(secret)
    folder.write_json("run.json", about)
    rows = [{**row, "new": 7391.0} for row in folder.read_metrics()]
    folder.write_metrics(rows)
    folder.write("notes.txt", "secret-7391")
    folder.checkpoint.write_bytes(b"secret-7391")
    made = release(folder, tmp_path / "out")
    assert leaks(made.path, {"7391": "added"}) == set()


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_a_release_can_be_used(private_run: tuple[RunFolder, list[float]], tmp_path: Path) -> None:
    folder, _ = private_run
    made = release(folder, tmp_path / "out")
    x = torch.randn(5, 4)
    assert torch.equal(load_model(made.path)(x), load_model(folder.path)(x))
    assert (made.path / "plan.json").read_text() == (folder.path / "plan.json").read_text()
    claims = made.read_json("run.json")["statement"]
    assert claims == folder.read_json("run.json")["statement"]
    with (made.path / "metrics.csv").open() as file:
        assert next(csv.reader(file)) == list(COLUMNS)
    page = (made.path / "report.html").read_text()
    assert "Privacy statement" in page
    assert "Test accuracy" not in page.split("Privacy statement")[0]
    assert 'dptorch.load("out")' in page.replace("&#34;", '"')


@pytest.mark.slow
def test_destinations_with_other_files_are_refused(finished: RunFolder, tmp_path: Path) -> None:
    taken = tmp_path / "thesis"
    taken.mkdir()
    (taken / "final.tex").write_text("years")
    with pytest.raises(ConfigurationError, match="not an empty folder"):
        release(finished, taken)
    assert [p.name for p in taken.iterdir()] == ["final.tex"]


@pytest.mark.slow
def test_a_run_without_a_statement_is_refused(finished: RunFolder, tmp_path: Path) -> None:
    about = finished.read_json("run.json")
    finished.write_json("run.json", {k: v for k, v in about.items() if k != "statement"})
    with pytest.raises(DataError, match="--resume --name small"):
        release(finished, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_without_privacy_is_refused(finished: RunFolder, tmp_path: Path) -> None:
    about = finished.read_json("run.json")
    without = {**about, "statement": {**about["statement"], "epsilon": math.inf}}
    finished.write_json("run.json", without)
    with pytest.raises(DataError, match="epsilon=infinity, so nothing protects"):
        release(finished, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_release_that_fails_leaves_nothing(finished: RunFolder, tmp_path: Path) -> None:
    (finished.path / "plan.json").unlink()
    with pytest.raises(DataError, match="could not be written"):
        release(finished, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".release-*"))


@pytest.mark.slow
def test_the_commands(blobs: Path, tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    arguments = ["--data", str(blobs), "--model", "linear", "--epochs", "1", "--sample-rate", "0.5"]
    arguments += ["--noise-multiplier", "2", "--runs", str(runs), "--name", "a"]
    done = CliRunner().invoke(app, ["train", *arguments, "--release", str(out)])
    assert done.exit_code == 0, done.output
    assert f"Released to {out}" in done.output
    assert {p.name for p in out.iterdir()} == FILES
    again = CliRunner().invoke(app, ["release", str(runs / "a"), str(out)])
    assert again.exit_code == 2
    assert "not an empty folder" in again.output
    second = CliRunner().invoke(
        app, ["release", str(runs / "a"), str(tmp_path / "b"), "--with-test-results"]
    )
    assert second.exit_code == 0, second.output
    assert "test_accuracy" in json.loads((tmp_path / "b" / "run.json").read_text())["result"]
