"""Min-K% (Shi et al. 2023, arXiv:2310.16789) and Min-K%++ (Zhang et al. 2024, arXiv:2404.02936): a
text that was not seen has a few tokens that the model finds very unlikely."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dptorch.audit.evidence import Array
from dptorch.audit.scores.signals import TokenStatistics
from dptorch.errors import ConfigurationError

__all__ = ["min_k", "min_k_plus_plus"]


def min_k(statistics: Sequence[TokenStatistics], share: float = 0.2) -> Array:
    """Mean log probability of each text's least likely tokens, [N].

    Args:
        share: of the tokens that counts; at least one does.
    """
    return np.array([_lowest(s.log_p, share) for s in statistics])


def min_k_plus_plus(statistics: Sequence[TokenStatistics], share: float = 0.2) -> Array:
    """The same on log probabilities standardised, at each position, by their mean and standard
    deviation under the model's own prediction, [N]."""
    return np.array(
        [_lowest((s.log_p - s.mean) / np.maximum(s.std, 1e-6), share) for s in statistics]
    )


def _lowest(values: Array, share: float) -> float:
    if not 0 < share <= 1:
        raise ConfigurationError(f"share={share!r} must lie in (0, 1].")
    k = max(1, int(share * len(values)))
    return float(np.sort(values)[:k].mean())
