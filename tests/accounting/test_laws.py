"""Laws every accountant must keep: monotone in each argument, and composition that adds up."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptorch import accounting
from dptorch.accounting import SampledGaussian, merge
from dptorch.accounting.pairs.sampled import gaussian_epsilon

BASE = {"noise_multiplier": 1.0, "sample_rate": 0.02, "steps": 300}
ACCOUNTANTS = ["exact", "pld", "rdp"]


def cost(name, delta=1e-5, adjacency="add-remove", **changes):
    event = SampledGaussian(**{**BASE, **changes})
    return accounting.get_accountant(name).epsilon([event], delta, adjacency=adjacency)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCOUNTANTS)
@pytest.mark.parametrize("adjacency", ["add-remove", "replace-one"])
@pytest.mark.parametrize(
    "rising",
    [
        [{"steps": steps} for steps in (1, 2, 10, 300, 5000)],
        [{"sample_rate": rate} for rate in (1e-3, 0.01, 0.3, 0.9, 1.0)],
        [{"noise_multiplier": sigma} for sigma in (20.0, 3.0, 1.0, 0.5, 0.0)],
        [{"delta": delta} for delta in (1e-2, 1e-5, 1e-8, 1e-12)],
    ],
    ids=["steps", "sample_rate", "noise", "delta"],
)
def test_epsilon_is_monotone(name, adjacency, rising):
    costs = [cost(name, adjacency=adjacency, **change) for change in rising]
    assert all(low < high or low == high == 0 for low, high in itertools.pairwise(costs))


@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_splitting_and_reordering_a_history_changes_nothing(name):
    accountant = accounting.get_accountant(name)
    whole = accountant.epsilon([SampledGaussian(1.0, 0.02, 300)], 1e-5)
    split = [SampledGaussian(1.0, 0.02, steps) for steps in (150, 0, 100, 50)]
    assert accountant.epsilon(split, 1e-5) == whole
    mixed = [SampledGaussian(1.0, 0.02, 100), SampledGaussian(2.0, 0.1, 50)]
    assert accountant.epsilon(mixed, 1e-5) == accountant.epsilon(mixed[::-1], 1e-5)
    assert accountant.epsilon(mixed, 1e-5) > accountant.epsilon(mixed[:1], 1e-5)


@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_nearly_equal_halves_cost_what_equal_halves_cost(name):
    """Really heterogeneous: two different events go through the code for mixtures."""
    half = SampledGaussian(1.0, 0.02, 150)
    twin = SampledGaussian(1.0 + 1e-9, 0.02, 150)
    accountant = accounting.get_accountant(name)
    assert accountant.epsilon([half, twin], 1e-5) == pytest.approx(
        accountant.epsilon([half, half], 1e-5), abs=1e-5
    )


def test_a_gaussian_step_in_a_sampled_history():
    """sample_rate 1 inside a mixture uses another formula for K; at rate 0.999999 it must agree."""
    steps = SampledGaussian(1.0, 0.02, 300)
    exact = accounting.get_accountant("exact")
    for adjacency in ("add-remove", "replace-one"):
        mixed = exact.epsilon([steps, SampledGaussian(5.0, 1.0, 4)], 1e-5, adjacency=adjacency)
        near = exact.epsilon([steps, SampledGaussian(5.0, 1 - 1e-9, 4)], 1e-5, adjacency=adjacency)
        assert mixed == pytest.approx(near, abs=1e-6)


@pytest.mark.parametrize("name", ["exact", "pld", "rdp", "gdp"])
def test_edges(name):
    accountant = accounting.get_accountant(name)
    assert accountant.epsilon([], 1e-5) == 0.0
    assert accountant.epsilon([SampledGaussian(1.0, 0.1, 0)], 1e-5) == 0.0
    assert accountant.delta([SampledGaussian(0.0, 0.1, 0)], 1.0) == 0.0
    assert accountant.epsilon([SampledGaussian(0.0, 0.1, 1)], 1e-5) == math.inf
    assert accountant.delta([SampledGaussian(0.0, 0.1, 1)], 1.0) == 1.0


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    log_sigma=st.floats(-0.5, 1.0),
    log_rate=st.floats(-3.0, -0.3),
    log_steps=st.floats(0.5, 3.0),
    log_delta=st.floats(-8.0, -2.0),
    adjacency=st.sampled_from(["add-remove", "replace-one"]),
)
def test_pld_brackets_exact_anywhere(log_sigma, log_rate, log_steps, log_delta, adjacency):
    run = [SampledGaussian(10**log_sigma, 10**log_rate, int(10**log_steps))]
    exact, pld = (
        accounting.get_accountant(name).epsilon(run, 10**log_delta, adjacency=adjacency)
        for name in ("exact", "pld")
    )
    assert exact - 1e-9 <= pld <= exact + 1e-3 * max(1.0, exact / 10) + 1e-9


def test_no_amplification_is_the_gaussian_mechanism():
    for name in ("exact", "pld"):
        found = accounting.get_accountant(name).epsilon([SampledGaussian(10.0, 1.0, 100)], 1e-5)
        assert found == pytest.approx(gaussian_epsilon(1e-5, 1.0), abs=1e-3)


def test_far_ends_do_not_crash():
    exact = accounting.get_accountant("exact")
    tiny = exact.delta([SampledGaussian(50.0, 0.001, 10)], 5.0)
    assert tiny == 0.0
    assert exact.delta([SampledGaussian(0.3, 0.5, 10_000)], 1.0) == 1.0
    assert exact.epsilon([SampledGaussian(0.05, 0.5, 10)], 1e-5) > 1000


def test_merge_keeps_order_and_adds_neighbours():
    step, other = SampledGaussian(1.0, 0.1, 1), SampledGaussian(2.0, 0.1, 3)
    assert merge([step, step, other, step]) == [
        SampledGaussian(1.0, 0.1, 2),
        other,
        step,
    ]
    assert merge([SampledGaussian(1.0, 0.1, 0)]) == []


def test_rounding_below_zero_is_no_proof_of_perfect_privacy():
    """dp-accounting alone answers 0 here: its divergences come out as -1e-16."""
    run = [SampledGaussian(1e6, 0.01, 100)]
    assert accounting.get_accountant("rdp").epsilon(run, 1e-9) > 1e-3
