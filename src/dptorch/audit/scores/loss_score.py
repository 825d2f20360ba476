"""The loss attack (Yeom et al. 2018, arXiv:1709.01604): members have a smaller loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dptorch.audit.evidence import Array
from dptorch.audit.scores.signals import TokenStatistics

__all__ = ["class_loss", "text_loss"]


def class_loss(log_p: Array, labels: Array) -> Array:
    """Minus the cross-entropy of each example, [N].

    Args:
        log_p: log probabilities [N, K].
        labels: [N].

    Example:
        >>> class_loss(np.log([[0.5, 0.5], [0.9, 0.1]]), np.array([0, 0])).round(3).tolist()
        [-0.693, -0.105]
    """
    return np.asarray(log_p)[np.arange(len(labels)), labels]


def text_loss(statistics: Sequence[TokenStatistics]) -> Array:
    """Minus the mean next-token loss of each text, [N]."""
    return np.array([-s.loss for s in statistics])
