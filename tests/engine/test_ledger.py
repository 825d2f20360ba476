"""The engine and its ledger: what is written down is what was released, and before it was."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dptorch
from dptorch.accounting import Adjacency, SampledGaussian
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import BudgetExhausted, ConfigurationError, LedgerError, PrivacyWarning
from dptorch.ledger import Cap, DatasetLedger, RunLedger, open_ledger
from dptorch.noise import GaussianNoise
from tests.engine.setup import SIZE, make_data, make_model, parameters, train

SETTINGS: dict[str, Any] = {
    "sample_rate": 0.25,
    "sample_size": SIZE,
    "steps": 8,
    "noise_multiplier": 2.0,
    "target_delta": 1e-3,
    "accountant": "exact",
}


@pytest.fixture
def patients(tmp_path: Path) -> DatasetLedger:
    return open_ledger(tmp_path / "ledger.db").dataset("data")


def make(patients: DatasetLedger | None, **changes: Any) -> tuple[PrivacyEngine, Any]:
    model = make_model()
    engine = dptorch.PrivacyEngine(model, ledger=patients, **SETTINGS | changes)
    return engine, engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_every_step_is_on_disk_before_its_noise_is_drawn(
    patients: DatasetLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    privatize, seen = GaussianNoise.privatize, []

    def spy(self: GaussianNoise, clipped: Any, key: Any, step: int, **kwargs: Any) -> Any:
        seen.append((step, patients.runs()[0].steps))
        return privatize(self, clipped, key, step, **kwargs)

    monkeypatch.setattr(GaussianNoise, "privatize", spy)
    engine, optimizer = make(patients)
    loader = engine.loader(make_data())
    for _ in range(2):
        train(engine.model, optimizer, loader)
    assert seen == [(step, step + 1) for step in range(8)]
    (run,) = patients.runs()
    assert run.history == [engine.plan.event(8)]
    assert engine.statement().ledger == {"run": run.run, "dataset": "data"}
    assert engine.ledger_run is not None
    assert engine.ledger_run["head"] == patients.ledger.head()


def test_a_ledger_changes_nothing_in_the_training(patients: DatasetLedger) -> None:
    results = []
    for ledger in (None, patients):
        engine, optimizer = make(ledger, seed=3)
        results.append(train(engine.model, optimizer, engine.loader(make_data())))
    assert torch.equal(*results)


def test_batches_of_another_loader_are_written_down_without_amplification(
    patients: DatasetLedger,
) -> None:
    engine, optimizer = make(patients)
    x, y = make_data().tensors
    train(engine.model, optimizer, engine.loader(make_data()))
    F.cross_entropy(engine.model(x), y).backward()
    with pytest.warns(PrivacyWarning, match="without amplification"):
        optimizer.step()
    (run,) = patients.runs()
    assert run.history == [engine.plan.event(4), SampledGaussian(2.0, 1.0, 1)]


def test_a_dear_step_that_does_not_fit_under_the_cap_is_not_taken(patients: DatasetLedger) -> None:
    """The plan fits, a step without amplification does not: refused before it is released."""
    engine, optimizer = make(patients)
    patients.set_cap(Cap(engine.plan.epsilon() * 1.05, 1e-3, engine.plan.adjacency))
    train(engine.model, optimizer, engine.loader(make_data()))
    before = [p.detach().clone() for p in engine.model.parameters()]
    x, y = make_data().tensors
    F.cross_entropy(engine.model(x), y).backward()
    with pytest.raises(BudgetExhausted, match="Nothing was spent"):
        optimizer.step()
    assert engine.steps_done == patients.runs()[0].steps == 4
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))


def own_step(engine: PrivacyEngine, optimizer: Any) -> None:
    x, y = make_data().tensors
    F.cross_entropy(engine.model(x[:4]), y[:4]).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:a batch did not come:dptorch.errors.PrivacyWarning")
def test_own_loader_steps_of_a_checkpoint_come_to_the_ledger_without_amplification(
    patients: DatasetLedger, tmp_path: Path
) -> None:
    engine, optimizer = make(None)
    for _ in range(4):
        own_step(engine, optimizer)
    engine.save_checkpoint(tmp_path / "run.pt")
    resumed, _ = make(patients)
    resumed.load_checkpoint(tmp_path / "run.pt")
    patients.set_cap(Cap(resumed.plan.epsilon() * 1.05, 1e-3))
    with pytest.raises(BudgetExhausted, match="Nothing was spent"):
        resumed.loader(make_data())
    assert patients.runs() == []
    patients.set_cap(None)
    resumed.loader(make_data())
    (run,) = patients.runs()
    assert run.history == [SampledGaussian(2.0, 1.0, 4)]
    total = patients.total()
    assert total.planned == pytest.approx(resumed.get_privacy_spent().epsilon, rel=1e-3)


def test_under_add_remove_a_step_of_the_users_own_loader_is_refused(
    patients: DatasetLedger,
) -> None:
    patients.set_cap(Cap(100.0, 1e-3, "add-remove"))
    engine, optimizer = make(patients)
    train(engine.model, optimizer, engine.loader(make_data()))
    with pytest.raises(ConfigurationError, match=r"own loader is not covered.*'zero-out'"):
        own_step(engine, optimizer)
    assert engine.steps_done == patients.runs()[0].steps == 4
    patients.set_cap(Cap(100.0, 1e-3))
    with pytest.warns(PrivacyWarning, match="without amplification"):
        own_step(engine, optimizer)
    assert patients.runs()[0].adjacencies == (Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE)
    with pytest.raises(ConfigurationError, match="add-remove"):
        patients.total(adjacency="add-remove")
    assert patients.total().adjacency is Adjacency.ZERO_OUT


def test_a_plan_above_the_cap_is_refused_before_the_first_step(patients: DatasetLedger) -> None:
    patients.set_cap(Cap(0.1, 1e-3))
    engine, _ = make(patients)
    with pytest.raises(BudgetExhausted, match=r"cap is epsilon=0\.1"):
        engine.loader(make_data())
    assert patients.runs() == []


def test_resuming_counts_what_the_checkpoint_does_not_know(
    patients: DatasetLedger, tmp_path: Path
) -> None:
    engine, optimizer = make(patients)
    loader = engine.loader(make_data())
    train(engine.model, optimizer, loader)
    engine.save_checkpoint(tmp_path / "run.pt")
    train(engine.model, optimizer, loader)  # four more steps
    resumed, optimizer = make(patients)
    with pytest.warns(PrivacyWarning, match="4 steps were released after this checkpoint"):
        resumed.load_checkpoint(tmp_path / "run.pt")
    at_once = resumed.get_privacy_spent().epsilon
    assert at_once == pytest.approx(engine.get_privacy_spent().epsilon)
    train(resumed.model, optimizer, resumed.loader(make_data()))
    statement = resumed.statement()
    assert (statement.steps, statement.repeated) == (8, 4)
    assert statement.epsilon > engine.statement().epsilon
    assert "4 repeated after a kill" in str(statement)
    assert statement.epsilon_unamplified > engine.statement().epsilon_unamplified


@pytest.mark.parametrize("leased", [True, False])
@pytest.mark.parametrize("paused", [True, False])
def test_an_engine_whose_run_another_has_gone_on_with_draws_no_noise(
    patients: DatasetLedger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    paused: bool,
    leased: bool,
) -> None:
    """The broken twin has no lease: four more steps are released, and one states less."""
    drawn, privatize = [], GaussianNoise.privatize
    if not leased:
        monkeypatch.setattr(RunLedger, "_refuse_unless_owned", lambda self, transaction: None)

    def spy(self: GaussianNoise, *given: Any, **more: Any) -> Any:
        drawn.append(given)
        return privatize(self, *given, **more)

    monkeypatch.setattr(GaussianNoise, "privatize", spy)
    engine, optimizer = make(patients)
    loader = engine.loader(make_data())
    train(engine.model, optimizer, loader)
    engine.save_checkpoint(tmp_path / "run.pt")
    if paused:
        engine.release_budget()
    resumed, its_optimizer = make(patients)
    resumed.load_checkpoint(tmp_path / "run.pt")
    train(resumed.model, its_optimizer, resumed.loader(make_data()))
    before = parameters(engine.model)
    with pytest.raises(LedgerError, match="another process") if leased else nullcontext():
        train(engine.model, optimizer, loader)
    assert (len(drawn), engine.steps_done) == ((8, 4) if leased else (12, 8))
    assert torch.equal(parameters(engine.model), before) is leased
    stated = resumed.get_privacy_spent().epsilon
    assert (patients.total().planned <= stated * 1.001) is leased


def test_going_on_without_the_ledger_warns(patients: DatasetLedger, tmp_path: Path) -> None:
    engine, _ = make(patients)
    engine.loader(make_data())
    engine.save_checkpoint(tmp_path / "run.pt")
    without, _ = make(None)
    with pytest.warns(PrivacyWarning, match="goes on without it"):
        without.load_checkpoint(tmp_path / "run.pt")


def test_a_ledger_comes_once_and_first(patients: DatasetLedger) -> None:
    engine, _ = make(patients)
    with pytest.raises(ConfigurationError, match="one ledger"):
        engine.use_ledger(patients)
    late, _ = make(None)
    late.loader(make_data())
    with pytest.raises(ConfigurationError, match="before its loader"):
        late.use_ledger(patients)
    with pytest.raises(ConfigurationError, match="non-private"):
        make(patients, clipping_mode="non-private")


def test_detaching_gives_back_what_was_reserved(patients: DatasetLedger) -> None:
    engine, _ = make(patients)
    engine.loader(make_data())
    assert patients.runs()[0].open
    engine.detach()
    assert not patients.runs()[0].open
    assert patients.runs()[0].committed == []


@pytest.mark.slow
def test_importing_dptorch_imports_no_database() -> None:
    import subprocess
    import sys

    code = "import dptorch, dptorch.ledger, sys; sys.exit('sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
