"""The reference attack (Carlini et al. 2021, arXiv:2012.07805): how much smaller the loss is than
under a model that has not seen the data. It takes out how hard an example is."""

from __future__ import annotations

import numpy as np

from dptorch.audit.evidence import Array

__all__ = ["reference_ratio"]


def reference_ratio(loss: Array, reference_loss: Array) -> Array:
    """log p(x) under the model less that under the reference: reference loss minus loss, [N].

    Args:
        loss, reference_loss: [N], or reference losses of several models [R, N], which are averaged.

    Example:
        >>> reference_ratio(np.array([1.0, 2.0]), np.array([[2.0, 2.0], [4.0, 2.0]])).tolist()
        [2.0, 0.0]
    """
    reference = np.atleast_2d(np.asarray(reference_loss, float)).mean(axis=0)
    return reference - np.asarray(loss, float)
