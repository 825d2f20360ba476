"""Few steps at tiny sampling rates, where one step's loss sits almost wholly at one point."""

import math

import mpmath as mp
import pytest

from dptorch.accounting import SampledGaussian, get_accountant
from dptorch.accounting.accountants import pld
from dptorch.accounting.composition import composed, contour
from dptorch.accounting.pairs.sampled import SampledPair

CASES = [
    (0.2, 1e-9, 1e-10),
    (0.3, 1e-9, 1e-12),
    (0.3, 1e-7, 1e-8),
    (0.5, 1e-7, 1e-12),
    (1.0, 1e-9, 1e-12),
    (1.0, 1e-5, 1e-10),
]


def two_step_delta(epsilon: float, sigma: float, rate: float) -> mp.mpf:
    """δ(ε) of two `remove` steps, to 20 digits: ∫ dP(x) H(ε - L(x)), H one step's closed form."""
    with mp.workdps(40):
        e, s, q = mp.mpf(epsilon), mp.mpf(sigma), mp.mpf(rate)
        least = mp.log1p(-q)

        def above(x: mp.mpf) -> mp.mpf:
            return mp.erfc(x / mp.sqrt(2)) / 2

        def place(loss: mp.mpf) -> mp.mpf:
            return s**2 * mp.log((mp.expm1(loss) + q) / q) + mp.mpf(1) / 2

        def one_step(loss: mp.mpf) -> mp.mpf:
            if loss <= least:
                return -mp.expm1(loss)
            t = place(loss)
            return (1 - q) * above(t / s) + q * above((t - 1) / s) - mp.exp(loss) * above(t / s)

        def integrand(x: mp.mpf) -> mp.mpf:
            loss = mp.log1p(q * mp.expm1((x - mp.mpf(1) / 2) / s**2))
            return ((1 - q) * mp.npdf(x, 0, s) + q * mp.npdf(x, 1, s)) * one_step(e - loss)

        low, high = -14 * s, 1 + 14 * s
        points = [low + (high - low) * k / 24 for k in range(25)]
        return mp.quad(integrand, sorted([*points, place(e - least)]))


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "rate", "delta"), CASES)
def test_two_steps_agree_with_forty_digits(sigma, rate, delta):
    run = [SampledGaussian(sigma, rate, 2)]
    exact = get_accountant("exact").epsilon(run, delta)
    assert abs(mp.log(two_step_delta(exact, sigma, rate) / delta)) < 2e-4
    assert get_accountant("exact").delta(run, exact) == pytest.approx(delta, rel=2e-4)
    bound = get_accountant("pld").epsilon(run, delta)
    assert exact * (1 - 1e-4) < bound < exact + 1e-3
    assert two_step_delta(bound, sigma, rate) <= delta


@pytest.mark.slow
def test_a_thousand_steps_agree_with_a_fine_grid():
    # Losses below 2e-3 composed by FFT at intervals of 1e-6 to 4e-8, those above to 40 digits.
    run, delta = [SampledGaussian(0.3, 1e-9, 1000)], 1e-8
    exact = get_accountant("exact").epsilon(run, delta)
    assert exact == pytest.approx(2.84342e-4, abs=2e-9)
    assert exact < get_accountant("pld").epsilon(run, delta) < 1.01 * exact


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta"),
    [(1.0, 1e-7, 10**5, 1e-10), (0.5, 1e-8, 10**6, 1e-9), (0.7, 1e-6, 10**4, 1e-7)],
)
def test_the_bound_is_above_the_estimate(sigma, rate, steps, delta):
    run = [SampledGaussian(sigma, rate, steps)]
    exact = get_accountant("exact").epsilon(run, delta)
    # Two grids without a common error: the loss of the largest single step is a lower bound.
    assert steps * SampledPair("remove", sigma, rate, 1).one_step_delta(exact) < 1.1 * delta
    assert exact * (1 - 1e-4) < get_accountant("pld").epsilon(run, delta) < exact + 1e-2


@pytest.mark.slow
def test_a_grid_over_all_losses_has_no_point_below_epsilon(monkeypatch):
    """The broken twin: without the reach, the estimate was above the bound."""
    monkeypatch.setattr(composed, "loss_reach", lambda pairs, epsilon: 30.0)
    monkeypatch.setattr(composed, "_GRIDS", ((2**15, math.inf),))
    pair = SampledPair("remove", 0.3, 1e-9, 1000)
    assert composed._extrapolated_epsilon([pair], 1e-8) > 1.002 * 2.84342e-4


@pytest.mark.slow
def test_rounding_losses_down_is_no_bound(monkeypatch):
    """The broken twin of the bound: each loss at the lower end of its cell."""
    true = pld.connect_the_dots

    def down(pair, interval, tail, reach):
        part = true(pair, interval, tail, reach)
        p = pair.cells(interval, tail, reach)[1]
        return type(part)(p, part.lowest, 0.0, part.steps)

    monkeypatch.setattr(pld, "connect_the_dots", down)
    pld._composed.cache_clear()
    found = get_accountant("pld").epsilon([SampledGaussian(0.3, 1e-7, 2)], 1e-8)
    pld._composed.cache_clear()
    assert two_step_delta(found, 0.3, 1e-7) > 1e-8


@pytest.mark.slow
def test_the_contour_says_where_it_does_not_settle():
    with pytest.raises(contour.Unsettled, match="does not settle"):
        contour.contour_epsilon([SampledPair("remove", 0.3, 1e-9, 1000)], 1e-8)
