"""Invert a test into a bound, and check the counts it is given."""

from __future__ import annotations

from collections.abc import Callable

from dptorch.errors import ConfigurationError

__all__ = ["check_counts", "largest_refuted"]

LARGEST_EPSILON = 100.0


def largest_refuted(refuted: Callable[[float], bool], *, tolerance: float = 1e-7) -> float:
    """The ε up to which `refuted` holds, for a test that is monotone in ε; 0 where it never does.

    Returns the lower end of the last interval, so that rounding errs towards the smaller claim.

    Example:
        >>> round(largest_refuted(lambda epsilon: epsilon < 1.25), 5)
        1.25
    """
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
        if high > LARGEST_EPSILON:
            return low
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def check_counts(canaries: int, guesses: int, correct: int) -> None:
    """Raise a `ConfigurationError` unless 0 <= correct <= guesses <= canaries."""
    if not 0 <= correct <= guesses <= canaries or canaries < 1:
        raise ConfigurationError(
            f"canaries={canaries}, guesses={guesses}, correct={correct}: expected "
            "0 <= correct <= guesses <= canaries, and at least one canary."
        )
