"""A run from beginning to end, interrupted, resumed."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.distributed.processes import on_ranks

from dptorch.distributed import Ranks
from dptorch.errors import ConfigurationError, DataError
from dptorch.plan import PrivacyPlan
from dptorch.training import load_model, run_folder
from dptorch.training.job import Job, Setup, prepare
from dptorch.training.loop import Silent, StopOnSignal, train
from dptorch.training.run_folder import NOT_PRIVATE, RunFolder
from dptorch.training.task import evaluate


class InterruptAt(Silent):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, step: int, train_loss: float) -> None:
        if step == self.step:
            signal.raise_signal(signal.SIGINT)


class Record(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rows: list[Mapping[str, Any]] = []

    def stepped(self, step: int, train_loss: float) -> None:
        self.steps.append(step)

    def tested(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)


def weights(folder: RunFolder) -> list[torch.Tensor]:
    return list(load_model(folder.path).state_dict().values())


@pytest.mark.slow
def test_a_run_writes_everything(job: Job, tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path / "runs", "small")
    record = Record()
    outcome = train(prepare(job), folder, observer=record)
    assert not outcome.interrupted
    assert {p.name for p in folder.path.iterdir()} == {
        "model.safetensors",
        "plan.json",
        "statement.txt",
        "statement.json",
        "metrics.csv",
        "report.html",
        "run.json",
    }
    assert record.steps == list(range(1, 17))
    rows = folder.read_metrics()
    assert [row["step"] for row in rows] == [0, 4, 8, 12, 16]
    assert rows[-1]["test_accuracy"] > 0.9
    plan = PrivacyPlan.from_json(folder.path / "plan.json")
    assert [row["epsilon"] for row in rows[1:]] == [plan.epsilon(s) for s in (4, 8, 12, 16)]
    assert "16 of 16 planned" in (folder.path / "statement.txt").read_text()


@pytest.mark.slow
def test_the_mean_of_the_last_steps_is_the_result(job: Job, tmp_path: Path) -> None:
    setup = prepare(replace(job, epochs=1, tail=0.5))
    passed: list[torch.Tensor] = []
    setup.optimizer.register_step_post_hook(
        lambda *_: passed.append(next(setup.model.parameters()).detach().clone())
    )
    folder = run_folder.create(tmp_path / "runs", "mean")
    train(setup, folder)
    mean = torch.stack(passed[2:]).mean(0)
    assert len(passed) == 4
    assert torch.allclose(weights(folder)[0], mean, atol=1e-6)
    assert not torch.allclose(passed[-1], mean, atol=1e-6)


@pytest.mark.slow
def test_what_comes_from_private_data_says_so(finished: RunFolder) -> None:
    columns = set(finished.read_metrics()[-1])
    public = {"epoch", "step", "epsilon", "delta", "test_accuracy", "test_loss", "seconds"}
    assert public < columns
    assert all(column.startswith(NOT_PRIVATE) for column in columns - public)
    result = finished.read_json("run.json")["result"]
    assert not [key for key in result if key.startswith(NOT_PRIVATE)]


@pytest.mark.slow
def test_diagnostics_can_be_left_out(job: Job, tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path / "runs", "quiet")
    train(prepare(replace(job, diagnostics=False)), folder)
    assert NOT_PRIVATE not in (folder.path / "metrics.csv").read_text()
    assert "Not private: diagnostics" not in (folder.path / "report.html").read_text()


@pytest.mark.slow
def test_an_interrupted_run_is_usable_and_resumes_to_the_same_end(
    job: Job, finished: RunFolder, tmp_path: Path
) -> None:
    folder = run_folder.create(tmp_path / "runs", "cut")
    outcome = train(prepare(job), folder, observer=InterruptAt(step=6))
    assert outcome.interrupted
    assert outcome.last["step"] == 6
    statement = (folder.path / "statement.txt").read_text()
    plan = PrivacyPlan.from_json(folder.path / "plan.json")
    assert "6 of 16 planned" in statement
    assert outcome.last["epsilon"] == plan.epsilon(6)
    assert "was interrupted" in (folder.path / "report.html").read_text()
    assert len(weights(folder)) == 2

    resumed = train(prepare(job), folder, resume=True)
    assert not resumed.interrupted
    assert not folder.checkpoint.exists()
    assert [row["step"] for row in folder.read_metrics()] == [0, 4, 6, 8, 12, 16]
    assert resumed.last["epsilon"] == plan.epsilon(16)
    for mine, uninterrupted in zip(weights(folder), weights(finished), strict=True):
        torch.testing.assert_close(mine, uninterrupted)


@pytest.mark.slow
def test_a_run_that_died_resumes_from_its_last_epoch(job: Job, tmp_path: Path) -> None:
    class Die(Silent):
        def stepped(self, step: int, train_loss: float) -> None:
            if step == 6:
                raise OSError("power cut")

    folder = run_folder.create(tmp_path / "runs", "dead")
    with pytest.raises(OSError, match="power cut"):
        train(prepare(job), folder, observer=Die())
    record = Record()
    outcome = train(prepare(job), folder, observer=record, resume=True)
    assert record.steps == list(range(5, 17))
    assert outcome.last["step"] == 16


@pytest.mark.slow
def test_a_complete_run_cannot_be_resumed(job: Job, finished: RunFolder) -> None:
    with pytest.raises(DataError, match="that run is complete"):
        train(prepare(job), finished, resume=True)


@pytest.mark.slow
def test_other_data_cannot_be_resumed_on(job: Job, blobs: Path, tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path / "runs", "cut")
    train(prepare(job), folder, observer=InterruptAt(step=2))
    with np.load(blobs) as arrays:
        fewer = {name: array[:-1] for name, array in arrays.items()}
    np.savez(blobs, **fewer)
    with pytest.raises(DataError, match="data has changed"):
        train(prepare(job), folder, resume=True)


@pytest.mark.slow
def test_another_plan_cannot_be_resumed(job: Job, tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path / "runs", "cut")
    train(prepare(job), folder, observer=InterruptAt(step=2))
    with pytest.raises(ConfigurationError, match="noise_multiplier"):
        train(prepare(replace(job, noise_multiplier=0.5)), folder, resume=True)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_signal_is_not_held_back() -> None:
    with StopOnSignal(Ranks.alone()) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_physical_batches_do_not_change_the_result(
    job: Job, finished: RunFolder, tmp_path: Path
) -> None:
    folder = run_folder.create(tmp_path / "runs", "parts")
    train(prepare(replace(job, max_physical_batch_size=7)), folder)
    for mine, whole in zip(weights(folder), weights(finished), strict=True):
        torch.testing.assert_close(mine, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_noise_is_really_there(job: Job, finished: RunFolder, tmp_path: Path) -> None:
    """Two seeds end apart by as much as the noise of 16 steps, not by rounding."""
    folder = run_folder.create(tmp_path / "runs", "other")
    train(prepare(replace(job, seed=4)), folder)
    distance = max(
        float((a - b).abs().max()) for a, b in zip(weights(folder), weights(finished), strict=True)
    )
    assert distance > 0.05


def test_evaluation_is_exact_and_leaves_the_mode(job: Job) -> None:
    setup = prepare(job)
    setup.model.train()
    accuracy, loss = evaluate(setup.model, setup.data.test, setup.device)
    assert setup.model.training
    labels = [setup.data.test[i][1] for i in range(60)]
    assert accuracy == labels.count(0) / 60  # the linear model starts at zero and says class 0
    assert loss == pytest.approx(np.log(2), rel=1e-6)


def test_what_was_left_open_is_decided(job: Job) -> None:
    setup: Setup = prepare(replace(job, noise_multiplier=None, batch_size=60, sample_rate=None))
    assert setup.job.target_epsilon == 3.0
    assert setup.job.sample_rate == 0.25
    assert setup.job.clipping_fn == "abadi"
    assert setup.engine.plan.epsilon() <= 3.0
    assert Job.from_dict(setup.job.to_dict()) == setup.job


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "mnist"}, "exclude each other: the recipe brings its own data"),
        ({"target_epsilon": 1.0}, "--epsilon 1.0 and --noise-multiplier 2.0 exclude each other"),
        ({"batch_size": 8}, "--batch-size 8 and --sample-rate 0.25 exclude each other"),
        ({"sample_rate": 1.5}, r"sample_rate=1.5 must be in \(0, 1\]"),
        ({"sample_rate": None, "batch_size": 1000}, "between 1 and the 240 training examples"),
        ({"epochs": 0}, "epochs=0: expected a positive number"),
        ({"learning_rate": -1}, "learning_rate=-1"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"tail": 1.5}, r"tail=1\.5: expected a share"),
        ({"clipping_fn": "abbadi"}, "'abadi'"),
        ({"accountant": "pdl"}, "'pld'"),
        ({"sampling": "shufled"}, "'shuffled'"),
        ({"device": "no-such-device"}, "--device no-such-device cannot be used"),
    ],
)
def test_impossible_jobs_are_refused(job: Job, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        prepare(replace(job, **change))


def test_the_sampling_of_a_job_is_its_plans(job: Job) -> None:
    plan = prepare(replace(job, sampling="truncated-poisson")).engine.plan
    assert plan.sampling == "truncated-poisson"
    assert plan.capacity is not None
    assert plan.capacity > plan.expected_batch_size


def test_a_job_of_another_version_is_refused() -> None:
    with pytest.raises(DataError, match="unknown setting 'flux'"):
        Job.from_dict({"flux": 1})


@pytest.mark.slow
def test_a_run_that_two_ranks_interrupt_goes_on_on_one(
    job: Job, finished: RunFolder, tmp_path: Path
) -> None:
    """Only the first rank is told to stop, and writes; both stop at the same step."""
    folder = run_folder.create(tmp_path / "runs", "two")

    def work(rank: int) -> tuple[bool, int]:
        setup = prepare(job)
        outcome = train(setup, folder, observer=InterruptAt(step=6))
        return outcome.interrupted, setup.engine.steps_done

    assert on_ranks(2, work) == [(True, 6)] * 2
    assert "6 of 16 planned" in (folder.path / "statement.txt").read_text()
    resumed = train(prepare(job), folder, resume=True)
    assert not resumed.interrupted
    for mine, alone in zip(weights(folder), weights(finished), strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-5, atol=1e-6)
    sizes = [row[f"{NOT_PRIVATE}mean_batch_size"] for row in folder.read_metrics()[1:]]
    alone_sizes = [row[f"{NOT_PRIVATE}mean_batch_size"] for row in finished.read_metrics()[1:]]
    assert sizes[0] == alone_sizes[0]  # an epoch on two ranks: the examples of both
