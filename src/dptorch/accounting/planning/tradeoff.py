"""Trade-off curves: error rates that an attacker who guesses membership can reach, and a summary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dptorch.accounting.accountants.coverage import PAIRS
from dptorch.accounting.accountants.pld import PLDAccountant
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.composition.composed import composed_epsilon
from dptorch.accounting.events import Event, History
from dptorch.accounting.pairs.reduction import reduce_history
from dptorch.accounting.pairs.sampled import Array
from dptorch.errors import ConfigurationError

__all__ = ["GaussianFit", "gaussian_fit", "trade_off_curve"]

_SMALLEST_FPR = 1e-5


@dataclass(frozen=True)
class GaussianFit:
    """A run's trade-off curve summarised by one number.

    Attributes:
        mu: the smallest μ whose Gaussian trade-off curve lies below the run's at every false
            positive rate (and false negative rate) of at least 1e-5.
        misfit: the smallest κ such that the run's curve, shifted by κ towards the attacker in both
            rates, lies below the Gaussian one: 0 for a perfect fit (Gomez et al. 2025,
            arXiv:2503.10945, call it regret).
    """

    mu: float
    misfit: float


def trade_off_curve(
    history: History,
    *,
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    fpr: Array | None = None,
) -> tuple[Array, Array]:
    """The least false negative rate of any membership test, by its false positive rate.

    Args:
        fpr: [n] rates in [0, 1]; by default 201 of them, denser near 0 and 1.

    Returns:
        fpr: [n]
        fnr: [n] lower bounds: no attack on the run errs less (Dong, Roth, Su 2019,
            arXiv:1905.02383, Proposition 2.12, applied to the `pld` accountant's δ(ε)).

    Raises:
        ConfigurationError: a rate outside [0, 1].

    Example:
        >>> from dptorch.accounting import SampledGaussian
        >>> run = [SampledGaussian(noise_multiplier=1.0, sample_rate=1.0, steps=1)]
        >>> fpr, fnr = trade_off_curve(run, fpr=np.array([0.0, 0.5, 1.0]))
        >>> fnr.round(3).tolist()  # at 1/2: Φ(-1)
        [1.0, 0.159, 0.0]
    """
    relation = Adjacency.of(adjacency)
    if fpr is None:
        half = np.concatenate([[0.0], np.geomspace(1e-6, 0.5, 100)])
        fpr = np.concatenate([half, 1 - half[-2::-1]])
    fpr = np.asarray(fpr, float)
    if not np.all((fpr >= 0) & (fpr <= 1)):
        raise ConfigurationError(f"fpr={fpr.tolist()} must lie in [0, 1]: they are rates.")
    # Each ε gives a bound, so too few of them give the attacker too much, never too little.
    epsilons, deltas = _profile(tuple(history), relation)
    # One line of (ε, δ)-DP and its mirror image for each ε; the curve is their upper envelope.
    falling = 1 - deltas[:, None] - np.exp(epsilons)[:, None] * fpr
    mirrored = np.exp(-epsilons)[:, None] * (1 - deltas[:, None] - fpr)
    fnr = np.maximum(np.maximum(falling, mirrored).max(axis=0), 0.0)
    return fpr, fnr


def gaussian_fit(
    history: History, *, adjacency: Adjacency | str = Adjacency.ADD_REMOVE
) -> GaussianFit:
    """Summarise a run's trade-off curve by the μ of a Gaussian one, and say how badly it fits.

    Example:
        >>> from dptorch.accounting import SampledGaussian
        >>> fit = gaussian_fit([SampledGaussian(noise_multiplier=2.0, sample_rate=1.0, steps=4)])
        >>> round(fit.mu, 2), fit.misfit < 1e-3
        (1.0, True)
    """
    from scipy.special import ndtr, ndtri

    grid = np.geomspace(_SMALLEST_FPR, 0.5, 400)
    fpr = np.concatenate([grid, 1 - grid[-2::-1]])
    _, fnr = trade_off_curve(history, adjacency=adjacency, fpr=fpr)
    # On the diagonal (no leak) rounding alone would make a μ; below 1e-5 the δ of 1e-8 begins to show.
    seen = (fnr >= _SMALLEST_FPR) & (fnr < 1 - fpr - 1e-12)
    # fnr = Φ(Φ⁻¹(1 - fpr) - μ), solved for μ at each point; the largest is needed for all.
    mu = float(np.max(-ndtri(fnr[seen]) - ndtri(fpr[seen]), initial=0.0))
    gaussian = ndtr(-mu - ndtri(fpr))
    # What is moved further is lower everywhere, so bisection finds the least shift.
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        shift = (low + high) / 2
        moved = np.interp(fpr + shift, fpr, fnr, right=0.0) - shift
        low, high = (low, shift) if np.all(moved <= gaussian + 1e-9) else (shift, high)
    return GaussianFit(mu, high)


@lru_cache(maxsize=4)  # a page about an audit asks for the curve of one run a dozen times
def _profile(history: tuple[Event, ...], relation: Adjacency) -> tuple[Array, Array]:
    """(ε, δ) pairs that shape the curve: from ε = 0 to where δ is 1e-8."""
    run = reduce_history(history, relation, PAIRS["pld"])
    if run.noiseless:
        return np.zeros(1), np.ones(1)
    if not run.compositions:
        return np.zeros(1), np.zeros(1)
    last = max(composed_epsilon(pairs, 1e-8) for pairs in run.compositions)
    epsilons = np.linspace(0.0, max(last, 1e-9), 200)
    return epsilons, PLDAccountant().profile(history, epsilons, adjacency=relation)
