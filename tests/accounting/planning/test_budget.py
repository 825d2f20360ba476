"""Budget planning: every row spends the budget, and no more."""

import math

import pytest

from dptorch import accounting
from dptorch.accounting import RunLaw, SampledGaussian, plan_budget, tuned_epsilon
from dptorch.errors import ConfigurationError

BUDGET = {"sample_size": 10_000, "target_epsilon": 2.0, "delta": 1e-5}
SIZES = [64, 256, 1024]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        ({"epochs": 30}, [4688, 1172, 293]),
        ({"examples": 300_000}, [4687, 1171, 292]),
        ({"steps": 500}, [500, 500, 500]),
        ({"hours": 0.5, "examples_per_second": 200}, [5625, 1406, 351]),
    ],
)
def test_every_choice_spends_the_whole_budget(limit, steps):
    choices = plan_budget(**BUDGET, **limit, batch_sizes=SIZES)
    assert [c.steps for c in sorted(choices, key=lambda c: c.batch_size)] == steps
    ratios = [c.signal_to_noise for c in choices]
    assert ratios == sorted(ratios, reverse=True)
    for c in choices:
        run = [SampledGaussian(c.noise_multiplier, c.batch_size / 10_000, c.steps)]
        assert 1.9999 < accounting.get_accountant("exact").epsilon(run, 1e-5) <= 2.0
        assert c.noise_per_gradient == c.noise_multiplier / c.batch_size
        assert c.signal_to_noise == pytest.approx(math.sqrt(c.steps) / c.noise_per_gradient)
        assert c.epochs == pytest.approx(c.steps * c.batch_size / 10_000)


@pytest.mark.slow
def test_larger_batches_carry_more_signal():
    choices = plan_budget(**BUDGET, epochs=30, batch_sizes=SIZES)
    assert [c.batch_size for c in choices] == [1024, 256, 64]


def test_memory_and_hours_need_measurements():
    (bare,) = plan_budget(**BUDGET, epochs=3, batch_sizes=[100])
    assert bare.memory_bytes is None
    assert bare.hours is None
    (full,) = plan_budget(
        **BUDGET, epochs=3, batch_sizes=[100], bytes_per_example=5e6, examples_per_second=50
    )
    assert full.memory_bytes == 5e8
    assert full.hours == pytest.approx(30_000 / 50 / 3600)


@pytest.mark.slow
def test_tuning_is_inside_the_budget():
    law = RunLaw("geometric", 10)
    (plain,) = plan_budget(**BUDGET, epochs=10, batch_sizes=[256])
    (tuned,) = plan_budget(**BUDGET, epochs=10, batch_sizes=[256], runs=law)
    run = [SampledGaussian(tuned.noise_multiplier, 0.0256, tuned.steps)]
    assert 1.99 < tuned_epsilon(run, 1e-5, law, adjacency="zero-out") <= 2.0
    assert tuned.noise_multiplier > 1.2 * plain.noise_multiplier


@pytest.mark.slow
def test_too_few_steps_are_left_out():
    choices = plan_budget(**BUDGET, epochs=2, batch_sizes=SIZES)
    assert [c.batch_size for c in choices] == [64]
    assert all(c.batch_size <= 10_000 for c in plan_budget(**BUDGET, steps=3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "give exactly one"),
        ({"epochs": 2, "steps": 3}, "give exactly one"),
        ({"hours": 1}, "needs examples_per_second"),
        ({"epochs": math.nan}, "epochs=nan"),
        ({"epochs": 0}, "epochs=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"epochs": 1, "batch_sizes": [5000]}, "leaves 100 steps"),
        ({"epochs": 1, "batch_sizes": [50_000]}, "larger than sample_size"),
        ({"epochs": 1, "batch_sizes": [0]}, "batch_size=0"),
        ({"epochs": 1, "bytes_per_example": -1}, "bytes_per_example=-1"),
        ({"epochs": 1, "delta": 1.0}, "delta=1.0"),
        ({"epochs": 1, "target_epsilon": -1.0}, "target_epsilon=-1"),
        ({"epochs": 1, "sample_size": 0}, "sample_size=0"),
        ({"epochs": 1, "accountant": "exat"}, "Did you mean 'exact'"),
        (
            {"epochs": 1, "target_epsilon": 1e-3, "runs": RunLaw("geometric", 1e6)},
            "no epsilon below",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ConfigurationError, match=message):
        plan_budget(**{**BUDGET, **change})
