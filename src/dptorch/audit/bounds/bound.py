"""The protocol of a bound on scores, and the bounds by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dptorch.audit.bounds.gaussian_shape import GaussianCounts, GaussianScores
from dptorch.audit.bounds.many_runs import ClopperPearson
from dptorch.audit.bounds.one_run import OneRun
from dptorch.audit.evidence import Evidence
from dptorch.errors import one_of

__all__ = ["BOUNDS", "Bound", "get_bound"]


class Bound(Protocol):
    """Turns scores into an ε that they prove, given a *candidate*: how to guess from scores.

    Attributes:
        name: of the argument, for people.
        needs_independent_scores: whether it is for independent games only, not for the canaries of
            one run.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_independent_scores(self) -> bool: ...

    def candidates(self, evidence: Evidence) -> Sequence[Any]:
        """Ways to guess worth trying; a function of the scores that does not see who is a member."""

    def epsilon(
        self, evidence: Evidence, candidate: Any, *, delta: float, significance: float
    ) -> float:
        """ε proved with confidence 1 - significance, for a candidate that did not see the truth."""

    def ceiling(self, evidence: Evidence, *, delta: float, significance: float) -> float:
        """The most that any scores of as many canaries could prove."""


BOUNDS: Mapping[str, Bound] = {
    "one-run": OneRun(),
    "one-run-fdp": OneRun(gaussian=True),
    "clopper-pearson": ClopperPearson(),
    "gaussian": GaussianScores(),
    "gaussian-counts": GaussianCounts(),
}


def get_bound(name: str) -> Bound:
    """Return the bound called `name`.

    Raises:
        ConfigurationError: listing the names there are.

    Example:
        >>> get_bound("one-run").name
        'one run (Steinke et al. 2023)'
    """
    return BOUNDS[one_of("bound", name, BOUNDS)]
