"""Noise of answers: its laws, and that no number is given out twice."""

import os
import threading

import numpy as np
import pytest
from scipy import stats

from dptorch.errors import PrivacyError
from dptorch.noise.draws import Draws, _exponential
from dptorch.randomness import RootKey


def test_laws():
    draws = Draws(RootKey.from_seed(1))
    for found, law in [
        (draws.normal((40_000,)), stats.norm),
        (draws.laplace((40_000,)), stats.laplace),
        (draws.gumbel((40_000,)), stats.gumbel_r),
        (draws.exponential((40_000,)), stats.expon),
    ]:
        assert stats.kstest(found, law.cdf).pvalue > 1e-3


def test_a_law_of_another_scale_would_be_caught():
    found = 1.05 * Draws(RootKey.from_seed(1)).normal((40_000,))
    assert stats.kstest(found, stats.norm.cdf).pvalue < 1e-3


def test_the_ends_are_finite_and_precise():
    words = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1], np.uint64)
    found = _exponential(words)
    assert np.isfinite(found).all()
    assert (np.diff(found.take([0, 1, 2, 4, 5])) < 0).all()
    assert found[3] == found[2] == -np.log(0.5)
    assert found[0] > 45  # the tail reaches 2^-65
    assert 0 < found[-1] < 2.0**-64  # and values near 0 keep their digits


def test_threads_never_share_a_number():
    draws = Draws(RootKey.from_seed(2))
    taken = []

    def take():
        for size in (1, 7, 1000, 30_000):
            taken.append(draws.normal((size,)))
            taken.append(draws.exponential((size,)))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = np.concatenate(taken)
    assert everything.size == 8 * 2 * 31_008
    assert np.unique(everything).size == everything.size


def test_keys_and_kinds_have_streams_of_their_own():
    one, other = Draws(RootKey.from_seed(3)), Draws(RootKey.from_seed(4))
    assert not np.isin(one.normal((1000,)), other.normal((1000,))).any()
    assert (
        Draws(RootKey.from_seed(3)).normal((5,)) == Draws(RootKey.from_seed(3)).normal((5,))
    ).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_fork_draws_no_number_of_its_parent():
    draws = Draws(RootKey.from_seed(0))
    child = os.fork()
    if child == 0:
        refused = 0
        try:
            for draw in (draws.normal, draws.laplace):
                try:
                    draw((1,))
                except PrivacyError:
                    refused += 1
            # Broken twin: the keys of the streams came along, and only the check refuses.
            draws._process = os.getpid()
            again = Draws(RootKey.from_seed(0))
            refused += int((draws.normal((1,)) == again.normal((1,))).all())
        finally:
            os._exit(refused)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3
    assert draws.normal((1,)) == Draws(RootKey.from_seed(0)).normal((1,))
