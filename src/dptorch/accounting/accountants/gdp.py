"""The central-limit accountant: a formula, not a guarantee."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from dptorch.accounting.accountants.protocol import (
    check_delta,
    check_epsilon,
    covered,
    without_noise,
)
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.dominating import gaussian_delta, gaussian_epsilon
from dptorch.accounting.events import Event, History, SampledGaussian
from dptorch.errors import PrivacyWarning

__all__ = ["GDPAccountant", "central_limit_mu"]


@dataclass(frozen=True)
class GDPAccountant:
    """μ-GDP of a run by the central limit theorem (Bu et al. 2020, arXiv:1911.11607).

    Not a bound: the limit is approached from below as often as not, and at low sampling rates it
    can miss by any factor (ε 0.26 for a true 1.71 in a web-scale setting). Every answer warns so,
    except for histories without sampling, where μ is exact.

    Example:
        >>> gaussian = [SampledGaussian(noise_multiplier=10.0, sample_rate=1.0, steps=100)]
        >>> round(GDPAccountant().epsilon(gaussian, 1e-5), 4)
        4.3772
    """

    name: str = "gdp"
    is_upper_bound: bool = False

    def covers(self, event: Event) -> bool:
        """Whether `event` is a Poisson-sampled Gaussian."""
        return isinstance(event, SampledGaussian)

    def epsilon(
        self,
        history: History,
        delta: float,
        *,
        adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    ) -> float:
        """Estimate of ε; see `Accountant.epsilon`. Warns with `PrivacyWarning`."""
        delta, relation = check_delta(delta), Adjacency.of(adjacency)
        events = covered(self, history)
        if not events:
            return 0.0
        if without_noise(events):
            return math.inf
        _warn(events)
        mu = central_limit_mu(events, relation)
        return gaussian_epsilon(delta, mu) if math.isfinite(mu) else math.inf

    def delta(
        self,
        history: History,
        epsilon: float,
        *,
        adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    ) -> float:
        """Estimate of δ; see `Accountant.delta`. Warns with `PrivacyWarning`."""
        epsilon, relation = check_epsilon(epsilon), Adjacency.of(adjacency)
        events = covered(self, history)
        if not events:
            return 0.0
        if without_noise(events):
            return 1.0
        _warn(events)
        mu = central_limit_mu(events, relation)
        return gaussian_delta(epsilon, mu) if math.isfinite(mu) else 1.0


def central_limit_mu(events: Sequence[SampledGaussian], adjacency: Adjacency) -> float:
    """μ of the limit: sqrt(Σ steps · E_N(0)[(P/N(0) - Q/N(0))²]), exact where nothing is sampled.

    The expectation is q² (e^{1/σ²} - 1) under add/remove and 4 q² sinh(1/σ²) under replace-one.

    Example:
        >>> event = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
        >>> round(central_limit_mu([event], Adjacency.ADD_REMOVE), 4)
        0.4145
    """
    total = 0.0
    for event in events:
        precision = 1 / event.noise_multiplier**2
        if event.sample_rate == 1:
            total += event.steps * precision * adjacency.sensitivity_factor**2
            continue
        if precision > 700:
            return math.inf
        replace = adjacency is Adjacency.REPLACE_ONE
        spread = 4 * math.sinh(precision) if replace else math.expm1(precision)
        total += event.steps * event.sample_rate**2 * spread
    return math.sqrt(total)


def _warn(events: Sequence[SampledGaussian]) -> None:
    if any(event.sample_rate < 1 for event in events):
        warnings.warn(
            "accountant 'gdp' uses the central limit theorem: its numbers are no bound and can be far "
            "too small. Use 'exact' to plan and 'pld' to state.",
            PrivacyWarning,
            stacklevel=3,
        )
