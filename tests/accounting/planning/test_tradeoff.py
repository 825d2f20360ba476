"""Trade-off curves and their Gaussian summary."""

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from dptorch.accounting import SampledGaussian, gaussian_fit, trade_off_curve
from dptorch.errors import ConfigurationError


def test_gaussian_curve_in_closed_form():
    run = [SampledGaussian(2.0, 1.0, 4)]
    fpr, fnr = trade_off_curve(run)
    truth = ndtr(ndtri(1 - fpr) - 1.0)
    assert np.all(fnr <= truth + 1e-9)
    assert np.all(fnr >= truth - 2e-3)


@pytest.mark.parametrize("adjacency", ["add-remove", "replace-one"])
def test_no_threshold_attack_beats_the_curve(adjacency):
    """One sampled step, attacked by every threshold on its output: a real test's (FPR, FNR)."""
    sigma, rate = 0.7, 0.3
    x = np.linspace(-4, 5, 200)
    absent = ndtr(-x / sigma)
    if adjacency == "replace-one":
        absent = (1 - rate) * absent + rate * ndtr(-(x + 1) / sigma)
    present = (1 - rate) * ndtr(x / sigma) + rate * ndtr((x - 1) / sigma)
    fpr, fnr = trade_off_curve([SampledGaussian(sigma, rate, 1)], adjacency=adjacency, fpr=absent)
    assert np.all(present >= fnr - 1e-9)
    if adjacency == "replace-one":
        assert np.max(present - fnr) < 5e-3, "thresholds are optimal there, so the curve is met"
    assert np.all(np.diff(fnr[np.argsort(fpr)]) <= 1e-12)


def test_half_the_noise_would_be_caught():
    """Negative control: the curve of a noisier run claims too much about this one."""
    x = np.linspace(-4, 5, 200)
    _, claimed = trade_off_curve([SampledGaussian(2.0, 1.0, 1)], fpr=ndtr(-x))
    assert np.any(ndtr(x - 1) < claimed - 0.05)


@pytest.mark.slow
def test_summary():
    fit = gaussian_fit([SampledGaussian(1.0, 0.01, 1000)])
    assert 0.41 < fit.mu < 0.6
    assert 0 < fit.misfit < 0.05
    assert gaussian_fit([]).mu == 0.0
    assert np.all(trade_off_curve([SampledGaussian(0.0, 0.1, 1)])[1] == 0)


def test_rates_are_rates():
    with pytest.raises(ConfigurationError, match="rates"):
        trade_off_curve([SampledGaussian(1.0, 0.1, 1)], fpr=np.array([0.5, 1.5]))
