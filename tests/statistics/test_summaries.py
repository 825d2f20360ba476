"""From sums to numbers: exact without noise, and with noise as far off as is said."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dptorch.statistics.contributions import unit_means
from dptorch.statistics.quantities import Choice, Numeric
from dptorch.statistics.summaries import summarise

LEVELS = (0.05, 0.5, 0.95)


def sums_of(asked, values):
    return np.concatenate(list(unit_means([asked], values[:, None]))).sum(0)


def test_without_noise_it_is_what_numpy_says():
    values = np.random.default_rng(0).normal(40.0, 12.0, 5000).clip(0, 100)
    values[:500] = math.nan
    asked = Numeric("x", (0.0, 100.0), missing=True, bins=200)
    found = summarise([asked], sums_of(asked, values), noise=0.0, units=5000, quantiles=LEVELS)["x"]
    assert found.mean == pytest.approx(np.nanmean(values))
    assert found.deviation == pytest.approx(np.nanstd(values))
    assert found.missing == pytest.approx(0.1)
    for level in LEVELS:
        assert found.quantiles[str(level)] == pytest.approx(np.nanquantile(values, level), abs=0.5)
    assert found.counts == pytest.approx(np.histogram(values, found.edges)[0], abs=1e-6)


@pytest.mark.parametrize("missing", [False, True])
def test_the_noise_is_as_large_as_is_said(missing):
    values = np.random.default_rng(1).gamma(2.0, 12.0, 4000).clip(0, 200)
    values[:800] = math.nan if missing else 5.0
    asked = Numeric("x", (0.0, 200.0), missing=missing, bins=0)
    exact, chance = sums_of(asked, values), np.random.default_rng(2)
    runs = [
        summarise(
            [asked],
            exact + chance.normal(0, 15.0, exact.shape),
            noise=15.0,
            units=4000,
            quantiles=(),
        )["x"]
        for _ in range(2000)
    ]
    means, deviations = np.array([[r.mean, r.deviation] for r in runs]).T
    stated = np.mean([[r.mean_noise, r.deviation_noise] for r in runs], axis=0)
    assert stated[0] == pytest.approx(means.std(), rel=0.08)
    assert stated[1] == pytest.approx(deviations.std(), rel=0.08)
    # The broken twin: half the noise would be said.
    assert stated[0] != pytest.approx(means.std() / 2, rel=0.3)


def test_the_noise_of_a_histogram_is_as_large_as_is_said():
    """And that of shares far smaller than if counts with noise were added up."""
    asked, chance, bins = Numeric("x", (0.0, 1.0), bins=256), np.random.default_rng(4), 256
    size = 2 + bins
    runs = [
        summarise([asked], chance.normal(0, 3.0, size), noise=3.0, units=100, quantiles=())["x"]
        for _ in range(500)
    ]
    counts = np.array([run.counts for run in runs])
    assert counts.std(0).max() == pytest.approx(runs[0].count_noise, rel=0.15)
    shares = (counts.cumsum(1) / 100).std(0)
    assert shares.max() == pytest.approx(runs[0].share_noise, rel=0.15)
    assert runs[0].share_noise < 0.2 * 3.0 * math.sqrt(bins) / 100


def test_quantiles_rise_whatever_the_noise():
    asked = Numeric("x", (0.0, 1.0), bins=50)
    levels = tuple(np.linspace(0.02, 0.98, 30))
    chance = np.random.default_rng(3)
    for _ in range(50):
        sums = np.concatenate([[0.0, 0.0], chance.normal(2.0, 30.0, 50)])
        found = summarise([asked], sums, noise=30.0, units=100, quantiles=levels)["x"]
        values = list(found.quantiles.values())
        assert values == sorted(values)
        assert 0.0 <= values[0] <= values[-1] <= 1.0


def test_noise_beyond_all_values_gives_numbers_within_bounds():
    asked = Numeric("x", (10.0, 20.0), missing=True, bins=2)
    for sign in (1.0, -1.0):
        sums = np.array([sign * 1e6, -sign * 1e6, sign * 1e6, sign * 1e6, 0.0])
        found = summarise([asked], sums, noise=1e6, units=10, quantiles=(0.5,))["x"]
        assert 10.0 <= found.mean <= 20.0
        assert 0.0 <= found.deviation <= 5.0
        assert 0.0 <= found.missing <= 0.9
        assert 10.0 <= found.quantiles["0.5"] <= 20.0
        assert math.isfinite(found.deviation_noise)


def test_counts_have_their_values():
    asked = Choice("sex", ("f", "m"))
    found = summarise([asked], np.array([3.0, -1.5]), noise=2.0, units=9, quantiles=())["sex"]
    assert (dict(found.counts), found.count_noise) == ({"f": 3.0, "m": -1.5}, 2.0)
    assert str(found) == "f: 3.0, m: -1.5 (± 2)"
