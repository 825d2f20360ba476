"""What one model may contribute to an answer: clipped logits, or one vote.

Changing one training record may change the model that saw it in any way, so only what is done here to
its output bounds what the record can do. Logits that differ by a constant mean the same prediction:
they are centred first, so that the bound is not spent on the constant.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["NORMS", "clip_logits", "votes_of"]

Array = NDArray[Any]

#: Norms by name, over the last axis.
NORMS: Final = {
    "l1": lambda z: np.abs(z).sum(-1, keepdims=True),
    "l2": lambda z: np.sqrt((z * z).sum(-1, keepdims=True)),
    "max": lambda z: np.abs(z).max(-1, keepdims=True),
}
_SAFE: Final = 1 - 2.0**-40  # the norm of the scaled vector is rounded too


def clip_logits(logits: Array, bound: float, norm: str = "l2") -> Array:
    """Centre logits [..., K] and scale each row into the ball of `bound`; float64.

    A row that is not finite contributes zeros.

    Guarantees:
        Every row has a norm of at most `bound`, whatever the logits are, so that two values of one row
        are at most 2 · `bound` apart.
        Held by `test_no_logits_leave_the_ball`.

    Example:
        >>> clip_logits(np.array([[3.0, 0.0, 0.0], [0.2, 0.1, 0.0]]), bound=1.0).round(3).tolist()
        [[0.816, -0.408, -0.408], [0.1, 0.0, -0.1]]
    """
    z = np.asarray(logits, np.float64)
    finite = np.isfinite(z).all(-1, keepdims=True)
    z = np.where(finite, z, 0.0)
    # Largest first: squares and sums of the largest float64 numbers overflow.
    largest = np.maximum(np.abs(z).max(-1, keepdims=True), math.ulp(0.0))
    unit = z / largest
    unit = unit - unit.mean(-1, keepdims=True)
    length = np.maximum(NORMS[norm](unit), 1e-300)
    with np.errstate(over="ignore"):
        return np.where(
            length * largest <= bound * _SAFE, unit * largest, unit * (bound * _SAFE / length)
        )


def votes_of(logits: Array) -> Array:
    """One vote for each row's largest logit: float64 of the shape of `logits` [..., K].

    Rows that are not finite vote for label 0: abstaining would be a vote of another size.

    Example:
        >>> votes_of(np.array([[0.1, 0.7, 0.2]])).tolist()
        [[0.0, 1.0, 0.0]]
    """
    z = np.asarray(logits, np.float64)
    z = np.where(np.isfinite(z).all(-1, keepdims=True), z, 0.0)
    votes = np.zeros_like(z)
    np.put_along_axis(votes, z.argmax(-1, keepdims=True), 1.0, -1)
    return votes
