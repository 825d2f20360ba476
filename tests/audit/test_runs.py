"""Canaries that a run plants, the audit of that run, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from dptorch.accounting import Adjacency
from dptorch.audit import audit
from dptorch.cli.app import app
from dptorch.errors import ConfigurationError, DataError
from dptorch.noise import GaussianNoise
from dptorch.randomness import RootKey
from dptorch.training import run_folder
from dptorch.training.canaries import CANARY_FILE, Canaries, make_canaries, plant
from dptorch.training.data import Examples, TrainTest
from dptorch.training.job import Job, prepare
from dptorch.training.loop import train
from dptorch.training.readers import load_data


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 400)
    x = (rng.normal(size=(400, 30)) + 2.0 * rng.normal(size=(10, 30))[y]).astype(np.float32)
    np.savez(tmp_path / "blobs.npz", x=x[:240], y=y[:240], x_test=x[240:], y_test=y[240:])
    return tmp_path / "blobs.npz"


def job_on(blobs: Path, **changes: object) -> Job:
    job = Job(
        data=str(blobs),
        model="linear",
        epochs=4,
        sample_rate=0.25,
        target_epsilon=2.0,
        canaries=100,
    )
    return replace(job, **changes)


def trained(job: Job, folder: Path) -> Path:
    run = run_folder.create(folder, "small", overwrite=True)
    train(prepare(job), run)
    return run.path


def test_canaries_are_coins_and_no_copies(blobs: Path) -> None:
    data = load_data(blobs)
    canaries = make_canaries(data, 1000, RootKey.from_seed(1))
    # A fair coin leaves this range once in 10^6 runs.
    assert abs(int(canaries.member.sum()) - 500) < 4.9 * 1000**0.5 / 2
    assert set(canaries.labels.tolist()) == set(range(10))
    real = {x.numpy().tobytes() for x, _ in (*data.train, *data.test)}
    assert not real & {x.numpy().tobytes() for x in canaries.inputs}
    # Every value is one of the test set's in that place; none depends on a training example.
    test = np.stack([x.numpy() for x, _ in data.test])
    assert all(np.isin(canaries.inputs[:, j], test[:, j]).all() for j in range(30))
    other = replace(data, train=Examples(torch.zeros(3, 30), torch.zeros(3).long()))
    again = make_canaries(other, 1000, RootKey.from_seed(1))
    assert torch.equal(again.inputs, canaries.inputs)
    assert torch.equal(again.member, canaries.member)
    planted = plant(data, canaries)
    assert planted.sizes == (240 + int(canaries.member.sum()), 160)
    inside = next(iter(DataLoader(planted.train, batch_size=2000)))[0][240:]
    assert torch.equal(inside, canaries.inputs[canaries.member])


def test_the_plan_does_not_tell_how_many_are_in(blobs: Path) -> None:
    plans = [prepare(job_on(blobs, seed=s)).engine.plan for s in (1, 2, 3)]
    assert plans[0] == plans[1] == plans[2]
    assert plans[0].sample_size is None
    assert plans[0].adjacency is Adjacency.ZERO_OUT
    assert plans[0].expected_batch_size == 0.25 * (240 + 50)
    assert plans[0].epsilon() <= 2.0


@pytest.mark.slow
def test_a_private_run_is_not_refuted_and_a_run_that_lies_is(blobs: Path, tmp_path: Path) -> None:
    path = trained(job_on(blobs, seed=4, model="mlp", canaries=400), tmp_path / "runs")
    result = audit(path)
    assert result.verdict == "NOT REFUTED"
    assert result.canaries == 400
    # How many canaries are in is nowhere in what the run says of itself.
    assert json.loads((path / "run.json").read_text())["data"]["train_examples"] == 240
    assert result.steps == 16
    assert 1.9 < result.claimed_epsilon <= 2.0
    assert "black box" in result.adversary
    assert any("seed" in note for note in result.notes)
    # The same folder with a model that was trained without privacy on the same data.
    canaries = Canaries.read(path / CANARY_FILE)
    x, y = next(iter(DataLoader(plant(load_data(blobs), canaries).train, batch_size=2000)))
    model = run_folder.load_model(path).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    run_folder.RunFolder(path).write_model(model, {"format": "pt"})
    broken = audit(path)
    assert broken.verdict == "REFUTED"
    assert broken.epsilon_lower > 2.0


@pytest.mark.slow
def test_resume_goes_on_with_the_same_canaries(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run_folder.create(tmp_path / "runs", "cut")
    setup = prepare(job_on(blobs))

    class Stop:
        def started(self, *_: object) -> None: ...
        def tested(self, *_: object) -> None: ...
        def stepped(self, step: int, loss: float) -> None:
            if step == 6:
                import signal

                signal.raise_signal(signal.SIGINT)

    outcome = train(setup, folder, observer=Stop())
    assert outcome.interrupted
    before = Canaries.read(folder.path / CANARY_FILE)
    result = CliRunner().invoke(app, ["train", "--resume", "--name", "cut"])
    assert result.exit_code == 0, result.output
    after = Canaries.read(folder.path / CANARY_FILE)
    assert torch.equal(before.member, after.member)
    assert audit(folder.path).steps == 16


@pytest.mark.slow
def test_the_command(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    invoke = lambda *a: CliRunner().invoke(app, list(a))
    # Seeds, since one in twenty honest runs may be refuted at this confidence.
    seeded = ("train", "--epochs", "2", "--epsilon", "2", "--seed", "5")
    quick = (*seeded, "--data", str(blobs), "--name")
    assert invoke(*quick, "one", "--canaries", "60").exit_code == 0
    assert invoke(*quick, "none").exit_code == 0
    result = invoke("audit", "runs/one")
    assert result.exit_code == 0, result.output
    assert "NOT REFUTED at confidence 95 %" in result.output
    assert "audit.html" in result.output
    values = json.loads(Path("runs/one/audit.json").read_text())
    assert values["canaries"] == 60
    assert values["verdict"] == "NOT REFUTED"
    assert Path("runs/one/audit.txt").read_text().startswith("NOT REFUTED")
    # Without canaries, the plan is audited.
    white = invoke(
        "audit", "runs/none", "--canaries", "200", "--seed", "1", "--json", "--out", "elsewhere"
    )
    assert "white box" in json.loads(white.output)["adversary"]
    assert Path("elsewhere/audit.json").exists()
    plan = invoke("audit", "runs/one/plan.json", "--canaries", "200", "--seed", "1", "--steps", "3")
    assert plan.exit_code == 0, plan.output
    assert "first 3 of 8 steps" in plan.output
    # Noise that is not added: exit code 1.
    plain = GaussianNoise.privatize

    def privatize(self: GaussianNoise, *arguments: object, **more: object) -> object:
        self.noise_multiplier = 0.0
        return plain(self, *arguments, **more)

    monkeypatch.setattr(GaussianNoise, "privatize", privatize)
    refuted = invoke("audit", "runs/one/plan.json", "--canaries", "200", "--seed", "1", "--json")
    assert refuted.exit_code == 1
    assert json.loads(refuted.output)["verdict"] == "REFUTED"
    for arguments, message in [
        (("audit", "runs/none", "--adversary", "black-box"), "planted no canaries"),
        (("audit", "runs/nothing"), "does not exist"),
        (("audit", "runs/one", "--adversary", "black-bx"), "Did you mean"),
        (("audit", "runs/one/plan.json", "--adversary", "black-box"), "a plan has none"),
        ((*quick, "two", "--canaries", "19"), "at least 20"),
    ]:
        failed = invoke(*arguments)
        assert failed.exit_code == 2
        assert message in failed.stderr
    assert not Path("runs/two").exists()


@pytest.mark.slow
def test_damaged_files(blobs: Path, tmp_path: Path) -> None:
    path = trained(job_on(blobs), tmp_path / "runs")
    (path / CANARY_FILE).write_bytes(b"not an archive")
    with pytest.raises(DataError, match="canaries"):
        audit(path)
    data = load_data(blobs)
    canaries = make_canaries(data, 40, RootKey.from_seed(0))
    wrong = TrainTest(data.train, data.test, data.classes, (7,), "")
    with pytest.raises(DataError, match="another run"):
        plant(wrong, canaries)
    with pytest.raises(ConfigurationError, match="share a model"):
        audit(path, bound="clopper-pearson")
    with pytest.raises(ConfigurationError, match="adversary"):
        audit(path, adversary="nobody")
