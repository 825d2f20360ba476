"""RMIA (Zarifzadeh, Liu, Shokri 2024, arXiv:2312.03262): how often x beats a random non-member z in
how much more likely the model finds it than the world does. Works with one or two reference models.
"""

from __future__ import annotations

import numpy as np

from dptorch.audit.evidence import Array
from dptorch.errors import ConfigurationError, DataError

__all__ = ["rmia"]


def rmia(
    log_p: Array,
    reference_log_p: Array,
    population_log_p: Array,
    population_reference_log_p: Array,
    *,
    a: float = 0.3,
    gamma: float = 1.0,
) -> Array:
    """Share of the population z with [p(x|θ)/p(x)] / [p(z|θ)/p(z)] >= γ, [N] in [0, 1].

    Args:
        log_p: log p(x|θ) of the examples under the audited model [N].
        reference_log_p: under reference models that were not trained on them [R, N].
        population_log_p, population_reference_log_p: the same for z: [M] and [R, M]. Non-members.
        a: how a reference's p_out(x) stands in for the mean over models with and without x:
            p(x) = ((1 + a) p_out(x) + 1 - a) / 2; tuned on a pair of reference models.
        gamma: at least 1.

    Example:
        >>> score = rmia(np.log([0.9, 0.5]), np.log([[0.3, 0.5]]), np.log([0.5, 0.6]),
        ...              np.log([[0.5, 0.5]]))
        >>> score.tolist()
        [1.0, 0.5]
    """
    if gamma < 1 or not 0 <= a <= 1:
        raise ConfigurationError(f"gamma={gamma!r} must be at least 1 and a={a!r} in [0, 1].")
    if np.size(population_log_p) == 0:
        raise DataError("the population is empty, and RMIA compares with examples of it.")

    def ratio(own: Array, reference: Array) -> Array:
        outside = np.exp(np.atleast_2d(reference)).mean(axis=0)
        return np.asarray(own) - np.log(((1 + a) * outside + 1 - a) / 2 + 1e-300)

    x = ratio(log_p, reference_log_p) - np.log(gamma)
    z = np.sort(ratio(population_log_p, population_reference_log_p))
    return np.searchsorted(z, x, side="right") / len(z)
