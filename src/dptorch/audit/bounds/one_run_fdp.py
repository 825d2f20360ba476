"""One run under f-DP: Mahloujifar, Melis, Chaudhuri 2024, *Auditing f-Differential Privacy in One
Run*, arXiv:2410.22235, Theorem 8 and Algorithm 3.

Where the whole trade-off curve of the algorithm is known to lie above that of a Gaussian mechanism,
one run proves more than (ε, δ) alone lets it.
"""

from __future__ import annotations

import functools

from dptorch.accounting.pairs.sampled import gaussian_delta
from dptorch.audit.bounds.search import check_counts, largest_refuted
from dptorch.errors import ConfigurationError

__all__ = ["gaussian_mu_of", "one_run_fdp_epsilon", "one_run_fdp_refutes"]


def one_run_fdp_refutes(
    canaries: int, guesses: int, correct: int, mu: float, significance: float
) -> bool:
    """Whether a μ-GDP run lets that many guesses be right with probability below `significance`.

    Args:
        canaries: how many coins were tossed.
        guesses: how many canaries were guessed about, by a rule that does not look at the coins.
        correct: right guesses.
        mu: of the Gaussian trade-off curve.

    Example:
        >>> one_run_fdp_refutes(1000, 200, 180, 0.5, 0.05), one_run_fdp_refutes(1000, 200, 180, 1, 0.05)
        (True, False)
    """
    from scipy.special import ndtr, ndtri

    right = significance * correct / canaries
    wrong = significance * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        more_wrong = max(wrong, float(ndtr(ndtri(right) - mu)))
        right = min(1.0, right + i / (guesses - i) * (more_wrong - wrong))
        wrong = more_wrong
    return right + wrong > guesses / canaries


def gaussian_mu_of(epsilon: float, delta: float) -> float:
    """The μ whose Gaussian mechanism has exactly this ε at δ.

    Example:
        >>> round(gaussian_mu_of(4.3771781, 1e-5), 6)
        1.0
    """
    low, high = 0.0, 1.0
    while gaussian_delta(epsilon, high) < delta:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(epsilon, middle) < delta else (low, middle)
    return low


@functools.lru_cache(maxsize=4096)
def one_run_fdp_epsilon(
    canaries: int, guesses: int, correct: int, *, delta: float, significance: float = 0.05
) -> float:
    """The ε at δ below which every Gaussian mechanism is refuted by these guesses.

    Args:
        delta: where ε is read off; above 0.

    Guarantees:
        If the algorithm's trade-off curve lies above that of a Gaussian mechanism with (ε, δ), the
        result exceeds ε with probability at most `significance`. For an algorithm of which only (ε,
        δ)-DP is claimed use `one_run_epsilon`.
        Held by `test_one_run_reference` and `test_true_claims_are_refuted_as_often_as_stated`.

    Example:
        >>> round(one_run_fdp_epsilon(1000, 200, 180, delta=1e-5), 3)
        2.901
    """
    check_counts(canaries, guesses, correct)
    if not 0 < delta < 1:
        raise ConfigurationError(
            f"delta={delta!r}: a Gaussian mechanism has a finite epsilon at a delta in (0, 1) only."
        )
    if not guesses:
        return 0.0
    return largest_refuted(
        lambda epsilon: one_run_fdp_refutes(
            canaries, guesses, correct, gaussian_mu_of(epsilon, delta), significance
        )
    )
