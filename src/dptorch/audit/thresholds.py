"""Choose a threshold without looking at the labels that it is judged on.

Trying thresholds and keeping the best is the commonest fault of audits: it finds leaks in runs that
have none. Each strategy here pays for its choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dptorch.audit.bounds.bound import Bound
from dptorch.audit.evidence import Evidence
from dptorch.errors import ConfigurationError, one_of

__all__ = [
    "STRATEGIES",
    "Bonferroni",
    "Explicit",
    "MultiSplit",
    "Split",
    "Threshold",
    "get_threshold",
]


class Threshold(Protocol):
    """A strategy. It does not depend on the bound, nor the bound on it."""

    def epsilon(
        self, bound: Bound, evidence: Evidence, *, delta: float, significance: float
    ) -> float:
        """A lower bound on ε, valid with confidence 1 - significance."""


@dataclass(frozen=True)
class Explicit:
    """A candidate fixed before the audit: a threshold, or shares of guesses for one-run bounds.

    Example:
        >>> from dptorch.audit.bounds import ClopperPearson
        >>> games = Evidence.of(members=[1.0] * 100, others=[0.0] * 100)
        >>> round(Explicit(0.5).epsilon(ClopperPearson(), games, delta=0.0, significance=0.05), 2)
        3.28
    """

    candidate: Any

    def epsilon(
        self, bound: Bound, evidence: Evidence, *, delta: float, significance: float
    ) -> float:
        """See `Threshold`."""
        return bound.epsilon(evidence, self.candidate, delta=delta, significance=significance)


@dataclass(frozen=True)
class Bonferroni:
    """Try all of the bound's candidates, each at an equal share of the significance, and keep the
    best."""

    def epsilon(
        self, bound: Bound, evidence: Evidence, *, delta: float, significance: float
    ) -> float:
        """See `Threshold`."""
        candidates = bound.candidates(evidence)
        share = significance / len(candidates)
        return max(bound.epsilon(evidence, c, delta=delta, significance=share) for c in candidates)


@dataclass(frozen=True)
class Split:
    """Choose on one part of the canaries, prove on the other.

    Attributes:
        share: of the canaries that the candidate is chosen on.
        seed: of the split, which looks at nothing.
    """

    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigurationError(f"share={self.share!r} must lie between 0 and 1.")

    def epsilon(
        self, bound: Bound, evidence: Evidence, *, delta: float, significance: float
    ) -> float:
        """See `Threshold`."""
        order = np.random.default_rng(self.seed).permutation(len(evidence))
        cut = max(1, round(self.share * len(evidence)))
        # The coins of the others are as fair whatever these were, so what was chosen on one part
        # did not see the truth about the other.
        choose, prove = evidence.take(np.sort(order[:cut])), evidence.take(np.sort(order[cut:]))
        best = max(
            bound.candidates(choose),
            key=lambda c: bound.epsilon(choose, c, delta=delta, significance=significance),
        )
        return bound.epsilon(prove, best, delta=delta, significance=significance)


@dataclass(frozen=True)
class MultiSplit:
    """The median over many splits, each at half of the significance: no luck of one split.

    If the median of p-values is at most α/2, at least half of them are; the expected share of those
    is at most α/2, so Markov's inequality bounds the probability by α (Meinshausen, Meier, Buehlmann
    2009, arXiv:0811.2177).

    Attributes:
        splits: how many.
        share, seed: as for `Split`.
    """

    splits: int = 11
    share: float = 0.5
    seed: int = 0

    def epsilon(
        self, bound: Bound, evidence: Evidence, *, delta: float, significance: float
    ) -> float:
        """See `Threshold`."""
        found = [
            Split(self.share, self.seed + i).epsilon(
                bound, evidence, delta=delta, significance=significance / 2
            )
            for i in range(self.splits)
        ]
        # "lower": at least half of the splits prove as much, as the argument needs.
        return float(np.quantile(found, 0.5, method="lower"))


STRATEGIES: dict[str, Threshold] = {
    "bonferroni": Bonferroni(),
    "split": Split(),
    "multi-split": MultiSplit(),
}


def get_threshold(strategy: Threshold | str | float | tuple[float, float]) -> Threshold:
    """Return a strategy by name; a number (or a pair, for one-run bounds) is an explicit candidate.

    Raises:
        ConfigurationError: listing the names there are.

    Example:
        >>> get_threshold("split")
        Split(share=0.5, seed=0)
        >>> get_threshold(0.5)
        Explicit(candidate=0.5)
    """
    if isinstance(strategy, str):
        return STRATEGIES[one_of("threshold", strategy, STRATEGIES)]
    if isinstance(strategy, int | float | tuple):
        return Explicit(strategy)
    return strategy
