"""ROC curves with confidence bands, and the numbers that are read off them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dptorch.audit.evidence import Array, Evidence

__all__ = [
    "auc",
    "auc_interval",
    "pointwise_band",
    "roc_curve",
    "roc_summary",
    "tpr_at_fpr",
    "uniform_band",
]


def roc_curve(evidence: Evidence) -> tuple[Array, Array]:
    """(fpr, tpr) at every threshold between scores, from (0, 0) to (1, 1).

    Example:
        >>> fpr, tpr = roc_curve(Evidence.of(members=[2.0, 1.0], others=[1.5, 0.0]))
        >>> fpr.tolist(), tpr.tolist()
        ([0.0, 0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0, 1.0])
    """
    levels = np.unique(np.asarray(evidence.scores))[::-1]
    inside, outside = np.sort(evidence.members), np.sort(evidence.others)
    # To the left of equal scores: those at a level are called members.
    tpr = 1 - np.searchsorted(inside, levels, side="left") / len(inside)
    fpr = 1 - np.searchsorted(outside, levels, side="left") / len(outside)
    return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])


def auc(evidence: Evidence) -> float:
    """Probability that a member scores above a non-member, ties counting half.

    Example:
        >>> auc(Evidence.of(members=[2.0, 1.0], others=[1.0, 0.0]))
        0.875
    """
    from scipy.stats import rankdata

    ranks = rankdata(np.asarray(evidence.scores))
    n = len(evidence.members)
    above = float(ranks[np.asarray(evidence.member)].sum()) - n * (n + 1) / 2
    return above / (n * len(evidence.others))


def auc_interval(evidence: Evidence, *, significance: float = 0.05) -> tuple[float, float]:
    """Confidence interval of the AUC (DeLong et al. 1988), on the logit scale so that it stays in
    [0, 1].

    Example:
        >>> rng = np.random.default_rng(0)
        >>> low, high = auc_interval(Evidence.of(rng.normal(size=200), rng.normal(size=200)))
        >>> bool(low < 0.5 < high)
        True
    """
    from scipy.stats import norm, rankdata

    inside, outside = evidence.members, evidence.others
    n, m = len(inside), len(outside)
    value = auc(evidence)
    if n < 2 or m < 2:
        return 0.0, 1.0
    both = rankdata(np.concatenate([inside, outside]))
    of_member = (both[:n] - rankdata(inside)) / m
    of_other = 1 - (both[n:] - rankdata(outside)) / n
    variance = float(of_member.var(ddof=1)) / n + float(of_other.var(ddof=1)) / m
    if not 0 < value < 1 or variance == 0:
        # min(n, m) members and others can be matched in pairs that share nobody. If
        # the AUC is A, all of them are in order with probability A^min(n, m) at most.
        # All on one side: no spread to estimate. The rule of three, on the smaller side.
        slack = 1 - (significance / 2) ** (1 / min(n, m))
        return max(0.0, value - slack), min(1.0, value + slack)
    logit = math.log(value / (1 - value))
    half = float(norm.isf(significance / 2)) * math.sqrt(variance) / (value * (1 - value))
    ends = [1 / (1 + math.exp(-min(700.0, max(-700.0, logit + s * half)))) for s in (-1, 1)]
    return ends[0], ends[1]


def tpr_at_fpr(evidence: Evidence, fpr: float) -> float:
    """The highest measured true positive rate at a false positive rate of at most `fpr`.

    Example:
        >>> tpr_at_fpr(Evidence.of(members=[3.0, 0.0], others=[1.0, -1.0]), 0.0)
        0.5
    """
    alarms, found = roc_curve(evidence)
    # 1 - k / n may come out a bit above the rate that it is.
    return float(found[alarms <= fpr + 1e-12].max())


def uniform_band(
    evidence: Evidence, fpr: Array, *, significance: float = 0.05
) -> tuple[Array, Array]:
    """A band that holds the whole true ROC curve with confidence 1 - significance.

    Both score distributions lie within a Dvoretzky-Kiefer-Wolfowitz band (Massart's constant) of the
    measured ones, each at half of the significance; the ROC curve then lies between the measured
    curve shifted by both widths. It holds at every threshold at once, and is wide near the corners.

    Args:
        fpr: [k] where the band is wanted.

    Returns:
        lower, upper: [k].
    """
    alarms, found = roc_curve(evidence)
    in_width, out_width = (
        math.sqrt(math.log(4 / significance) / (2 * len(side)))
        for side in (evidence.members, evidence.others)
    )

    def measured(at: Array) -> Array:
        return np.array([found[alarms <= a + 1e-12].max(initial=0.0) for a in at])

    # Where the measured rate is at most a - width, the
    # true one is at most a, and the curve is monotone.
    lower = np.where(fpr >= out_width, measured(fpr - out_width) - in_width, 0.0)
    upper = np.where(fpr + out_width >= 1, 1.0, measured(fpr + out_width) + in_width)
    return np.clip(lower, 0, 1), np.clip(upper, 0, 1)


def pointwise_band(
    evidence: Evidence, fpr: Array, *, significance: float = 0.05
) -> tuple[Array, Array]:
    """A band that holds the true ROC curve at any one threshold with confidence 1 - significance.

    For each threshold both true rates lie within Clopper-Pearson limits; the band joins the corners.

    Args:
        fpr: [k] where the band is wanted.

    Returns:
        lower, upper: [k].

    Example:
        >>> scores = Evidence.of(np.arange(100.0) + 20, np.arange(100.0))
        >>> low, high = pointwise_band(scores, np.array([0.1, 0.5]))
        >>> low.round(2).tolist(), high.round(2).tolist()
        ([0.14, 0.46], [0.5, 0.9])
    """
    from scipy.special import betaincinv

    alarms, found = roc_curve(evidence)
    tail = significance / 4  # two rates, two sides

    def limits(rate: Array, n: int) -> tuple[Array, Array]:
        k = np.round(rate * n)
        low = np.where(k > 0, betaincinv(np.maximum(k, 1), n - k + 1, tail), 0.0)
        high = np.where(k < n, betaincinv(k + 1, np.maximum(n - k, 1), 1 - tail), 1.0)
        return low, high

    fpr_low, fpr_high = limits(alarms, len(evidence.others))
    tpr_low, tpr_high = limits(found, len(evidence.members))
    # The best of all thresholds costs nothing: limits move with the threshold as
    # the rates do, so if any threshold misleads, the one whose true rate is a does.
    lower = np.array([tpr_low[fpr_high <= a].max(initial=0.0) for a in fpr])
    upper = np.array([tpr_high[fpr_low >= a].min(initial=1.0) for a in fpr])
    return lower, upper


def roc_summary(evidence: Evidence) -> dict[str, Any]:
    """The numbers that people compare."""
    low, high = auc_interval(evidence)
    return {
        "auc": auc(evidence),
        "auc_interval": [low, high],
        "tpr_at_1_percent_fpr": tpr_at_fpr(evidence, 0.01),
        "tpr_at_0.1_percent_fpr": tpr_at_fpr(evidence, 0.001),
        "tpr_at_0_fpr": tpr_at_fpr(evidence, 0.0),
    }
