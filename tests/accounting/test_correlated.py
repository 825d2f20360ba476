"""Correlated noise: its sensitivity by brute force, its cost in closed form."""

import itertools
import math

import numpy as np
import pytest

from dptorch import accounting
from dptorch.accounting import CorrelatedGaussian, strategy_sensitivity
from dptorch.accounting.pairs.sampled import gaussian_epsilon
from dptorch.errors import ConfigurationError


def patterns(steps, picks, separation):
    for size in range(1, picks + 1):
        for chosen in itertools.combinations(range(steps), size):
            if all(b - a >= separation for a, b in itertools.pairwise(chosen)):
                yield list(chosen)


def banded(steps, bands, rng):
    full = np.tril(rng.standard_normal((steps, steps)))
    return full - np.tril(full, -bands)


@pytest.mark.parametrize(("picks", "separation"), [(1, 1), (2, 3), (3, 2), (9, 2), (4, 4)])
def test_banded_strategies_by_enumeration(picks, separation):
    """Every pattern, every sign of a scalar record: the largest change is the sensitivity."""
    rng = np.random.default_rng(picks)
    matrix = banded(7, separation, rng)
    worst = 0.0
    for chosen in patterns(7, picks, separation):
        for signs in itertools.product((-1, 1), repeat=len(chosen)):
            worst = max(worst, float(np.linalg.norm(matrix[:, chosen] @ np.array(signs))))
    found = strategy_sensitivity(matrix, participations=picks, min_separation=separation)
    assert found == pytest.approx(worst, rel=1e-12)


def test_overlapping_columns_get_a_bound():
    rng = np.random.default_rng(1)
    matrix = np.tril(rng.standard_normal((7, 7)))
    worst = max(
        float(np.linalg.norm(matrix[:, chosen] @ np.array(signs)))
        for chosen in patterns(7, 3, 2)
        for signs in itertools.product((-1, 1), repeat=len(chosen))
    )
    found = strategy_sensitivity(matrix, participations=3, min_separation=2)
    assert worst < found < 2 * worst
    squares = math.sqrt(sum(sorted((matrix**2).sum(axis=0))[-3:]))
    assert squares < worst, "negative control: adding squares is no bound where columns overlap"


def test_white_noise_is_the_plain_gaussian_mechanism():
    sensitivity = strategy_sensitivity(np.eye(100), participations=9, min_separation=10)
    event = CorrelatedGaussian(3.0, sensitivity)
    found = accounting.get_accountant("pld").epsilon([event], 1e-5)
    assert found == pytest.approx(gaussian_epsilon(1e-5, 1.0), rel=1e-9)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (np.ones((3, 3)), "lower triangular"),
        (np.ones((3, 2)), "shape"),
        (np.full((2, 2), np.nan), "finite"),
    ],
)
def test_bad_strategies(strategy, message):
    with pytest.raises(ConfigurationError, match=message):
        strategy_sensitivity(strategy, participations=1, min_separation=1)
    with pytest.raises(ConfigurationError, match="participations=0"):
        strategy_sensitivity(np.eye(2), participations=0, min_separation=1)
