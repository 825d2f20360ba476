"""One run, many canaries: Steinke, Nasr, Jagielski 2023, *Privacy Auditing with One (1) Training
Run*, arXiv:2305.08846, Theorem 5.2.

Each of m canaries is in the training data or not by a fair coin of its own. The auditor sees the
run's output and guesses about some of them, abstaining on the rest. Whatever the algorithm, if it is
(ε, δ)-DP in one canary, the number of right guesses among r is stochastically at most
Binomial(r, e^ε / (1 + e^ε)), up to a correction for δ.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dptorch.audit.bounds.one_run_fdp import one_run_fdp_epsilon
from dptorch.audit.bounds.search import check_counts, largest_refuted
from dptorch.audit.evidence import Evidence
from dptorch.errors import ConfigurationError

__all__ = ["OneRun", "one_run_epsilon", "one_run_p_value"]

Guesses = tuple[float, float]


def one_run_p_value(
    canaries: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
    """How likely an (ε, δ)-DP run lets that many guesses be right; an upper bound in [0, 1].

    Args:
        canaries: how many coins were tossed, m.
        guesses: how many canaries the auditor guessed about, r <= m.
        correct: right guesses, v <= r.

    Example:
        >>> round(one_run_p_value(100, 100, 75, math.log(3), 0.0), 4)
        0.5535
    """
    from scipy.stats import binom

    check_counts(canaries, guesses, correct)
    # Randomised response dominates: no guess about one coin is right more often than this.
    right = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, right))
    alpha = 0.0
    if delta > 0 and correct > 0:
        # The theorem's maximum goes on to m. Beyond v there is no mass to add, and 1 / i falls.
        # P[v > W >= v - i] for i = 1 .. v: the mass just below v, added up downwards.
        below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
        alpha = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, beta + 2.0 * canaries * delta * alpha)


@functools.lru_cache(maxsize=4096)
def one_run_epsilon(
    canaries: int, guesses: int, correct: int, *, delta: float = 0.0, significance: float = 0.05
) -> float:
    """The ε below which the run is refuted: no (ε, δ)-DP algorithm gives the auditor as many right
    guesses with probability `significance`.

    Guarantees:
        If the algorithm is (ε, δ)-DP with respect to adding or removing one canary, the result
        exceeds ε with probability at most `significance`, over coins and algorithm, as long as which
        guesses to make was decided without looking at the coins.
        Held by `test_the_term_for_delta_is_the_maximum_over_all_tails` and
        `test_true_claims_are_refuted_as_often_as_stated`.

    Example:
        >>> round(one_run_epsilon(1000, 200, 180, delta=1e-5), 3)
        1.796
    """
    check_counts(canaries, guesses, correct)
    if not guesses:
        return 0.0
    return largest_refuted(
        lambda epsilon: one_run_p_value(canaries, guesses, correct, epsilon, delta) < significance
    )


@dataclass(frozen=True)
class OneRun:
    """The one-run bound on scores: the k+ highest are guessed members, the k- lowest not.

    A *candidate* is (share of all canaries guessed "in", share guessed "out").

    Attributes:
        gaussian: False: Steinke et al., valid for any algorithm. True: Mahloujifar et al. 2024,
            sharper, valid where the run's trade-off curve lies above that of a Gaussian mechanism
            with the same ε at δ, see `one_run_fdp`.

    Guarantees:
        Valid for scores of one run, however they depend on each other.
        Held by `test_true_claims_are_refuted_as_often_as_stated`.
    """

    gaussian: bool = False
    needs_independent_scores: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Of the argument, for people."""
        if self.gaussian:
            return "one run, Gaussian trade-off (Mahloujifar et al. 2024)"
        return "one run (Steinke et al. 2023)"

    def candidates(self, evidence: Evidence) -> list[Guesses]:
        """From few confident guesses to a guess on every canary."""
        return [(0.02, 0.0), (0.1, 0.0), (0.1, 0.1), (0.5, 0.5)]

    def epsilon(
        self, evidence: Evidence, candidate: Guesses, *, delta: float, significance: float
    ) -> float:
        """ε proved by these guesses."""
        guesses, correct = self.guess(evidence, candidate)
        bound = one_run_fdp_epsilon if self.gaussian else one_run_epsilon
        return bound(len(evidence), guesses, correct, delta=delta, significance=significance)

    def ceiling(self, evidence: Evidence, *, delta: float, significance: float) -> float:
        """The most that as many canaries can prove: every guess made and right."""
        m = len(evidence)
        bound = one_run_fdp_epsilon if self.gaussian else one_run_epsilon
        return bound(m, m, m, delta=delta, significance=significance)

    def guess(self, evidence: Evidence, candidate: Guesses) -> tuple[int, int]:
        """(guesses, right guesses). Ties are broken by chance, with numbers of its own."""
        try:
            plus, minus = candidate
        except TypeError:
            raise ConfigurationError(
                f"guesses={candidate}: this bound guesses the highest and the lowest scores. Give two "
                "shares of the canaries, to guess in and out, such as (0.1, 0.1)."
            ) from None
        m = len(evidence)
        if not (0 <= plus <= 1 and 0 <= minus <= 1 and 0 < plus + minus <= 1):
            raise ConfigurationError(
                f"guesses={candidate}: expected the shares of canaries to guess in and out, each "
                "at least 0, together above 0 and at most 1."
            )
        k_plus = round(plus * m)
        # Rounded both up, the shares would guess twice about one canary.
        k_minus = min(round(minus * m), m - k_plus)
        # Not by position: evidence that lists others before members would have its ties guessed right.
        chance = np.random.default_rng(0).permutation(m)
        order = np.lexsort((chance, np.asarray(evidence.scores)))
        member = np.asarray(evidence.member)[order]
        right = int(member[m - k_plus :].sum()) + int((~member[:k_minus]).sum())
        return k_plus + k_minus, right
