"""LiRA, the likelihood-ratio attack (Carlini et al. 2022, arXiv:2112.03570), online and offline.

Each example's confidence under the audited model is held against what it is under shadow models that
were trained with it and without it.
"""

from __future__ import annotations

import numpy as np

from dptorch.audit.evidence import Array
from dptorch.errors import DataError

__all__ = ["lira_offline", "lira_online", "logit_confidence"]

# Below this many models on a side, one variance for all examples is better than each its own.
_OWN_VARIANCE = 32


def logit_confidence(log_p: Array, labels: Array) -> Array:
    """φ = log(p / (1 - p)) of the true class, [N]; near normal over models, unlike the loss.

    Args:
        log_p: log probabilities [N, K].

    Example:
        >>> logit_confidence(np.log([[0.5, 0.5], [0.9, 0.1]]), np.array([0, 0])).round(3).tolist()
        [0.0, 2.197]
    """
    rows = np.arange(len(labels))
    right = np.asarray(log_p, float)[rows, labels]
    # Summed over the other classes: 1 - p would be 0 where p rounds to 1.
    others = np.array(log_p, float)
    others[rows, labels] = -np.inf
    top = others.max(axis=1)
    rest = top + np.log(np.exp(others - top[:, None]).sum(axis=1))
    return np.clip(right - rest, -1e3, 1e3)


def lira_online(phi: Array, shadow_phi: Array, shadow_member: Array) -> Array:
    """log N(φ; in) - log N(φ; out), [N].

    Args:
        phi: confidence under the audited model [N].
        shadow_phi: under each shadow model [S, N].
        shadow_member: bool [S, N]: whether the model was trained on the example. Each example needs
            models on both sides.

    Raises:
        DataError: an example is in all shadow models or in none.

    Example:
        >>> shadow = np.array([[4.0], [5.0], [-1.0], [1.0]])
        >>> member = np.array([[True], [True], [False], [False]])
        >>> lira_online(np.array([4.5]), shadow, member).round(2).tolist()
        [10.82]
    """
    inside = _moments(shadow_phi, shadow_member, "in")
    outside = _moments(shadow_phi, ~np.asarray(shadow_member, bool), "out")
    return _log_normal(phi, *inside) - _log_normal(phi, *outside)


def lira_offline(phi: Array, shadow_phi: Array, shadow_member: Array | None = None) -> Array:
    """How far φ lies above the models that were not trained on the example, in their deviations, [N].

    A monotone form of the one-sided p-value, which does not saturate.

    Args:
        shadow_member: as for `lira_online`; without it, no shadow model was trained on any example.

    Example:
        >>> lira_offline(np.array([2.0]), np.array([[-1.0], [1.0]])).round(3).tolist()
        [2.0]
    """
    out = (
        np.ones_like(shadow_phi, dtype=bool)
        if shadow_member is None
        else ~np.asarray(shadow_member, bool)
    )
    mean, deviation = _moments(shadow_phi, out, "out")
    return (np.asarray(phi) - mean) / deviation


def _moments(phi: Array, chosen: Array, side: str) -> tuple[Array, Array]:
    """Mean and standard deviation over the chosen models of each example, [N]."""
    values = np.asarray(phi, float)
    count = np.asarray(chosen).sum(axis=0)
    if values.ndim != 2 or values.shape != np.asarray(chosen).shape:
        raise DataError(
            f"shadow confidences have shape {values.shape} and memberships "
            f"{np.asarray(chosen).shape}. Expected both [models, examples]."
        )
    if (count == 0).any():
        raise DataError(
            f"{int((count == 0).sum())} examples have no shadow model in which they are {side}. "
            "Train more shadow models, or on random halves."
        )
    kept = np.where(chosen, values, 0.0)
    mean = kept.sum(axis=0) / count
    squares = np.where(chosen, (values - mean) ** 2, 0.0).sum(axis=0)
    if count.min() >= _OWN_VARIANCE:
        deviation = np.sqrt(squares / count)
    else:
        deviation = np.full_like(mean, np.sqrt(squares.sum() / count.sum()))
    return mean, np.maximum(deviation, 1e-6)


def _log_normal(x: Array, mean: Array, deviation: Array) -> Array:
    return -0.5 * ((np.asarray(x) - mean) / deviation) ** 2 - np.log(deviation)
