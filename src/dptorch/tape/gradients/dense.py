"""Gradients held as they are, [B, *shape]: biases, scales, and whatever no rule factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dptorch.tape.gradients.base import PerExampleGradient, at_least_float32, square_sum

__all__ = ["Dense"]


class Dense(PerExampleGradient):
    """Materialised per-example gradients.

    Args:
        values: [B, *shape], or its dimensions in another order.
        order: where the dimensions of [B, *shape] are in `values`, of which B is the first.
    """

    def __init__(self, values: Tensor, order: tuple[int, ...] | None = None) -> None:
        self.values = at_least_float32(values)
        self.order = order
        self.shape = (values if order is None else values.permute(order)).shape[1:]
        self.batch_size = values.shape[0]

    def held(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def dense(self) -> Tensor:
        return self.values if self.order is None else self.values.permute(self.order)

    def squared_norm(self) -> Tensor:
        return square_sum(self.values)

    def take(self, index: Tensor, dtype: torch.dtype | None = None) -> Dense:
        return Dense(self.values.index_select(0, index).to(dtype or self.values.dtype), self.order)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        flat = self.values.reshape(self.batch_size, -1)
        total = torch.mv(flat.t(), weights.to(flat.dtype)).view(self.values.shape[1:])
        if self.order is not None:
            total = total.permute([i - 1 for i in self.order[1:]]).contiguous()
        return total

    def fits(self, other: PerExampleGradient) -> bool:
        return isinstance(other, Dense)

    def merged(self, others: Sequence[PerExampleGradient]) -> Dense:
        total = self.dense()
        for other in others:
            total = total + other.dense()
        return Dense(total)
