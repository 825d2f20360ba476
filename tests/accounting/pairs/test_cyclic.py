"""Banded noise on cyclic Poisson samples: the stated δ against the joint law of all releases.

The oracle knows nothing of bands, turns or compositions: it sums the density of the released vector,
Cx + z, over all ways in which a record can have taken part.
"""

import itertools

import numpy as np
import pytest

from dptorch import accounting
from dptorch.accounting import CyclicGaussian
from dptorch.accounting.toeplitz import column_norms, square_root

STEPS, BANDS, RATE, NOISE = 7, 3, 0.4, 0.8
SAMPLES = 200_000


def strategy():
    """C with columns of norm 1, [STEPS, STEPS], from its definition."""
    found = sum(c * np.eye(STEPS, k=-i) for i, c in enumerate(square_root(BANDS)))
    return found / np.linalg.norm(found, axis=0)


def cyclic(group):
    """(pattern of participation, its probability) of a record in a group."""
    return drawn_in(range(group, STEPS, BANDS))


def drawn_in(turns):
    for coins in itertools.product((0, 1), repeat=len(turns)):
        pattern = np.zeros(STEPS)
        pattern[list(turns)] = coins
        yield pattern, np.prod(np.where(coins, RATE, 1 - RATE))


def deltas(law, epsilon, value=1.0, other=0.0):
    """Estimates of δ(ε) from with to without and back, with their standard errors."""
    rng = np.random.default_rng(5)
    patterns, weights = (np.array(x) for x in zip(*law, strict=True))
    means = patterns @ strategy().T
    noise = NOISE * rng.standard_normal((SAMPLES, STEPS))

    def log_density(y, size):
        exponents = (y @ means.T) * size - (size * means**2 * size).sum(axis=1) / 2
        return np.log(np.exp(exponents / NOISE**2) @ weights)  # over that of noise alone

    chosen = rng.choice(len(weights), SAMPLES, p=weights)
    found = []
    for p, q in ((value, other), (other, value)):
        y = means[chosen] * p + noise
        loss = log_density(y, p) - log_density(y, q)
        gain = np.maximum(0.0, -np.expm1(epsilon - loss))
        found.append((gain.mean(), gain.std() / np.sqrt(SAMPLES)))
    return found


def stated(epsilon, adjacency="zero-out"):
    event = CyclicGaussian(NOISE, RATE, BANDS, STEPS)
    return accounting.get_accountant("exact").delta([event], epsilon, adjacency=adjacency)


@pytest.mark.parametrize("group", range(BANDS))
def test_no_record_is_told_better_than_stated(group):
    for epsilon in (0.5, 1.5):
        found = deltas(cyclic(group), epsilon)
        assert all(mean < stated(epsilon) + 5 * error for mean, error in found)
        if group == 0:  # three turns, as many as are stated
            mean, error = max(found)
            assert mean > stated(epsilon) - 5 * error


def test_a_replaced_record_is_not_told_better_than_stated():
    found = deltas(cyclic(0), 1.5, 1.0, -1.0)
    mean, error = max(found)
    assert abs(mean - stated(1.5, "replace-one")) < 5 * error


def test_a_record_that_comes_again_too_soon_is_told_better():
    """The broken twin: groups are dealt anew in each turn, and a record is of the last one, then of the
    first. It has as many turns, at the same rate, under the same noise."""
    mean, error = max(deltas(drawn_in([2, 3, 6]), 1.5))
    assert mean > 1.1 * stated(1.5) + 5 * error


def test_columns_have_norm_one():
    whole = sum(c * np.eye(STEPS, k=-i) for i, c in enumerate(square_root(BANDS)))
    assert np.linalg.norm(whole, axis=0) == pytest.approx(column_norms(square_root(BANDS), STEPS))


def test_one_band_is_poisson_sampling():
    from dptorch.accounting import SampledGaussian

    one = accounting.get_accountant("pld").epsilon([CyclicGaussian(1.0, 0.05, 1, 40)], 1e-5)
    assert one == accounting.get_accountant("pld").epsilon([SampledGaussian(1.0, 0.05, 40)], 1e-5)


def test_a_turn_that_was_begun_counts():
    turns = [CyclicGaussian(1.0, 0.4, 8, steps).turns for steps in (0, 1, 8, 9)]
    assert turns == [0, 1, 1, 2]
    halves = [CyclicGaussian(1.0, 0.4, 8, 4)] * 2  # perhaps of two runs
    assert sum(event.turns for event in accounting.merge(halves)) == 2
