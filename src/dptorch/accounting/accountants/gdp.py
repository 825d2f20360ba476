"""The central-limit accountant: an approximation by a formula, which guarantees nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dptorch.accounting.accountants.protocol import Compositions, PairAccountant
from dptorch.accounting.pairs.sampled import Pair, SampledPair, gaussian_delta, gaussian_epsilon
from dptorch.errors import warn

__all__ = ["GDPAccountant", "central_limit_mu"]


@dataclass(frozen=True)
class GDPAccountant(PairAccountant):
    """μ-GDP of a run by the central limit theorem (Bu et al. 2020, arXiv:1911.11607).

    Not a bound: the limit is approached from below as often as not, and at low sampling rates it
    can miss by any factor (ε 0.26 for a true 1.71 in a web-scale setting). Every answer warns so,
    except for histories without sampling, where μ is exact.

    Example:
        >>> from dptorch.accounting import SampledGaussian
        >>> gaussian = [SampledGaussian(noise_multiplier=10.0, sample_rate=1.0, steps=100)]
        >>> round(GDPAccountant().epsilon(gaussian, 1e-5), 4)
        4.3772
    """

    name: str = "gdp"
    is_upper_bound: bool = False

    def _epsilon(self, compositions: Compositions, delta: float) -> float:
        mu = _limit(compositions)
        return gaussian_epsilon(delta, mu) if math.isfinite(mu) else math.inf

    def _delta(self, compositions: Compositions, epsilon: float) -> float:
        mu = _limit(compositions)
        return gaussian_delta(epsilon, mu) if math.isfinite(mu) else 1.0


def _limit(compositions: Compositions) -> float:
    if any(pair.mu is None for pairs in compositions for pair in pairs):
        warn(
            "accountant 'gdp' uses the central limit theorem: its numbers are no bound and can be far "
            "too small. Use 'exact' to plan and 'pld' to state."
        )
    return max(central_limit_mu(pairs) for pairs in compositions)


def central_limit_mu(pairs: Sequence[Pair]) -> float:
    """μ of the limit: sqrt(Σ steps · E_N(0)[(P/N(0) - Q/N(0))²]), exact where nothing is sampled.

    The expectation is q² (e^{1/σ²} - 1) under add/remove and 4 q² sinh(1/σ²) under replace-one.

    Example:
        >>> round(central_limit_mu([SampledPair("remove", 1.0, sample_rate=0.01, steps=1000)]), 4)
        0.4145
    """
    total = 0.0
    for pair in pairs:
        if pair.mu is not None:
            total += pair.steps * pair.mu**2
            continue
        assert isinstance(pair, SampledPair)
        precision = 1 / pair.noise_multiplier**2
        if precision > 700:
            return math.inf
        replace = pair.direction == "replace"
        spread = 4 * math.sinh(precision) if replace else math.expm1(precision)
        total += pair.steps * pair.sample_rate**2 * spread
    return math.sqrt(total)
