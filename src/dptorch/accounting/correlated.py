"""The sensitivity of noise that is correlated over steps, for `CorrelatedGaussian`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dptorch.accounting.arguments import positive_int
from dptorch.errors import ConfigurationError

__all__ = ["strategy_sensitivity"]


def strategy_sensitivity(strategy: ArrayLike, *, participations: int, min_separation: int) -> float:
    """The sensitivity of C x to one record's gradients, in units of the clipping bound.

    Args:
        strategy: C, [T, T] lower triangular; step t's noise is that of C⁻¹ z.
        participations: most steps that a record takes part in.
        min_separation: fewest steps from one participation to the next; 1 allows each step.

    Returns:
        For a C with at most `min_separation` bands (no column overlaps another that the same record
        takes part in) the exact value, the root of the largest sum of squared column norms over
        allowed steps (Choquette-Choo et al. 2023, arXiv:2306.08153, Theorem 2). Otherwise the
        triangle inequality's bound, the largest sum of norms.

    Raises:
        ConfigurationError: C is no finite lower triangular matrix, or a count is not positive.

    Example:
        >>> strategy_sensitivity(np.eye(10), participations=4, min_separation=2)
        2.0
    """
    matrix = np.asarray(strategy, float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ConfigurationError(
            f"strategy has the shape {matrix.shape}, expected a square matrix [T, T]."
        )
    if not np.isfinite(matrix).all() or np.triu(matrix, 1).any():
        raise ConfigurationError("strategy must be finite and lower triangular: noise is causal.")
    positive_int("participations", participations)
    positive_int("min_separation", min_separation)
    squares = (matrix**2).sum(axis=0)
    apart = not np.tril(matrix, -min_separation).any()
    if apart:
        return math.sqrt(_largest_sum(squares, participations, min_separation))
    return _largest_sum(np.sqrt(squares), participations, min_separation)


def _largest_sum(values: Any, picks: int, separation: int) -> float:
    """The largest sum of at most `picks` of the values [T] >= 0, `separation` apart."""
    count = values.size
    best = np.zeros(count + 1)  # over the first i values
    for _ in range(min(picks, -(-count // separation))):
        following = np.zeros(count + 1)
        for i, value in enumerate(values, start=1):
            following[i] = max(following[i - 1], best[max(0, i - separation)] + value)
        best = following
    return float(best[-1])
