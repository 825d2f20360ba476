"""Scores by which an attacker tells members: one family a file; higher means more likely a member.

signals        what a model says about each example: the input of most scores
loss, zlib_ratio, reference, min_k, gradient_norm
               from one model
lira, rmia, quantile
               from other models or other data besides
shadows        training those other models
"""

from dptorch.audit.scores.gradient_norm import class_gradient_norm, text_gradient_norm
from dptorch.audit.scores.lira import lira_offline, lira_online, logit_confidence
from dptorch.audit.scores.loss_score import class_loss, text_loss
from dptorch.audit.scores.min_k_score import min_k, min_k_plus_plus
from dptorch.audit.scores.quantile import quantile_regression
from dptorch.audit.scores.reference import reference_ratio
from dptorch.audit.scores.rmia_score import rmia
from dptorch.audit.scores.shadows import shadow_signals
from dptorch.audit.scores.signals import (
    TokenStatistics,
    class_log_probabilities,
    token_statistics,
    tokenize,
)
from dptorch.audit.scores.zlib_score import zlib_ratio

__all__ = [
    "TokenStatistics",
    "class_gradient_norm",
    "class_log_probabilities",
    "class_loss",
    "lira_offline",
    "lira_online",
    "logit_confidence",
    "min_k",
    "min_k_plus_plus",
    "quantile_regression",
    "reference_ratio",
    "rmia",
    "shadow_signals",
    "text_gradient_norm",
    "text_loss",
    "token_statistics",
    "tokenize",
    "zlib_ratio",
]
