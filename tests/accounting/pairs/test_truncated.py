"""Poisson sampling with batches cut to a capacity, against enumeration and against dp-accounting."""

import itertools
import math

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant
from scipy.integrate import trapezoid
from scipy.stats import norm

from dptorch.accounting import SampledGaussian, TruncatedPoissonGaussian, get_accountant
from dptorch.accounting.pairs.sampled import SampledPair
from dptorch.accounting.pairs.truncated import TruncatedPair

X = np.linspace(-14, 14, 20_001)
RATE, NOISE, CAPACITY = 0.7, 1.0, 2


def density(gradients):
    """The output's density: every sample, every subset that is kept, and noise."""
    total = np.zeros_like(X)
    for drawn in itertools.product([0, 1], repeat=len(gradients)):
        chance = np.prod([RATE if d else 1 - RATE for d in drawn])
        inside = [g for g, d in zip(gradients, drawn, strict=True) if d]
        kept = list(itertools.combinations(inside, min(len(inside), CAPACITY)))
        total += chance * sum(norm.pdf(X, sum(k), NOISE) for k in kept) / len(kept)
    return total


def largest_excess(pair_of):
    """Of the true divergences over the pair's, over worst-case records and every direction."""
    cut = TruncatedPoissonGaussian(NOISE, RATE, 1, 4, CAPACITY).cut_probability
    worst = -math.inf
    for others in ((-1, -1, -1), (1, 1, 1), (0, 0, 0), (-1, 0, 1)):
        out, plus, minus = density(others), density((*others, 1)), density((*others, -1))
        for direction, p, q in (
            ("remove", plus, out),
            ("add", out, plus),
            ("replace", plus, minus),
            ("replace", minus, plus),
        ):
            pair = pair_of(direction, cut)
            for epsilon in (0.0, 0.2, 0.5, 1.0, 2.0, 3.0):
                true = trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), X)
                worst = max(worst, true - pair.one_step_delta(epsilon))
    return worst


def test_no_enumerated_step_costs_more_than_the_pair():
    assert largest_excess(lambda d, cut: TruncatedPair(d, NOISE, RATE, cut, 1)) <= 1e-7


def test_the_pair_of_uncut_sampling_is_too_small():
    """The broken twin: a record that costs another its place moves the sum by 2C."""
    assert largest_excess(lambda d, cut: SampledPair(d, NOISE, RATE, 1)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("adjacency", ["add-remove", "zero-out", "replace-one"])
def test_it_composes_where_the_overflow_is_above_delta(adjacency):
    event = TruncatedPoissonGaussian(1.0, 0.01, 100, sample_size=1000, capacity=20)
    assert event.overflow > 1e-5
    exact, pld = (
        get_accountant(name).epsilon([event], 1e-5, adjacency=adjacency)
        for name in ("exact", "pld")
    )
    assert exact < pld < exact + 1e-3
    assert get_accountant("rdp").epsilon([event], 1e-5, adjacency=adjacency) == math.inf
    uncut = get_accountant("exact").epsilon([SampledGaussian(1.0, 0.01, 100)], 1e-5)
    assert exact > uncut


@pytest.mark.slow
@pytest.mark.parametrize(("capacity", "looser"), [(20, 1.06), (40, 1.001)])
def test_beside_dp_accounting(capacity, looser):
    """Above it, as the number of records may be a bound; see the module."""
    theirs = pld_privacy_accountant.PLDAccountant(value_discretization_interval=1e-3)
    theirs.compose(dp_event.TruncatedSubsampledGaussianDpEvent(1000, 0.01, capacity, 1.0), 100)
    event = TruncatedPoissonGaussian(1.0, 0.01, 100, sample_size=1000, capacity=capacity)
    ours = get_accountant("pld").epsilon([event], 1e-5)
    assert theirs.get_epsilon(1e-5) - 1e-3 < ours < looser * theirs.get_epsilon(1e-5)
