"""Bounds that use the shape of the claim: Gaussian noise (Nasr et al. 2023, *Tight Auditing of
Differentially Private Machine Learning*, arXiv:2302.07956).

Under the Gaussian mechanism an adversary who sees everything tells N(0, 1) from N(μ, 1), and μ alone
decides ε(δ). So it is μ that is bounded from below, and ε follows: far sharper than error rates, as
long as the hypothesis is what is claimed. It is: a plan claims Gaussian noise, so a run that is not
explained by any amount of it up to the claimed one refutes the plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dptorch.accounting.pairs.sampled import gaussian_epsilon
from dptorch.audit.bounds.many_runs import RATES, AtRate, count, error_limits
from dptorch.audit.evidence import Evidence

__all__ = ["GaussianCounts", "mu_lower_bound", "mu_lower_bound_from_scores"]

# scipy's noncentral t is accurate below; above, its normal approximation is.
_EXACT_UP_TO = 30.0


def mu_lower_bound(
    true_positives: int,
    members: int,
    false_positives: int,
    others: int,
    *,
    significance: float = 0.05,
) -> float:
    """μ that the error rates of one threshold prove, under a Gaussian trade-off curve; at least 0.

    Example:
        >>> round(mu_lower_bound(500, 1000, 10, 1000), 4)
        2.011
    """
    from scipy.special import ndtri

    fpr, fnr = error_limits(true_positives, members, false_positives, others, significance)
    if fpr >= 1 or fnr >= 1:
        return 0.0
    # fnr >= Φ(Φ⁻¹(1 - fpr) - μ) is the trade-off curve of N(0, 1) against N(μ, 1), solved for μ.
    return max(0.0, float(-ndtri(fpr) - ndtri(fnr)))


def mu_lower_bound_from_scores(evidence: Evidence, *, significance: float = 0.05) -> float:
    """μ = (difference of means) / (standard deviation) that normally distributed scores prove.

    The difference of the sample means over the pooled deviation, scaled, is noncentral t; the bound
    inverts its distribution in the noncentrality. No threshold is chosen.

    Guarantees:
        If members' scores are independent N(a + μ s, s²) and others' N(a, s²), the result exceeds μ
        with probability `significance` where it is above 0; with less where the difference is above
        30 standard errors or there are hardly any scores, as an approximation is used there.
        Held by `test_gaussian_scores_are_exact_by_simulation`.

    Returns:
        at least 0; infinity where scores do not vary and differ.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> scores = Evidence.of(rng.normal(1, 1, 2000), rng.normal(0, 1, 2000))
        >>> round(mu_lower_bound_from_scores(scores), 1)
        0.9
    """
    inside, outside = evidence.members, evidence.others
    if len(inside) < 2 or len(outside) < 2:
        return 0.0
    degrees = len(inside) + len(outside) - 2
    # Pooled with n + m - 2 degrees of freedom: only then is the quotient below noncentral t.
    spread = math.sqrt(
        (len(inside) * float(inside.var()) + len(outside) * float(outside.var())) / degrees
    )
    gap = float(inside.mean() - outside.mean())
    if gap <= 0:
        return 0.0
    if spread <= 1e-12 * gap:
        return math.inf
    # Standard deviation of the difference of means, in units of s: the noncentrality is μ / unit.
    unit = math.sqrt(1 / len(inside) + 1 / len(outside))
    return max(0.0, _noncentrality_bound(gap / (spread * unit), degrees, significance)) * unit


def _noncentrality_bound(t: float, degrees: int, significance: float) -> float:
    """The noncentrality under which a t at least as large has probability `significance`."""
    from scipy.optimize import brentq
    from scipy.stats import nct, norm

    # t = (Z + noncentrality) / S with S about N(1 - 1/4n, 1/2n): Johnson and Welch 1940.
    z = float(norm.isf(significance))
    near = t * (1 - 1 / (4 * degrees)) - z * math.sqrt(1 + t * t / (2 * degrees))
    # S is skewed to the right, so this puts too much of it far below 1 and the bound errs downwards.
    if t > _EXACT_UP_TO:
        return near

    def excess(noncentrality: float) -> float:
        return float(nct.sf(t, degrees, noncentrality)) - significance

    low, high = near - 2.0, near + 2.0
    return float(brentq(excess, low, high)) if excess(low) < 0 < excess(high) else near


@dataclass(frozen=True)
class GaussianCounts:
    """The Gaussian bound from error rates; a *candidate* is a threshold or `AtRate`.

    Guarantees:
        Valid for independent games against an algorithm whose trade-off curve lies above that of a
        Gaussian mechanism with (ε, δ). It is conservative: both error rates get half of the
        significance, and their limits are combined as if both were missed at once.
        Held by `test_true_claims_are_refuted_as_often_as_stated`.
    """

    name: ClassVar[str] = "Gaussian trade-off, from error rates (Nasr et al. 2023)"
    needs_independent_scores: ClassVar[bool] = True

    def candidates(self, evidence: Evidence) -> Sequence[AtRate]:
        """Rates of either error, from none to many."""
        return RATES

    def epsilon(
        self, evidence: Evidence, candidate: AtRate | float, *, delta: float, significance: float
    ) -> float:
        """ε at δ proved by this threshold."""
        mu = mu_lower_bound(*count(evidence, candidate), significance=significance)
        return gaussian_epsilon(delta, mu) if mu else 0.0

    def ceiling(self, evidence: Evidence, *, delta: float, significance: float) -> float:
        """The most that as many games can prove: no error at all."""
        inside, outside = len(evidence.members), len(evidence.others)
        mu = mu_lower_bound(inside, inside, 0, outside, significance=significance)
        return gaussian_epsilon(delta, mu) if mu else 0.0


@dataclass(frozen=True)
class GaussianScores:
    """The Gaussian bound from the scores themselves: no threshold, so the only *candidate* is None.

    Guarantees:
        Exact (not conservative) where scores are independent and normal with one variance, as those
        of a linear test on Gaussian noise are.
        Held by `test_gaussian_scores_are_exact_by_simulation`.
    """

    name: ClassVar[str] = "Gaussian scores (noncentral t)"
    needs_independent_scores: ClassVar[bool] = True

    def candidates(self, evidence: Evidence) -> list[None]:
        """There is nothing to choose."""
        return [None]

    def epsilon(
        self, evidence: Evidence, candidate: None, *, delta: float, significance: float
    ) -> float:
        """ε at δ that these scores prove."""
        mu = mu_lower_bound_from_scores(evidence, significance=significance)
        if math.isinf(mu):
            return math.inf
        return gaussian_epsilon(delta, mu) if mu else 0.0

    def ceiling(self, evidence: Evidence, *, delta: float, significance: float) -> float:
        """There is none: scores without any spread prove everything."""
        return math.inf
