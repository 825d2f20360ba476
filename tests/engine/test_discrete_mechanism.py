"""mechanism="discrete_gaussian" through the engine: integers from the rounding to the release."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import dptorch
from dptorch.clipping.sums import RoundedSum
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.noise import DiscreteGaussianNoise
from tests.engine.setup import SIZE, clipped_mean, make_data, make_engine, make_model, train

DISCRETE = {"mechanism": "discrete_gaussian", "accountant": "rdp"}


def gradient(**settings: Any) -> torch.Tensor:
    model = make_model()
    engine = make_engine(model, max_grad_norm=0.5, steps=1, **DISCRETE, **settings)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 1.0))
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    return before - train(model, optimizer, engine.loader(make_data(), max_physical_batch_size=7))


def test_without_noise_it_is_the_clipped_mean_but_for_the_rounding() -> None:
    expected = clipped_mean(make_model(), make_data(), 0.5, SIZE)
    torch.testing.assert_close(gradient(), expected, rtol=2e-4, atol=1e-6)


def test_with_noise_it_is_noisy_as_planned() -> None:
    stddev = 100.0 * 0.5 / SIZE
    off = torch.cat([gradient(noise_multiplier=100.0, seed=s) for s in range(8)]) / stddev
    assert abs(float(off.std()) - 1) < 5.5 / math.sqrt(2 * off.numel())


def test_integers_reach_the_noise_and_one_example_moves_them_by_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sums: list[dict[str, torch.Tensor]] = []
    plain = DiscreteGaussianNoise.privatize

    def privatize(self: Any, clipped: RoundedSum, *rest: Any, **more: Any) -> Any:
        assert all(v.dtype == torch.int64 for v in clipped.values.values())
        sums.append({n: v.clone() for n, v in clipped.values.items()})
        return plain(self, clipped, *rest, **more)

    monkeypatch.setattr(DiscreteGaussianNoise, "privatize", privatize)
    x, y = make_data().tensors
    for rows in (slice(0, SIZE), slice(0, SIZE - 1)):
        data = torch.utils.data.TensorDataset(x[rows], y[rows])
        model = make_model()
        settings = {"sample_size": None, "batch_size": SIZE, "adjacency": "add-remove"}
        engine = make_engine(model, max_grad_norm=0.01, steps=1, **DISCRETE, **settings)
        # One example at a time: its gradient is then the same bits in any company.
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 1.0))
        train(model, optimizer, engine.loader(data, max_physical_batch_size=1))
    moved = [(sums[0][n] - sums[1][n]).flatten().tolist() for n in sums[0]]
    squared = sum(v * v for values in moved for v in values)
    assert 0.999 * RoundedSum.UNITS**2 < squared <= RoundedSum.UNITS**2


def test_its_epsilon_is_stated_by_the_accountant_that_covers_it() -> None:
    plan = dptorch.make_plan(
        batch_size=64, sample_size=6400, epochs=2, target_epsilon=3.0, **DISCRETE
    )
    assert plan.epsilon() <= 3.0
    assert dptorch.PrivacyPlan.from_json(plan.to_json()) == plan
    statement = dptorch.PrivacyEngine(make_model(), plan=plan).statement()
    assert "floating-point" not in " ".join(statement.to_dict()["not_covered"])
    assert any("floating-point" in each for each in statement.assumed)
    assert "discrete" in str(statement)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accountant": "pld"}, "These do: rdp"),
        ({"clipping_style": "layer-wise"}, "one fixed norm"),
        ({"sampling": "shuffled"}, "no theorem here covers the two together"),
        ({"clipping_mode": "ghost"}, "rounds one by one"),
        ({"mechanism": "discrete"}, "Did you mean 'discrete_gaussian'"),
    ],
)
def test_what_is_not_covered_is_refused(settings: dict[str, Any], message: str) -> None:
    plan = {"sample_rate": 0.25, "noise_multiplier": 1.0, "max_grad_norm": 1.0}
    with pytest.raises((ConfigurationError, PrivacyError), match=message):
        make_engine(make_model(), **(DISCRETE | plan | settings))
