"""Small ensembles whose outputs a test can dictate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dptorch.prediction import PrivatePredictor

K = 4


class Says:
    """A model that answers every row with the same logits."""

    def __init__(self, logits: Sequence[float]) -> None:
        self.logits = torch.tensor(logits, dtype=torch.float64)

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.logits.expand(len(inputs), -1)


def ensemble(models: int, *others: Sequence[float]) -> list[Says]:
    """Models that say class 0, after those that say `others`."""
    rest = models - len(others)
    return [*(Says(o) for o in others), *(Says([9.0, 0.0, 0.0, 0.0]) for _ in range(rest))]


def rows(n: int, start: int = 0) -> Tensor:
    """n different inputs [n, 1]."""
    return torch.arange(start, start + n, dtype=torch.float32).reshape(-1, 1)


def predictor(mechanism: str, models: int = 5, queries: int = 20, **rest) -> PrivatePredictor:
    votes = "gnmax" in mechanism
    extra = {} if votes else {"clip": 1.0}
    if mechanism == "mixing":
        extra = {"mix_with": Says([1.0, 0.5, 0.0, 0.0])}
    if mechanism == "confident-gnmax":
        extra["threshold"] = 0.6 * models
    given = {"budget": (2.0, 1e-5), "queries": queries, "seed": 0} | extra | rest
    return PrivatePredictor(given.pop("of", ensemble(models)), mechanism, **given)
