"""Noise of a matrix with a banded inverse: against dense ones, whole, in shards and after restarts."""

import numpy as np
import pytest
import torch

from dptorch.accounting.toeplitz import inverse_square_root
from dptorch.clipping.sums import ClippedSum
from dptorch.errors import PrivacyError
from dptorch.noise import GaussianNoise, InverseBandedNoise
from tests.noise.correlated import KEY, in_shards_after_a_restart, taken

COEFFICIENTS = [np.array([1.0, -0.9]), inverse_square_root(4), inverse_square_root(30)]


def dense(coefficients, steps):
    """The inverse of C."""
    return sum(u * np.eye(steps, k=-i) for i, u in enumerate(coefficients[:steps]))


@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=len)
def test_the_noise_of_a_run_is_that_of_the_dense_inverse(coefficients):
    steps = 12
    found = taken(InverseBandedNoise(0.7, coefficients, steps), steps, norm=2.0, divisor=4.0)
    white = taken(GaussianNoise(1.0), steps)
    wanted = 0.7 * 2.0 / 4.0 * dense(coefficients, steps) @ white
    assert np.allclose(found, wanted, rtol=0, atol=2e-6)


def test_covariance_of_released_noise():
    """10^4 coordinates, which are independent: their covariance over steps is (C'C)^-1."""
    steps, count, u = 6, 10**4, inverse_square_root(3)
    found = taken(InverseBandedNoise(1.0, u, steps), steps, size=count)
    wanted = dense(u, steps) @ dense(u, steps).T
    error = np.sqrt((np.outer(np.diag(wanted), np.diag(wanted)) + wanted**2) / count)
    assert (np.abs(found @ found.T / count - wanted) < 5 * error).all()
    cut = dense(u[:2], steps) @ dense(u[:2], steps).T
    assert (np.abs(found @ found.T / count - cut) > 5 * error).any(), (
        "negative control: a band less"
    )


def test_shards_and_restarts_give_the_noise_of_the_whole():
    steps, u = 9, inverse_square_root(4)
    whole = taken(InverseBandedNoise(1.0, u, steps), steps, size=10_003)
    shards = in_shards_after_a_restart(
        lambda: InverseBandedNoise(1.0, u, steps), steps, size=10_003, restart=5
    )
    assert (shards == whole[5:]).all()


def test_no_memory_is_kept():
    """Neither by the object, nor by what it holds: all of its values are numbers."""
    noise = InverseBandedNoise(1.0, inverse_square_root(8), 20)
    taken(noise, 10, size=1000)
    held = [vars(noise), vars(noise._released), vars(noise._gaussian)]
    assert not any(
        isinstance(v, torch.Tensor | np.ndarray | dict) for vs in held for v in vs.values()
    )
    assert len(noise.state(10)["contexts"]) == 10


def test_one_band_is_independent_noise():
    one = taken(InverseBandedNoise(1.3, [1.0], 4), 4, norm=0.5, divisor=3.0)
    assert (one == taken(GaussianNoise(1.3), 4, norm=0.5, divisor=3.0)).all()


def test_a_step_that_failed_has_no_part_in_later_ones():
    steps, u = 8, inverse_square_root(4)
    found = taken(InverseBandedNoise(1.0, u, steps), steps, skip=(3,))
    matrix = dense(u, steps)
    matrix[:, 3] = 0
    wanted = np.delete(matrix @ taken(GaussianNoise(1.0), steps), 3, axis=0)
    assert np.allclose(found, wanted, atol=2e-6)


def test_what_is_said_of_its_size():
    noise, u = InverseBandedNoise(2.0, [1.0, -0.5], 3), np.array([1.0, -0.5])
    for t in range(2):
        released = noise.privatize(ClippedSum({"w": torch.zeros(3)}, 0.5), KEY, t, divisor=10.0)
        assert released.stddev["w"] == pytest.approx(0.1 * np.linalg.norm(u[: t + 1]))


def test_a_step_is_released_once():
    noise = InverseBandedNoise(1.0, [1.0, -0.5], 4)
    taken(noise, 2)
    with pytest.raises(PrivacyError, match="step 1 was released already"):
        taken(noise, 2, first=1)
    with pytest.raises(PrivacyError, match="noise of 1 of the 2 steps"):
        noise.restore(noise.state(2) | {"contexts": [1]}, 2)
