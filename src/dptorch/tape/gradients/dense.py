"""Gradients held as they are, [B, *shape]: biases, scales, and whatever no rule factors."""

from __future__ import annotations

import torch
from torch import Tensor

from dptorch.tape.gradients.base import PerExampleGradient, at_least_float32

__all__ = ["Dense"]


class Dense(PerExampleGradient):
    """Materialised per-example gradients.

    Args:
        values: [B, *shape].
    """

    def __init__(self, values: Tensor) -> None:
        self.values = at_least_float32(values)
        self.shape = values.shape[1:]
        self.batch_size = values.shape[0]

    def dense(self) -> Tensor:
        return self.values

    def take(self, index: Tensor, dtype: torch.dtype | None = None) -> Dense:
        return Dense(self.values.index_select(0, index).to(dtype or self.values.dtype))

    def merge(self, other: PerExampleGradient) -> Dense | None:
        return Dense(self.values + other.values) if isinstance(other, Dense) else None
