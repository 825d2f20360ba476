"""Many games: Clopper-Pearson intervals of two error rates (Jagielski, Ullman, Oprea 2020,
arXiv:2006.07709; Nasr et al. 2021, arXiv:2101.04535).

Any test of membership against an (ε, δ)-DP algorithm has 1 - FNR <= e^ε FPR + δ, and the same with
the worlds exchanged. Upper confidence limits of both error rates turn this into a lower bound on ε.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dptorch.audit.evidence import Evidence
from dptorch.errors import ConfigurationError

__all__ = [
    "AtRate",
    "ClopperPearson",
    "clopper_pearson_epsilon",
    "count",
    "error_limits",
    "upper_limit",
]


def upper_limit(errors: int, trials: int, significance: float) -> float:
    """Upper Clopper-Pearson limit of a probability; at most it with confidence 1 - significance.

    Example:
        >>> round(upper_limit(0, 1000, 0.025), 5)
        0.00368
    """
    from scipy.special import betaincinv

    return (
        1.0
        if errors >= trials
        else float(betaincinv(errors + 1, trials - errors, 1 - significance))
    )


def error_limits(
    true_positives: int, members: int, false_positives: int, others: int, significance: float
) -> tuple[float, float]:
    """Upper limits of (false positive rate, false negative rate), joint confidence 1 - significance."""
    if not (0 <= true_positives <= members and 0 <= false_positives <= others):
        raise ConfigurationError(
            f"{true_positives} of {members} members and {false_positives} of {others} others were "
            "called members: expected counts between 0 and the totals."
        )
    # Upper limits alone: a larger rate of either error proves less. Each gets half by the union bound.
    fpr = upper_limit(false_positives, others, significance / 2)
    fnr = upper_limit(members - true_positives, members, significance / 2)
    return fpr, fnr


def clopper_pearson_epsilon(
    true_positives: int,
    members: int,
    false_positives: int,
    others: int,
    *,
    delta: float = 0.0,
    significance: float = 0.05,
) -> float:
    """The ε that the error rates of a membership test prove.

    Args:
        true_positives: members that the test called members, of `members` games.
        false_positives: others that it called members, of `others` games.

    Guarantees:
        If the algorithm is (ε, δ)-DP and the games are independent, the result exceeds ε with
        probability at most `significance`.
        Held by `test_clopper_pearson_covers_by_enumeration`.

    Example:
        >>> round(clopper_pearson_epsilon(500, 1000, 10, 1000, delta=1e-5), 3)
        3.242
    """
    fpr, fnr = error_limits(true_positives, members, false_positives, others, significance)
    best = 0.0
    # Both worlds are read off the same two limits, so the better one costs no significance.
    for alarm, miss in ((fpr, fnr), (fnr, fpr)):
        if 1 - delta - miss > 0:
            best = max(best, math.log((1 - delta - miss) / alarm))
    return best


@dataclass(frozen=True)
class AtRate:
    """The threshold at which a fixed share of one side is misjudged.

    It is an order statistic of that side, so it looks at the truth, and is valid all the same: of n
    independent scores, the chance that one more exceeds the (j+1)-th largest is above p with
    probability at most P[Bin(n, p) <= j], which is what the Clopper-Pearson limit of j errors in n
    says; and the other side is independent of it.

    Attributes:
        rate: share of that side, rounded down to a number of scores.
        side: "others": the false positive rate is fixed; "members": the false negative rate is.
    """

    rate: float
    side: str = "others"

    def counts(self, evidence: Evidence) -> tuple[int, int, int, int]:
        """See `count`."""
        inside, outside = evidence.members, evidence.others
        if self.side == "others":
            errors = min(math.floor(self.rate * len(outside)), len(outside) - 1)
            # Above it, not at it: with ties fewer than `errors`
            # are misjudged, which are counted all the same.
            limit = np.sort(outside)[len(outside) - 1 - errors]
            return int((inside > limit).sum()), len(inside), errors, len(outside)
        errors = min(math.floor(self.rate * len(inside)), len(inside) - 1)
        limit = np.sort(inside)[errors]
        return len(inside) - errors, len(inside), int((outside >= limit).sum()), len(outside)


RATES = tuple(AtRate(r, side) for side in ("others", "members") for r in (0.0, 0.02, 0.1, 0.3))


def count(evidence: Evidence, candidate: AtRate | float) -> tuple[int, int, int, int]:
    """(true positives, members, false positives, others) of a test that calls high scores members.

    Args:
        candidate: a threshold fixed beforehand, for scores at or above it; or the rate of an error.

    Example:
        >>> count(Evidence.of(members=[3.0, 1.0], others=[2.0, 0.0]), 1.0)
        (2, 2, 1, 2)
        >>> count(Evidence.of(members=[3.0, 1.0], others=[2.0, 0.0]), AtRate(0.0))
        (1, 2, 0, 2)
    """
    if isinstance(candidate, AtRate):
        return candidate.counts(evidence)
    inside, outside = evidence.members, evidence.others
    found, alarms = int((inside >= candidate).sum()), int((outside >= candidate).sum())
    return found, len(inside), alarms, len(outside)


@dataclass(frozen=True)
class ClopperPearson:
    """The bound from error rates on scores; a *candidate* is a threshold or `AtRate`.

    Guarantees:
        Valid for any (ε, δ)-DP algorithm if the scores come from independent games: runs of their
        own, or steps with fresh noise. Canaries of one training run are not independent; `OneRun`
        is for them.
        Held by `test_true_claims_are_refuted_as_often_as_stated`.
    """

    name: ClassVar[str] = "many games (Clopper-Pearson)"
    needs_independent_scores: ClassVar[bool] = True

    def candidates(self, evidence: Evidence) -> Sequence[AtRate]:
        """Rates of either error, from none to many."""
        return RATES

    def epsilon(
        self, evidence: Evidence, candidate: AtRate | float, *, delta: float, significance: float
    ) -> float:
        """ε proved by this threshold."""
        return clopper_pearson_epsilon(
            *count(evidence, candidate), delta=delta, significance=significance
        )

    def ceiling(self, evidence: Evidence, *, delta: float, significance: float) -> float:
        """The most that as many games can prove: no error at all."""
        inside, outside = len(evidence.members), len(evidence.others)
        return clopper_pearson_epsilon(
            inside, inside, 0, outside, delta=delta, significance=significance
        )
