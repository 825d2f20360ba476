"""How many bands: the table of docs/noise.md, and what the planner picks."""

import re
from pathlib import Path

import pytest

from dptorch import make_plan
from dptorch.accounting import (
    SeparatedGaussian,
    Workload,
    noise_multiplier_for,
    workload_error,
)
from dptorch.accounting.toeplitz import inverse_error, inverse_square_root
from dptorch.errors import ConfigurationError
from dptorch.plan.bands import best_bands, best_inverse, compare_bands, compare_mechanisms

PAGE = Path(__file__).parents[2] / "docs" / "noise.md"
# Errors at δ = 1e-5 for 2048 steps in 8 epochs with 1, 2, 4, ..., 64 and 256 bands, made once by
# another program.
TABLE = {
    0.5: (46.56, 46.33, 47.46, 49.44, 52.01, 55.23, 59.57, 76.98),
    1: (30.98, 28.69, 27.87, 28.04, 28.88, 30.28, 32.37, 40.84),
    2: (24.08, 20.64, 18.52, 17.42, 17.08, 17.33, 18.12, 21.83),
    4: (19.74, 16.33, 13.89, 12.22, 11.19, 10.70, 10.69, 11.84),
    8: (16.23, 13.17, 10.90, 9.21, 7.99, 7.18, 6.74, 6.57),
    16: (13.38, 10.69, 8.66, 7.12, 5.95, 5.09, 4.50, 3.77),
}
# And without sampling, by the inverse 1, -0.96 and by the square root's inverse cut to 64 bands.
UNSAMPLED = {
    0.5: (115.4, 86.8),
    1: (61.2, 46.1),
    2: (32.7, 24.6),
    4: (17.7, 13.3),
    8: (9.85, 7.41),
    16: (5.65, 4.25),
}


def compared(epsilon, **settings):
    run = {"sample_rate": 1 / 256, "steps": 2048, "delta": 1e-5, "accountant": "exact"}
    return compare_bands(**{**run, "target_epsilon": epsilon, **settings})


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", TABLE)
def test_errors_at_one_budget(epsilon):
    bands = (1, 2, 4, 8, 16, 32, 64, 256)
    found = compared(epsilon, coefficients="square-root", bands=bands)
    assert [choice.error for choice in found] == pytest.approx(TABLE[epsilon], rel=2e-3)
    (row,) = re.findall(rf"^\| {epsilon} \|(.*)\|$", PAGE.read_text(), re.M) or [None]
    if row is not None:
        said = [float(cell.strip(" *")) for cell in row.split("|")]
        assert said == list(TABLE[epsilon][:7])


@pytest.mark.parametrize("epsilon", UNSAMPLED)
def test_errors_without_sampling(epsilon):
    found = []
    for u in ((1.0, -0.96), tuple(inverse_square_root(64))):
        noise = noise_multiplier_for(
            lambda value, u=u: SeparatedGaussian(value, u, 256, 2048),
            target_epsilon=epsilon,
            delta=1e-5,
            accountant="exact",
            adjacency="zero-out",
        )
        found.append(noise * workload_error(u, 2048, inverse=True))
    assert found == pytest.approx(UNSAMPLED[epsilon], rel=5e-3)


def test_buffers_leave_less_noise_than_an_inverse_with_bands():
    """At one budget, with and without sampling; and the planned run has the buffers compared."""
    run = {"sample_rate": 1 / 16, "steps": 320, "target_epsilon": 4.0, "delta": 1e-5}
    found = compare_mechanisms(**run)
    assert found["buffered-toeplitz"].error < found["inverse-banded"].error
    assert "buffered-toeplitz" not in compare_mechanisms(**run, adjacency="add-remove")
    plan = make_plan(
        batch_size=20,
        sample_size=320,
        steps=320,
        target_epsilon=4.0,
        target_delta=1e-5,
        accountant="exact",
        mechanism="buffered-toeplitz",
    )
    assert plan.coefficients == found["buffered-toeplitz"].coefficients
    assert plan.noise_multiplier == pytest.approx(found["buffered-toeplitz"].noise_multiplier)
    assert plan.epsilon() <= 4.0
    assert plan.sampling == "sequential"


def test_the_best_number_grows_with_the_budget():
    """From one band to all that the rate allows, as jax_privacy's tests have it."""
    small = {"sample_rate": 0.1, "steps": 100}
    assert best_bands(compared(0.1, **small)).bands == 1
    assert best_bands(compared(20.0, **small)).bands == 10


def test_optimised_coefficients_leave_less_noise():
    plain, optimised = (
        compared(4.0, bands=[8], coefficients=name)[0] for name in ("square-root", "prefix-sum")
    )
    assert 0.8 * plain.error < optimised.error < 0.9 * plain.error


def test_a_plan_has_the_bands_that_are_best():
    settings = {"batch_size": 10, "sample_size": 100, "steps": 100, "target_delta": 1e-5}
    found = compared(4.0, sample_rate=0.1, steps=100)
    plan = make_plan(**settings, target_epsilon=4.0, mechanism="banded")
    assert plan.bands == best_bands(found).bands > 1
    assert plan.coefficients == best_bands(found).coefficients
    assert plan.noise_multiplier == pytest.approx(best_bands(found).noise_multiplier, rel=1e-3)
    assert plan.epsilon() <= 4.0
    by_name = make_plan(**settings, target_epsilon=4.0, mechanism="banded", bands="4")
    assert (by_name.bands, by_name.sampling, len(by_name.coefficients)) == (4, "cyclic-poisson", 4)
    assert make_plan(**settings, noise_multiplier=1.0, mechanism="banded").bands == 8


def test_a_schedule_has_coefficients_of_its_own():
    settings = {"batch_size": 10, "sample_size": 100, "steps": 100, "target_epsilon": 4.0}
    one = Workload(momentum=0.9, rates=tuple(1 - t / 100 for t in range(100)))
    plans = [
        make_plan(**settings, mechanism="banded", bands=5, coefficients=c, target_delta=1e-5)
        for c in (one, "prefix-sum", [1.0, 0.5])
    ]
    assert len({plan.coefficients for plan in plans}) == 3
    # What is hidden does not depend on how: columns have norm 1.
    assert len({plan.epsilon() for plan in plans}) == 1


def test_too_many_bands_are_refused():
    with pytest.raises(ConfigurationError, match="at most 10 groups can take turns"):
        compared(4.0, sample_rate=0.1, steps=100, bands=[11])


def test_inverse_bands_of_the_table():
    """For 2048 steps in 8 epochs: square roots, and 1, -λ, whose best λ is near 0.96."""
    found = {b: best_inverse(2048, 256, bands=b) for b in (2, 4, 16)}
    errors = {b: inverse_error(u, 2048, 256) for b, u in found.items()}
    assert (errors[4], errors[16]) == pytest.approx((36.2326, 19.7075), rel=1e-4)
    assert inverse_error([1.0, -0.96], 2048, 256) == pytest.approx(16.4060, rel=1e-4)
    assert 16.0 < errors[2] < 16.4060
    assert best_inverse(2048, 256) == found[2]
    assert len(best_inverse(128, 32)) == 16
