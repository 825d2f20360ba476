"""mechanism="banded" through the engine: noise correlated over steps, on batches kept apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import dptorch
from dptorch.accounting.pairs.sampled import gaussian_epsilon
from dptorch.accounting.toeplitz import square_root
from dptorch.engine.checkpoint import seal, unseal
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.ledger import open_ledger
from dptorch.noise.recursive import RecursiveNoise
from tests.engine.setup import make_data, make_engine, make_model, parameters, train

BANDED: dict[str, Any] = {
    "mechanism": "banded",
    "bands": 4,
    "coefficients": "square-root",
    "sample_rate": 0.25,
    "noise_multiplier": 0.7,
    "max_grad_norm": 0.5,
}
INVERSE: dict[str, Any] = {
    "mechanism": "inverse-banded",
    "bands": 3,
    "sample_rate": 0.25,
    "noise_multiplier": 0.7,
    "max_grad_norm": 0.5,
}
BUFFERED: dict[str, Any] = {
    "mechanism": "buffered-toeplitz",
    "bands": 2,
    "sample_rate": 0.25,
    "noise_multiplier": 0.7,
    "max_grad_norm": 0.5,
}
CORRELATED = pytest.mark.parametrize(
    "mechanism", [BANDED, INVERSE, BUFFERED], ids=["banded", "inverse", "buffered"]
)
GAUSSIAN: dict[str, Any] = {"mechanism": "gaussian", "bands": None, "coefficients": None}


def run(*, steps: int = 10, physical: int | None = None, **settings: Any) -> Any:
    """(parameters after each step, engine) of a run."""
    model = make_model()
    engine = make_engine(model, **{**BANDED, "steps": steps, **settings})
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    found = []
    while not engine.exhausted:
        for x, y in engine.loader(make_data(), max_physical_batch_size=physical):
            torch.nn.functional.cross_entropy(model(x), y).backward()
            before = engine.steps_done
            optimizer.step()
            if engine.steps_done > before:
                found.append(parameters(model))
            optimizer.zero_grad()
    return torch.stack(found), engine


def test_what_steps_release_has_the_noise_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of zero: what is left is noise. From the dense matrix, σ, C and the batch size."""
    steps, sigma = 10, 3.0
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda out, y: (out * 0.0).mean())
    found, _ = run(steps=steps, noise_multiplier=sigma)
    released = -np.diff(np.stack([parameters(make_model()).numpy(), *found.numpy()]), axis=0) / 0.1
    c = sum(value * np.eye(steps, k=-i) for i, value in enumerate(square_root(4)))
    white = c / np.linalg.norm(c, axis=0) @ released * 6 / (sigma * 0.5)  # 6: expected batch size
    n = white.shape[1]
    assert (np.abs(white @ white.T / n - np.eye(steps)) < 5.5 * math.sqrt(2 / n)).all()
    independent = released * 6 / (sigma * 0.5)
    assert (np.abs(independent @ independent.T / n - np.eye(steps)) > 5.5 * math.sqrt(2 / n)).any()


def test_one_band_is_the_gaussian_mechanism_bit_for_bit() -> None:
    banded, engine = run(bands=1)
    gaussian, plain = run(**GAUSSIAN)
    assert torch.equal(banded, gaussian)
    assert engine.get_privacy_spent() == plain.get_privacy_spent()


def test_parts_of_a_batch_are_the_batch() -> None:
    torch.testing.assert_close(run(physical=2)[0], run()[0], rtol=1e-5, atol=1e-6)


@CORRELATED
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(
    mechanism: dict[str, Any], tmp_path: Path
) -> None:
    def steps(engine: Any, model: Any, optimizer: Any, until: int) -> None:
        while engine.steps_done < until:
            for x, y in engine.loader(make_data()):
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                if engine.steps_done == until:
                    break

    def begin() -> Any:
        model = make_model()
        engine = make_engine(model, **mechanism, seed=None)
        return engine, model, engine.attach(torch.optim.SGD(model.parameters(), 0.1))

    whole = begin()
    steps(*whole, 7)
    whole[0].save_checkpoint(tmp_path / "run.pt")
    steps(*whole, 10)
    later = begin()
    later[0].load_checkpoint(tmp_path / "run.pt")
    steps(*later, 10)
    assert torch.equal(parameters(later[1]), parameters(whole[1]))
    # Without what was lost the seal does not fit; with a seal, steps and noise do not.
    values, key = unseal(whole[0].state_dict())
    del values["noise"]["contexts"][3]
    for state in (whole[0].state_dict() | values, seal(values, key)):
        with pytest.raises(PrivacyError, match=r"seal does not fit|noise of 9 of the 10 steps"):
            begin()[0].load_state_dict(state)


@CORRELATED
def test_another_loader_is_refused_and_the_way_out_works(mechanism: dict[str, Any]) -> None:
    model = make_model()
    engine = make_engine(model, **mechanism)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(PrivacyError, match="does not take part again too soon"):
        train(model, optimizer, DataLoader(make_data(), batch_size=6))
    assert engine.steps_done == 0
    optimizer.zero_grad()
    train(model, optimizer, engine.loader(make_data()))
    assert engine.steps_done == 4
    engine.detach()
    engine = make_engine(model, **{**BANDED, **GAUSSIAN})
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.warns(UserWarning, match="without amplification"):
        train(model, optimizer, DataLoader(make_data(), batch_size=6))


def test_another_data_set_would_change_the_groups() -> None:
    engine = make_engine(make_model(), **BANDED, adjacency="add-remove")
    engine.loader(make_data())
    with pytest.raises(PrivacyError, match="24 records, and this one has 23"):
        engine.loader(make_data(23))


@pytest.mark.parametrize(
    "settings",
    [
        {"adaptive_clipping": {"count_stddev": 4.0}},
        {"clipping_style": "layer-wise"},
        {"clipping_mode": "ghost"},
        {"coefficients": dptorch.accounting.Workload(momentum=0.9)},
        {**BUFFERED, "coefficients": None},
    ],
    ids=str,
)
def test_other_settings_run_to_the_end_of_the_plan(settings: dict[str, Any]) -> None:
    found, engine = run(**settings)
    assert engine.exhausted
    assert found.isfinite().all()
    assert engine.get_privacy_spent().epsilon == engine.plan.epsilon()


def test_users_are_kept_apart() -> None:
    users = (np.arange(24) // 3).tolist()
    model = make_model()
    engine = make_engine(
        model, **BANDED, unit="user", max_examples_per_user=2, batch_size=None, sample_size=8
    )
    sampler = engine.loader(make_data(), user_ids=users).sampler
    drawn = [{int(i) // 3 for i in sampler.draw(step)} for step in range(40)]
    assert not any(drawn[t] & drawn[t + j] for t in range(36) for j in (1, 2, 3))
    assert any(drawn[t] & drawn[t + 4] for t in range(36))


def test_the_ledger_counts_turns(tmp_path: Path) -> None:
    patients = open_ledger(tmp_path / "ledger.db").dataset("patients")
    _, engine = run(seed=None, ledger=patients)
    (kept,) = patients.runs()
    accountant = dptorch.accounting.get_accountant("pld")
    spent = accountant.epsilon(kept.history, 1e-3, adjacency="zero-out")
    assert spent == pytest.approx(engine.plan.epsilon(), rel=1e-12)
    statement = engine.statement()
    assert "Gaussian noise correlated over 4 steps" in str(statement)
    assert "no example takes part twice in 4 steps in a row" in str(statement)
    assert "arXiv:2306.08153, Theorem 4" in str(statement)
    assert any("keeps its turns" in each for each in statement.assumed)
    assert statement.epsilon < statement.epsilon_unamplified
    assert statement.epsilon_if_poisson < statement.epsilon


def test_a_run_without_sampling_is_one_gaussian_mechanism(tmp_path: Path) -> None:
    """Inverse-banded: its sensitivity from a dense matrix, over the steps that were taken."""
    _, engine = run(**{**INVERSE, "noise_multiplier": 3.0, "coefficients": None}, steps=10)
    assert engine.plan.sampling == "sequential"
    c = np.linalg.inv(sum(u * np.eye(10, k=-i) for i, u in enumerate([1, -1 / 2, -1 / 8])))
    for steps, turns in ((3, [0]), (6, [0, 4]), (10, [0, 4, 8])):
        sensitivity = np.linalg.norm(c[:steps, turns].sum(axis=1))
        wanted = gaussian_epsilon(1e-3, sensitivity / 3.0)
        assert engine.plan.epsilon(steps, accountant="exact") == pytest.approx(wanted, rel=1e-6)
    text = str(engine.statement())
    assert "Gaussian noise made of that of 3 steps" in text
    assert "Denisov" in text
    patients = open_ledger(tmp_path / "ledger.db").dataset("patients")
    run(**INVERSE, coefficients=None, seed=None, ledger=patients)
    (kept,) = patients.runs()
    assert [type(event).__name__ for event in kept.history] == ["SeparatedGaussian"]


def test_a_buffered_run_says_its_sensitivity_and_its_theorem(tmp_path: Path) -> None:
    """From a dense matrix, over the steps that were taken; and what a ledger has of it."""
    patients = open_ledger(tmp_path / "ledger.db").dataset("patients")
    settings = {**BUFFERED, "noise_multiplier": 3.0, "coefficients": None}
    _, engine = run(**settings, seed=None, ledger=patients)
    scales, decays = np.split(np.array(engine.plan.coefficients), 2)
    c = np.eye(10) + sum(sum(scales * decays ** (i - 1)) * np.eye(10, k=-i) for i in range(1, 10))
    for steps, turns in ((3, [0]), (6, [0, 4]), (10, [0, 4, 8])):
        sensitivity = np.linalg.norm(c[:steps, turns].sum(axis=1))
        wanted = gaussian_epsilon(1e-3, sensitivity / 3.0)
        assert engine.plan.epsilon(steps, accountant="exact") == pytest.approx(wanted, rel=1e-6)
    text = " ".join(str(engine.statement()).split())
    assert "Gaussian noise correlated over all steps by buffers" in text
    assert "arXiv:2405.13763, Theorem 2" in text
    assert f"{decays[0]:.9g}" in text
    (kept,) = patients.runs()
    (event,) = kept.history
    assert (type(event).__name__, event.steps) == ("BufferedGaussian", 10)
    assert event.coefficients == engine.plan.coefficients
    anywhere = engine.plan.epsilon(10, own_loader_steps=1)
    assert anywhere > 2 * engine.plan.epsilon()


def test_a_run_stopped_early_has_spent_less() -> None:
    _, engine = run(steps=10)
    plan = engine.plan
    assert plan.epsilon(0) == 0 < plan.epsilon(4) < plan.epsilon(5) == plan.epsilon(8)


def test_noise_is_drawn_after_the_step_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose noise fails is spent, and the run goes on without it."""
    model = make_model()
    engine = make_engine(model, **BANDED)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    with monkeypatch.context() as patch:
        patch.setattr(RecursiveNoise, "_advance", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            train(model, optimizer, engine.loader(make_data()))
    assert engine.steps_done == 1
    optimizer.zero_grad()
    train(model, optimizer, engine.loader(make_data()), epochs=1)
    assert engine.steps_done == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bands": 5}, "bands=5 at sample_rate=0.25.*Use at most 4 bands"),
        ({"bands": 0}, "bands=0"),
        ({"bands": "many"}, "whole number or 'auto'"),
        ({"bands": "auto"}, "needs mechanism='banded' and target_epsilon"),
        ({"sampling": "shuffled", "bands": None}, "no theorem here covers the two together"),
        ({"sampling": "shuffled"}, "bands=4 is for sampling='cyclic-poisson'"),
        ({"mechanism": "gaussian"}, "bands=4 is for sampling='cyclic-poisson'"),
        ({"mechanism": "gaussian", "bands": None, "coefficients": [1.0]}, "Leave it out"),
        ({"coefficients": [1.0] * 5}, "Give at most 4"),
        ({**INVERSE, "sampling": "shuffled"}, "no theorem here covers the two together"),
        ({**INVERSE, "coefficients": [1.0, 0.5]}, "must be at most 0"),
        ({**INVERSE, "coefficients": "prefix-sum"}, "must be 'square-root' for mechanism='inverse"),
        ({**INVERSE, "coefficients": dptorch.accounting.Workload()}, "a Workload is for"),
        ({**BUFFERED, "sampling": "shuffled"}, "no theorem here covers the two together"),
        ({**BUFFERED, "coefficients": "square-root"}, "found for the prefix sum alone"),
        ({**BUFFERED, "coefficients": [0.9, 0.9, 0.5, 0.1]}, "at most 1"),
        ({**BUFFERED, "adjacency": "add-remove"}, "not covered under adjacency='add-remove'"),
    ],
)
def test_what_cannot_be_kept_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_engine(make_model(), **{**BANDED, **settings})


def test_a_plan_whose_columns_overlap_is_refused() -> None:
    plan = make_engine(make_model(), **BANDED).plan
    text = plan.to_json().replace('"bands": 4', '"bands": 3')
    with pytest.raises(ConfigurationError, match="overlap with itself"):
        dptorch.PrivacyPlan.from_json(text)
