"""What the guarantee rests on: sensitivity, noise, counting. Each test has a broken twin it catches."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dptorch
from dptorch import accounting
from dptorch.clipping import functions
from dptorch.clipping.sums import ClippedSum
from dptorch.errors import PrivacyError
from dptorch.noise import GaussianNoise
from tests.engine.setup import (
    SIZE,
    make_data,
    make_engine,
    make_model,
    parameters,
    recorded_sums,
    train,
)
from tests.oracles.loop import norm_of

BOUND = 0.5


def outlier_data() -> tuple[TensorDataset, TensorDataset]:
    """A data set whose last record is huge, and its neighbour in which that record is all zero and
    of another class."""
    x, y = make_data().tensors
    x, y = x.clone(), y.clone()
    x[-1] *= 1e3
    other_x, other_y = x.clone(), y.clone()
    other_x[-1] = 0
    other_y[-1] = (y[-1] + 1) % 3
    return TensorDataset(x, y), TensorDataset(other_x, other_y)


def distance(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> float:
    """How far one changed record moves the first sum before noise, at the same randomness."""
    sums = []
    for data in outlier_data():
        model = make_model()
        engine = make_engine(model, max_grad_norm=BOUND, steps=1, **settings)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        batches = engine.loader(data, max_physical_batch_size=7)
        sums += recorded_sums(monkeypatch, partial(train, model, optimizer, batches))
    first, second = sums
    return norm_of({k: first[k] - second[k] for k in first})


@pytest.mark.parametrize("clipping_fn", functions.FUNCTIONS)
@pytest.mark.parametrize("rate", [1.0, 0.6])
def test_one_record_moves_the_sum_by_no_more_than_declared(
    monkeypatch: pytest.MonkeyPatch, clipping_fn: str, rate: float
) -> None:
    # Replacing a record moves the sum by at most twice the bound on one contribution.
    found = distance(monkeypatch, clipping_fn=clipping_fn, sample_rate=rate)
    assert found <= 2 * BOUND * (1 + 1e-5)


def _unclipped(norms: Tensor, bound: float) -> Tensor:
    return torch.ones_like(norms)


def _clipped_after_the_mean(norms: Tensor, bound: float) -> Tensor:
    return torch.full_like(norms, min(1.0, bound / norms.mean().item()))


@pytest.mark.parametrize("twin", [_unclipped, _clipped_after_the_mean])
def test_a_twin_that_does_not_clip_each_example_is_caught(
    monkeypatch: pytest.MonkeyPatch, twin: Any
) -> None:
    monkeypatch.setitem(functions.FUNCTIONS, "abadi", twin)
    assert distance(monkeypatch) > 2 * BOUND * (1 + 1e-5)


# -- noise -----------------------------------------------------------------------------------------


def noisy_gradients(steps: int = 40, **settings: Any) -> list[Tensor]:
    """Gradients of a frozen-in-place model: noise around a constant."""
    torch.manual_seed(0)
    model = nn.Linear(40, 25)
    data = TensorDataset(torch.zeros(SIZE, 40), torch.zeros(SIZE, dtype=torch.long))
    engine = make_engine(model, steps=steps, noise_multiplier=2.0, max_grad_norm=0.25, **settings)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.0))
    x, y = data.tensors
    found = []
    for _ in range(steps):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return found


def check_noise(found: list[Tensor], stddev: float) -> None:
    """The spread over steps is `stddev` and steps are independent; each bound fails a right
    mechanism less than once in 10^6 runs (five standard errors)."""
    stacked = torch.stack(found)
    n = (stacked.shape[0] - 1) * stacked.shape[1]
    variance = stacked.var(0).mean().item()
    assert abs(variance / stddev**2 - 1) < 5 * math.sqrt(2 / n)
    centred = (stacked - stacked.mean(0)) / stddev
    lag = (centred[1:] * centred[:-1]).mean().item() + 1 / stacked.shape[0]
    assert abs(lag) < 5 / math.sqrt(n)


def test_the_noise_is_as_large_as_the_plan_says() -> None:
    check_noise(noisy_gradients(), 2.0 * 0.25 / SIZE)


@pytest.mark.slow
def test_noise_twins_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = GaussianNoise.privatize

    def none(self: Any, clipped: ClippedSum, key: Any, step: int, **context: int) -> Any:
        return plain(GaussianNoise(0.0), clipped, key, step, **context)

    def divided_by_the_batch(
        self: Any, clipped: ClippedSum, key: Any, step: int, **context: int
    ) -> Any:
        return plain(GaussianNoise(self.noise_multiplier / SIZE), clipped, key, step, **context)

    def same_every_step(self: Any, clipped: ClippedSum, key: Any, step: int, **context: int) -> Any:
        return plain(self, clipped, key, 0, context=0)

    def same_every_second_step(
        self: Any, clipped: ClippedSum, key: Any, step: int, **context: int
    ) -> Any:
        return plain(self, clipped, key, step // 2, context=0)

    for twin in (none, divided_by_the_batch, same_every_step, same_every_second_step):
        monkeypatch.setattr(GaussianNoise, "privatize", twin)
        with pytest.raises(AssertionError):
            check_noise(noisy_gradients(), 2.0 * 0.25 / SIZE)


def test_a_parameter_without_a_gradient_gets_noise_too() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    engine = make_engine(model, noise_multiplier=1.0, max_grad_norm=1.0)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    model(torch.randn(4, 3)).sum(1).backward()
    optimizer.step()
    assert model["unused"].weight.grad.abs().min() > 0


def test_two_engines_from_the_system_differ_and_a_seed_repeats() -> None:
    for seed, same in ((None, False), (7, True)):
        first, second = (noisy_gradients(1, seed=seed)[0] for _ in range(2))
        assert torch.equal(first, second) is same


# -- nothing raw leaves ----------------------------------------------------------------------------


def test_no_gradient_without_noise_is_ever_in_grad() -> None:
    model = make_model()
    x, y = make_data().tensors
    engine = make_engine(model)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def test_a_use_outside_the_model_is_caught() -> None:
    model = make_model()
    x, y = make_data().tensors
    engine = make_engine(model)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(PrivacyError, match="weight_decay"):
        F.cross_entropy(model(x), y) + 0.1 * model[0].weight.square().sum()
    with pytest.raises(PrivacyError, match=r"0\.weight"):
        model[0].weight.square().sum().backward()
    assert all(p.grad is None for p in model.parameters())


# -- what a logical batch may hold -----------------------------------------------------------------


def test_a_logical_batch_left_half_done_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    engine = make_engine(model, max_grad_norm=BOUND)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.0))
    loader = engine.loader(make_data(), max_physical_batch_size=10)
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        break
    assert engine.steps_done == 0
    sums = recorded_sums(monkeypatch, lambda: train(model, optimizer, loader))
    fresh_model = make_model()
    fresh = make_engine(fresh_model, max_grad_norm=BOUND)
    fresh_optimizer = fresh.attach(torch.optim.SGD(fresh_model.parameters(), 0.0))
    expected = recorded_sums(
        monkeypatch, lambda: train(fresh_model, fresh_optimizer, fresh.loader(make_data()))
    )
    assert len(sums) == len(expected) == 1
    for name in expected[0]:
        torch.testing.assert_close(sums[0][name], expected[0][name], rtol=1e-5, atol=1e-6)


def test_an_empty_batch_is_a_step_with_noise() -> None:
    model = make_model()
    engine = make_engine(model, sample_rate=0.001, steps=5, noise_multiplier=1.0, max_grad_norm=1.0)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    before = parameters(model)
    loader = engine.loader(make_data())
    for _ in range(1):
        train(model, optimizer, loader)
    assert engine.steps_done == 5
    assert engine.diagnostics is not None
    assert engine.diagnostics.examples == 0
    moved = (parameters(model) - before).norm().item()
    assert moved > 0


def test_padding_has_weight_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    engine = make_engine(model, sample_rate=0.001, steps=1, max_grad_norm=1.0)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    sums = recorded_sums(monkeypatch, lambda: train(model, optimizer, engine.loader(make_data())))
    assert all(not v.any() for v in sums[0].values())


def test_one_batch_twice_is_refused() -> None:
    model = make_model()
    engine = make_engine(model, max_grad_norm=BOUND)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    for x, y in engine.loader(make_data()):
        F.cross_entropy(model(x), y).backward()
        with pytest.raises(PrivacyError, match="count twice"):
            F.cross_entropy(model(x), y).backward()
        optimizer.zero_grad()
    assert engine.steps_done == 0


def test_several_views_of_an_example_in_the_batch_dimension_are_refused() -> None:
    model = make_model()
    engine = make_engine(model)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    for x, _ in engine.loader(make_data()):
        with pytest.raises(PrivacyError, match="rows"):
            model(torch.cat([x, x]))


def test_two_forwards_in_one_backward_are_refused() -> None:
    model = make_model()
    x, y = make_data().tensors
    engine = make_engine(model)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    loss = F.cross_entropy(model(x), y) + F.cross_entropy(model(x), y)
    with pytest.raises(PrivacyError, match="2 forward passes"):
        loss.backward()


def test_several_losses_on_one_forward_are_clipped_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    x, y = make_data().tensors
    engine = make_engine(model, max_grad_norm=1e-3)  # everything is clipped
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    out = model(x)
    F.cross_entropy(out, y).backward(retain_graph=True)
    F.cross_entropy(out, y).backward()
    sums = recorded_sums(monkeypatch, optimizer.step)
    norm = norm_of(sums[0])
    assert norm <= SIZE * 1e-3 * (1 + 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_bad_example_is_dropped_and_the_rest_unharmed(bad: float) -> None:
    data = make_data()
    x, y = data.tensors
    x = x.clone()
    x[3, 2] = bad
    keep = torch.arange(SIZE) != 3
    results = []
    for inputs, targets in ((x, y), (x[keep], y[keep])):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
        engine = make_engine(model, max_grad_norm=BOUND, loss_reduction="sum")
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        F.cross_entropy(model(inputs), targets, reduction="sum").backward()
        optimizer.step()
        results.append(parameters(model))
    assert results[0].isfinite().all()
    if not math.isfinite(bad):
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


# -- counting --------------------------------------------------------------------------------------


def test_the_epsilon_is_that_of_the_steps_taken() -> None:
    model = make_model()
    engine = make_engine(model, sample_rate=0.5, noise_multiplier=1.5, max_grad_norm=1.0, steps=6)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    assert engine.get_privacy_spent().epsilon == 0
    loader = engine.loader(make_data(), max_physical_batch_size=5)
    for epoch in range(1, 4):
        train(model, optimizer, loader)
        expected = accounting.epsilon(
            sample_rate=0.5, noise_multiplier=1.5, steps=2 * epoch, delta=1e-3, accountant="pld"
        )
        epsilon, delta = engine.get_privacy_spent()
        assert (epsilon, delta) == (expected, 1e-3)
    assert engine.sampling_run == {"poisson": 6}
    assert engine.statement().sampling_holds


def test_a_loader_of_ones_own_is_not_stated_as_poisson() -> None:
    model = make_model()
    engine = make_engine(model, sample_rate=0.5, noise_multiplier=1.5, max_grad_norm=1.0, steps=2)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    train(model, optimizer, DataLoader(make_data(), batch_size=12, shuffle=True))
    statement = engine.statement()
    assert not statement.sampling_holds
    assert statement.epsilon_unamplified > statement.epsilon_if_poisson
    assert statement.to_dict()["epsilon"] == statement.epsilon_unamplified
    assert str(statement).startswith(
        f"These 2 training steps are ({math.ceil(statement.epsilon_unamplified * 1e4) / 1e4:.4f}"
    )


def test_the_budget_is_never_passed() -> None:
    for mode in ("raise", "stop"):
        model = make_model()
        engine = make_engine(model, steps=1, on_budget_exhausted=mode)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        train(model, optimizer, engine.loader(make_data()))
        assert engine.exhausted
        with pytest.warns(dptorch.errors.PrivacyWarning, match="no more batches"):
            assert list(engine.loader(make_data())) == []
        spent = parameters(model)
        x, y = make_data().tensors
        F.cross_entropy(model(x), y).backward()
        if mode == "raise":
            with pytest.raises(dptorch.errors.BudgetExhausted, match="1 steps"):
                optimizer.step()
        else:
            with pytest.warns(dptorch.errors.PrivacyWarning, match="budget"):
                optimizer.step()
        torch.testing.assert_close(parameters(model), spent, rtol=0, atol=0)
        assert engine.steps_done == 1


def test_resuming_equals_not_stopping() -> None:
    def run(stop: bool) -> Tensor:
        model = make_model()
        settings = {"sample_rate": 0.5, "noise_multiplier": 1.0, "max_grad_norm": 1.0, "steps": 6}
        engine = make_engine(model, **settings)
        optimizer = engine.attach(torch.optim.Adam(model.parameters(), 0.1))
        loader = engine.loader(make_data())
        train(model, optimizer, loader)
        if stop:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), engine.state_dict()))
            model = make_model()
            engine = make_engine(model, **settings, seed=None)
            optimizer = engine.attach(torch.optim.Adam(model.parameters(), 0.1))
            for part, state in zip((model, optimizer, engine), saved, strict=True):
                part.load_state_dict(state)
            loader = engine.loader(make_data())
        train(model, optimizer, loader, epochs=2)
        assert engine.steps_done == 6
        return parameters(model)

    assert torch.equal(run(stop=False), run(stop=True))


def test_a_checkpoint_of_another_plan_is_refused() -> None:
    first = make_engine(make_model(), noise_multiplier=1.0)
    state = first.state_dict()
    second = make_engine(make_model(), noise_multiplier=0.5)
    with pytest.raises(dptorch.errors.ConfigurationError, match=r"noise_multiplier: 0\.5, 1\.0"):
        second.load_state_dict(state)
    assert second.steps_done == 0


def test_a_second_backward_after_clipping_is_refused() -> None:
    model = make_model()
    x, y = make_data().tensors
    engine = make_engine(model)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    optimizer.virtual_step()
    with pytest.raises(PrivacyError, match="second backward"):
        loss.backward()
