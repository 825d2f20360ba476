"""Buffered Toeplitz strategies: published numbers, dense matrices, brute force over participations."""

import itertools
import math

import numpy as np
import pytest

from dptorch.accounting import BufferedGaussian, get_accountant
from dptorch.accounting.buffered import (
    Buffers,
    best_buffers,
    buffered_error,
    optimised_buffers,
    sensitivity_of,
)
from dptorch.accounting.pairs.sampled import gaussian_epsilon
from dptorch.accounting.toeplitz import inverse, square_root, workload_error
from dptorch.errors import ConfigurationError

THREE = Buffers((0.02, 0.15, 0.3), (0.999, 0.9, 0.2))


def dense(buffers, steps):
    """C, entry by entry."""
    found = np.eye(steps)
    for t in range(steps):
        for s in range(t):
            found[t, s] = sum(
                w * d ** (t - s - 1) for w, d in zip(buffers.scales, buffers.decays, strict=True)
            )
    return found


def test_two_buffers_are_those_of_another_library():
    """jax_privacy's tests hold them, for the least noise in the last of 10^5 sums."""
    found = optimised_buffers(2, 10**5, 10**5, worst=True)
    assert found.scales == pytest.approx((0.0122853238, 0.1878393665), rel=1e-5)
    assert found.decays == pytest.approx((0.9999528892, 0.9857068667), rel=1e-5)
    assert 1 - np.array(found.decays) == pytest.approx((4.71108e-5, 0.0142931333), rel=1e-5)


@pytest.mark.parametrize(
    ("steps", "count", "bound"),
    [
        (10, 1, 1.04),
        (100, 2, 1.03),
        (10**3, 3, 1.03),
        (10**4, 1, 1.45),
        (10**4, 4, 1.03),
        (10**5, 2, 1.16),
        (10**6, 5, 1.05),
        (10**8, 7, 1.05),
    ],
)
def test_errors_are_within_those_of_another_library(steps, count, bound):
    """As jax_privacy's tests bound them, over 1 + log(n) / π, near which no matrix can be bettered."""
    found = buffered_error(
        optimised_buffers(count, steps, steps, worst=True), steps, steps, worst=True
    )
    assert 0.99 < found / (1 + math.log(steps) / math.pi) <= bound


@pytest.mark.parametrize(
    ("steps", "separation"), [(1, 1), (2, 1), (7, 3), (12, 4), (60, 60), (64, 7)]
)
@pytest.mark.parametrize(
    "buffers", [THREE, Buffers((0.5,), (0.3,)), Buffers((0.9, 0.1), (0.0, 0.5))]
)
def test_closed_forms_are_those_of_dense_matrices(buffers, steps, separation):
    """The second has an inverse with a θ̂ below 0."""
    c = dense(buffers, steps)
    u = np.linalg.inv(c)
    assert np.allclose(buffers.strategy(steps), c[:, 0])
    assert np.allclose(buffers.inverse(steps), u[:, 0])
    columns = c[:, range(0, steps, separation)].sum(axis=1)
    assert sensitivity_of(buffers, steps, separation) == pytest.approx(np.linalg.norm(columns))
    squares = (np.tril(np.ones((steps, steps))) @ u) ** 2
    for worst, wanted in ((False, squares.sum(axis=1).mean()), (True, squares.sum(axis=1)[-1])):
        found = buffered_error(buffers, steps, separation, worst=worst)
        assert found == pytest.approx(np.linalg.norm(columns) * math.sqrt(wanted), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 5, 12])
@pytest.mark.parametrize(
    "buffers", [THREE, Buffers((1.0,), (0.99,)), Buffers((0.5, 0.4), (0.9, 0.1))]
)
def test_buffered_sensitivity_by_enumeration(steps, buffers):
    """All ways of taking part 3 steps apart, and all contributions that point one way or the other."""
    matrix, worst = dense(buffers, steps), 0.0
    for size in range(1, steps + 1):
        for chosen in itertools.combinations(range(steps), size):
            if all(b - a >= 3 for a, b in itertools.pairwise(chosen)):
                signs = np.array(list(itertools.product((-1, 1), repeat=size)))
                worst = max(worst, np.linalg.norm(signs @ matrix[:, chosen].T, axis=1).max())
    assert sensitivity_of(buffers, steps, 3) == pytest.approx(worst)


def test_the_sensitivity_of_buffers_that_are_not_used_is_wrong():
    """The broken twin: with a buffer left out the sensitivity is smaller than that of the noise's C."""
    cut = Buffers(THREE.scales[1:], THREE.decays[1:])
    steps, separation = 12, 4
    truth = np.linalg.norm(dense(THREE, steps)[:, ::separation].sum(axis=1))
    assert sensitivity_of(THREE, steps, separation) == pytest.approx(truth)
    assert sensitivity_of(cut, steps, separation) < 0.98 * truth


def test_found_buffers_cannot_be_bettered_nearby():
    steps, separation = 500, 100
    found = optimised_buffers(2, steps, separation)
    least = buffered_error(found, steps, separation)
    for i, j in itertools.product(range(4), (-1e-3, 1e-3)):
        moved = np.array(found.coefficients)
        moved[i] *= 1 + (j if i < 2 else j * (1 - moved[i]))
        assert buffered_error(Buffers.of(tuple(moved)), steps, separation) > least * (1 - 1e-10)
    rounded = best_buffers(steps, separation, 2)
    assert buffered_error(rounded, steps, separation) == pytest.approx(least, rel=1e-8)
    assert rounded.coefficients != found.coefficients


def test_a_few_buffers_are_nearly_the_square_root():
    """For one pass, which no Toeplitz matrix serves better by more than a little."""
    steps = 1000
    whole = float(np.linalg.norm(square_root(steps))) * workload_error(square_root(steps), steps)
    found = best_buffers(steps, steps)
    assert 1 < len(found.scales) < 5
    assert buffered_error(found, steps, steps) < 1.02 * whole
    assert len(best_buffers(20, 20).scales) == 1


def test_a_run_is_one_gaussian_mechanism():
    event = BufferedGaussian(3.0, THREE.coefficients, separation=4, steps=10)
    sensitivity = np.linalg.norm(dense(THREE, 10)[:, [0, 4, 8]].sum(axis=1))
    wanted = gaussian_epsilon(1e-5, sensitivity / 3.0)
    for name in ("exact", "pld"):
        found = get_accountant(name).epsilon([event], 1e-5, adjacency="zero-out")
        assert found == pytest.approx(wanted, rel=1e-3)
    assert type(event).from_dict(event.to_dict()) == event
    assert np.allclose(inverse(event.strategy(10), 10), THREE.inverse(10))


@pytest.mark.parametrize(
    ("scales", "decays", "message"),
    [
        ((0.5,), (), "as many"),
        ((0.5, -0.1), (0.5, 0.1), "above 0"),
        ((0.5,), (1.0,), r"in \[0, 1\)"),
        ((0.7, 0.4), (0.5, 0.1), "at most 1"),
        ((math.nan,), (0.5,), "scales"),
    ],
)
def test_buffers_that_cannot_be(scales, decays, message):
    with pytest.raises(ConfigurationError, match=message):
        Buffers(scales, decays)
