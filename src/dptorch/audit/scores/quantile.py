"""Quantile regression (Bertran et al. 2023, arXiv:2307.03694): one model predicts, from the example
alone, how high the score of a non-member may be. No shadow models."""

from __future__ import annotations

from typing import Any

import numpy as np

from dptorch.audit.evidence import Array
from dptorch.errors import ConfigurationError, DataError

__all__ = ["quantile_regression"]


def quantile_regression(
    public_features: Array,
    public_scores: Array,
    features: Array,
    scores: Array,
    *,
    fpr: float = 0.05,
    seed: int = 0,
) -> Array:
    """Each score less the (1 - fpr)-quantile of a non-member with the same features, [N].

    Above 0 is "member", with a false positive rate of about `fpr` at every kind of example.

    Args:
        public_features, public_scores: of non-members that nobody asks about: [M, D] and [M].
        features, scores: of the examples in question: [N, D] and [N].
        fpr: false positive rate that the threshold is for.

    Raises:
        ConfigurationError: scikit-learn is missing, or `fpr` out of range.
        DataError: fewer non-members than 2 / fpr: their quantile is not known.
    """
    if not 0 < fpr < 1:
        raise ConfigurationError(f"fpr={fpr!r} must lie between 0 and 1.")
    if len(public_scores) * fpr < 2:
        raise DataError(
            f"{len(public_scores)} non-members do not tell a quantile of {1 - fpr:g}: at least "
            f"{int(np.ceil(2 / fpr))} are needed, or a larger fpr."
        )
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
    except ImportError as error:
        raise ConfigurationError(
            "quantile regression needs scikit-learn: pip install 'dptorch[audit]'."
        ) from error
    model: Any = HistGradientBoostingRegressor(
        loss="quantile",
        quantile=1 - fpr,
        max_iter=100,
        max_leaf_nodes=8,
        min_samples_leaf=max(20, int(np.ceil(2 / fpr))),
        random_state=seed,
    )
    model.fit(np.asarray(public_features), np.asarray(public_scores))
    return np.asarray(scores) - model.predict(np.asarray(features))
