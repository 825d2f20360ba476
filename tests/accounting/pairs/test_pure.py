"""Pure releases: their composition against sums over all outcomes, with forty digits."""

import itertools

import mpmath as mp
import pytest

from dptorch import accounting
from dptorch.accounting import PureRelease, SampledGaussian, pure_delta, pure_epsilon


def brute_force_delta(each, steps, epsilon):
    """δ of randomised response, summed over every sequence of its answers."""
    with mp.workdps(40):
        p = mp.exp(each) / (1 + mp.exp(each))
        total = mp.mpf(0)
        for outcome in itertools.product((True, False), repeat=steps):
            mass = mp.fprod(p if hit else 1 - p for hit in outcome)
            other = mp.fprod(1 - p if hit else p for hit in outcome)
            total += max(mp.mpf(0), mass - mp.exp(epsilon) * other)
        return total


@pytest.mark.parametrize(("each", "steps"), [(0.1, 1), (0.1, 9), (1.0, 6), (2.5, 3)])
def test_the_composed_delta_is_that_of_all_outcomes(each, steps):
    for epsilon in (0.0, 0.3 * each, 0.7 * steps * each, steps * each):
        wanted = float(brute_force_delta(each, steps, epsilon))
        assert pure_delta(each, steps, epsilon) == pytest.approx(wanted, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("each", "steps"), [(0.1, 1), (0.05, 400), (1.0, 3)])
def test_epsilon_inverts_delta_and_is_below_the_renyi_bound(each, steps):
    found = pure_epsilon(each, steps, 1e-5)
    assert pure_delta(each, steps, found) <= 1e-5 < pure_delta(each, steps, found * (1 - 1e-6))
    renyi = accounting.get_accountant("rdp").epsilon([PureRelease(each, steps)], 1e-5)
    assert found <= renyi <= 1.15 * found


def test_renyi_divergences_are_those_of_the_two_outcomes():
    orders, found = accounting.get_accountant("rdp").divergences([PureRelease(0.7, 1)])
    with mp.workdps(30):
        p = mp.exp(0.7) / (1 + mp.exp(0.7))
        for order, divergence in zip(orders[::7], found[::7], strict=True):
            a = mp.mpf(float(order))
            wanted = mp.log(p**a * (1 - p) ** (1 - a) + (1 - p) ** a * p ** (1 - a)) / (a - 1)
            assert divergence == pytest.approx(float(wanted), rel=1e-9)


def test_replacing_costs_what_two_changes_do():
    rdp = accounting.get_accountant("rdp")
    replaced = rdp.epsilon([PureRelease(0.1, 5)], 1e-5, adjacency="replace-one")
    assert replaced == rdp.epsilon([PureRelease(0.2, 5)], 1e-5)


def test_it_composes_with_training():
    rdp = accounting.get_accountant("rdp")
    answers, training = PureRelease(0.1, 10), SampledGaussian(1.0, 0.01, 1000)
    both = rdp.epsilon([answers, training], 1e-5)
    assert both > max(rdp.epsilon([answers], 1e-5), rdp.epsilon([training], 1e-5))
    assert both < rdp.epsilon([answers], 1e-5) + rdp.epsilon([training], 1e-5)
