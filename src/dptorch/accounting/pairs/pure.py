"""The dominating pair of any (ε, 0)-differentially private mechanism: randomised response.

With p = e^ε / (1 + e^ε), P is (p, 1 - p) on two outcomes and Q is (1 - p, p). H_α(P, Q) is the largest
that any ε-DP mechanism has, for every α (Kairouz, Oh, Viswanath 2015, arXiv:1311.0776, Theorem 3.4).
Its loss has two values, so what inverts smooth transforms, as "exact" and "pld" do, does not take it:
"rdp" composes it with other events, `pure_epsilon` with itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dptorch.accounting.pairs.sampled import Array

__all__ = ["PurePair", "pure_delta", "pure_epsilon"]


@dataclass(frozen=True)
class PurePair:
    """Randomised response: a privacy loss of ε or -ε.

    Attributes:
        epsilon: of one release.
        steps: how often the pair is composed with itself.
    """

    epsilon: float
    steps: int

    @property
    def mu(self) -> None:
        """None: the pair is no Gaussian."""

    def nodes(self, t: float, height: float, tail: float | None) -> tuple[Array, Array]:
        """The two losses themselves; see `Pair.nodes`."""
        log_p = -math.log1p(math.exp(-self.epsilon))
        return np.array([log_p, log_p - self.epsilon]), np.array([self.epsilon, -self.epsilon])


def pure_delta(each: float, steps: int, epsilon: float) -> float:
    """δ at `epsilon` of `steps` releases that are (each, 0)-private, chosen adaptively; exact.

    The composed loss is (2i - steps) · each with a binomial i (Kairouz et al., Theorem 3.3).

    Example:
        >>> round(pure_delta(1.0, 1, 0.0), 6)  # tanh(1 / 2)
        0.462117
    """
    from scipy.stats import binom

    i = np.arange(steps + 1)
    masses = binom.pmf(i, steps, 1 / (1 + math.exp(-each)))
    excess = -np.expm1(np.minimum(epsilon - (2 * i - steps) * each, 0.0))
    return float(masses @ excess)


def pure_epsilon(each: float, steps: int, delta: float) -> float:
    """ε at `delta` of `steps` releases that are (each, 0)-private, chosen adaptively; exact.

    Example:
        >>> pure_epsilon(0.1, 1, 1e-5) < 0.1, round(pure_epsilon(0.1, 100, 1e-5), 3)
        (True, 4.307)
    """
    low, high = 0.0, steps * each
    if pure_delta(each, steps, low) <= delta:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        if pure_delta(each, steps, middle) > delta:
            low = middle
        else:
            high = middle
    return high
