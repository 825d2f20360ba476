"""Private predictions: answers of models that were trained without privacy, under a budget.

A model that was trained with differential privacy needs none of this: its predictions are
post-processing. See docs/prediction.md.
"""

from dptorch.prediction.language import generate
from dptorch.prediction.mechanisms import MECHANISMS, NO_LABEL
from dptorch.prediction.predictor import Answers, PrivatePredictor
from dptorch.prediction.shards import assign_shards, train_shards
from dptorch.prediction.statement import PredictionStatement

__all__ = [
    "MECHANISMS",
    "NO_LABEL",
    "Answers",
    "PredictionStatement",
    "PrivatePredictor",
    "assign_shards",
    "generate",
    "train_shards",
]
