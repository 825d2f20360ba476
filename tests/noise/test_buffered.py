"""Noise of buffered Toeplitz matrices: against dense ones, whole, in shards and after restarts."""

import numpy as np
import pytest
import torch

from dptorch.accounting.buffered import Buffers
from dptorch.clipping.sums import ClippedSum
from dptorch.errors import PrivacyError
from dptorch.noise import BufferedNoise, GaussianNoise, recursive
from dptorch.noise.compiled import compiled
from dptorch.noise.normal import KEYSTREAM_BLOCK
from tests.noise.correlated import KEY, in_shards_after_a_restart, taken

ONE = (0.6, 0.7)
THREE = (0.02, 0.15, 0.3, 0.999, 0.9, 0.2)


def dense(coefficients, steps):
    """C, entry by entry."""
    scales, decays = np.split(np.array(coefficients), 2)
    found = np.eye(steps)
    for t in range(steps):
        for s in range(t):
            found[t, s] = (scales * decays ** (t - s - 1)).sum()
    return found


@pytest.mark.parametrize("coefficients", [ONE, THREE], ids=len)
def test_buffered_noise_is_that_of_the_dense_matrix(coefficients):
    steps = 12
    noise = BufferedNoise(0.7, coefficients, steps)
    found = taken(noise, steps, norm=2.0, divisor=4.0)
    matrix = np.linalg.inv(dense(coefficients, steps))
    wanted = 0.7 * 2.0 / 4.0 * matrix @ taken(GaussianNoise(1.0), steps)
    assert np.allclose(found, wanted, rtol=0, atol=2e-6)
    assert noise._stddevs == pytest.approx(np.linalg.norm(matrix, axis=1))


def test_covariance_of_released_buffered_noise():
    """10^4 coordinates, which are independent: their covariance over steps is (C'C)^-1."""
    steps, count = 6, 10**4
    found = taken(BufferedNoise(1.0, THREE, steps), steps, size=count)
    wanted = np.linalg.inv(dense(THREE, steps).T @ dense(THREE, steps))
    error = np.sqrt((np.outer(np.diag(wanted), np.diag(wanted)) + wanted**2) / count)
    assert (np.abs(found @ found.T / count - wanted) < 5 * error).all()
    fewer = (THREE[0], THREE[2], THREE[3], THREE[5])
    lost = np.linalg.inv(dense(fewer, steps).T @ dense(fewer, steps))
    one = taken(BufferedNoise(1.0, fewer, steps), steps, size=count)
    assert (np.abs(one @ one.T / count - lost) < 5 * error).all()
    assert (np.abs(one @ one.T / count - wanted) > 5 * error).any(), "negative control: one lost"


def test_shards_and_restarts_give_the_buffered_noise_of_the_whole():
    steps = 9
    whole = taken(BufferedNoise(1.0, THREE, steps), steps, size=70_003)
    shards = in_shards_after_a_restart(
        lambda: BufferedNoise(1.0, THREE, steps), steps, size=70_003, restart=5
    )
    assert (shards == whole[5:]).all()


def test_a_restart_with_a_buffer_lost_is_not_the_run():
    """The broken twin: rows that stay at zero. What is made again from the contexts is the run."""
    steps = 6
    whole = taken(BufferedNoise(1.0, THREE, steps), steps)
    noise = BufferedNoise(1.0, THREE, steps)
    taken(noise, 5)
    again = BufferedNoise(1.0, THREE, steps)
    again.restore(noise.state(5), 5)
    assert (taken(again, steps, first=5) == whole[5:]).all()
    noise._buffers[0][1].zero_()
    assert np.abs(taken(noise, steps, first=5) - whole[5:]).max() > 0.05
    with pytest.raises(PrivacyError, match="noise of 4 of the 5 steps"):
        again.restore({"contexts": [1, 2, 3, 4], "made_on": []}, 5)


def test_the_compiled_pass_makes_the_buffered_bits_of_torch(monkeypatch):
    library = compiled()
    if library is None or not library.has_cipher:
        pytest.skip("nothing is compiled here: the other path is the only one")

    def run():
        noise = BufferedNoise(1.3, THREE, 4)
        early = taken(noise, 3, size=300_001, divisor=17.3, skip=(1,))
        again = BufferedNoise(1.3, THREE, 4)
        again.restore(noise.state(3), 3)
        return np.concatenate([early, taken(again, 4, size=300_001, first=3, divisor=17.3)])

    found = run()
    monkeypatch.setattr(recursive, "pass_over", lambda spans: (None, [], 1))
    assert (run() == found).all()


def test_a_failed_step_is_made_good(monkeypatch):
    """Its number is spent and nobody saw its noise; rows that it left half done are made again."""
    steps = 8
    noise = BufferedNoise(1.0, THREE, steps)
    first = taken(noise, 3)
    with monkeypatch.context() as patch:
        patch.setattr(noise, "_advance", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            taken(noise, 4, first=3)
    noise._buffers[0][0] = 7.0
    found = np.concatenate([first, taken(noise, steps, first=4)])
    matrix = dense(THREE, steps)
    matrix[4:, 3] = 0
    wanted = np.linalg.inv(matrix) @ taken(GaussianNoise(1.0), steps)
    assert np.allclose(found, np.delete(wanted, 3, axis=0), atol=3e-6)


def test_memory_is_the_buffers():
    """After a hundred steps as after one; and a block of noise while a step is taken."""
    noise = BufferedNoise(1.0, THREE, 101)
    taken(noise, 100, size=3)
    noise = BufferedNoise(1.0, THREE, 101)
    taken(noise, 1, size=2**18)
    assert [b.shape for b in noise._buffers.values()] == [(len(Buffers.of(THREE).scales), 2**18)]
    sums = ClippedSum({"weight": torch.zeros(2**18)}, 1.0)
    with torch.profiler.profile(profile_memory=True) as profile:
        noise.privatize(sums, KEY, 1)
    largest = max(e.self_cpu_memory_usage / max(1, e.count) for e in profile.key_averages())
    assert largest <= 4 * KEYSTREAM_BLOCK
    assert [b.shape for b in noise._buffers.values()] == [(3, 2**18)]
