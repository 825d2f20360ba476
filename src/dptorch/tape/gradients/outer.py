"""Gradients that are sums of outer products over positions: every kind of linear layer.

Shape legend: B examples, T positions, P rows (outputs), D columns (inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dptorch.tape.gradients.base import (
    PerExampleGradient,
    at_least_float32,
    square_sum,
    weigh,
    without_cancellation,
)
from dptorch.tape.gradients.dense import Dense

__all__ = ["Outer", "gram_is_cheaper"]


def gram_is_cheaper(positions: int, rows: int, columns: int) -> bool:
    """Whether the T x T Gram products cost less than forming the [P, D] gradient.

    Both are matrix products: 2 T^2 (P + D) flops against 2 T P D. The same comparison decides
    memory: where forming wins, [P, D] is also smaller than its two factors.

    Example:
        >>> gram_is_cheaper(1, 512, 512), gram_is_cheaper(1024, 256, 256)
        (True, False)
    """
    return positions * (rows + columns) <= rows * columns


class Outer(PerExampleGradient):
    """``gradient[b] = sum_t left[b, t] (x) right[b, t]``, of shape [P, D].

    The norm is taken from Gram matrices, ``sum((L L^T) * (R R^T))`` (Goodfellow 2015,
    arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679), or from the formed gradient, whichever is
    cheaper; a gradient formed for its norm replaces its factors and serves the weighted sum too.

    Args:
        left: [B, T, P].
        right: [B, T, D].
        shape: the parameter's shape, P * D elements in row-major order.
    """

    def __init__(self, left: Tensor, right: Tensor, shape: torch.Size) -> None:
        self.left = at_least_float32(left)
        self.right = at_least_float32(right).to(self.left.dtype)
        self.shape = shape
        self.batch_size = left.shape[0]

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.left.shape[1], self.left.shape[2], self.right.shape[2]

    def dense(self) -> Tensor:
        product = torch.bmm(self.left.transpose(1, 2), self.right)
        return product.view(self.batch_size, *self.shape)

    def take(self, index: Tensor, dtype: torch.dtype | None = None) -> PerExampleGradient:
        left, right = self.left.index_select(0, index), self.right.index_select(0, index)
        return Outer(left.to(dtype), right.to(dtype), self.shape)

    def magnitude(self) -> Tensor:
        lengths = torch.linalg.vector_norm(self.left, dim=2)
        lengths = lengths * torch.linalg.vector_norm(self.right, dim=2)
        return lengths.sum(1)

    def measured(self) -> tuple[Tensor, PerExampleGradient]:
        t, p, d = self._sizes
        if t == 1 or gram_is_cheaper(t, p, d):
            return self.squared_norm(), self
        formed = Dense(self.dense())
        squared = formed.squared_norm()
        return without_cancellation(squared, self.magnitude(), [self], formed=True), formed

    def squared_norm(self) -> Tensor:
        t, p, d = self._sizes
        if t == 1:
            return square_sum(self.left) * square_sum(self.right)
        by_gram = gram_is_cheaper(t, p, d)
        if by_gram:
            gram = torch.bmm(self.left, self.left.transpose(1, 2))
            gram *= torch.bmm(self.right, self.right.transpose(1, 2))
            squared = gram.sum((1, 2)).clamp_(min=0)
        else:
            squared = square_sum(self.dense())
        return without_cancellation(squared, self.magnitude(), [self], formed=not by_gram)

    def factored_inner(self, other: PerExampleGradient) -> Tensor | None:
        if not isinstance(other, Outer) or other.shape != self.shape:
            return None
        t, p, d = self._sizes
        s = other.left.shape[1]
        if (other.left.shape[2], other.right.shape[2]) != (p, d) or t * s * (p + d) > (
            t + s
        ) * p * d:
            return None
        gram = torch.bmm(self.left, other.left.transpose(1, 2))
        gram *= torch.bmm(self.right, other.right.transpose(1, 2))
        return gram.sum((1, 2))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        left, right = self.left, self.right
        if left.shape[2] <= right.shape[2]:
            left = weigh(left, weights)
        else:
            right = weigh(right, weights)
        return torch.mm(left.flatten(0, 1).t(), right.flatten(0, 1)).view(self.shape)

    def merge(self, other: PerExampleGradient) -> Outer | None:
        if not isinstance(other, Outer) or other.shape != self.shape:
            return None
        if self.left.shape[2] != other.left.shape[2]:
            return None
        return Outer(
            torch.cat([self.left, other.left], 1),
            torch.cat([self.right, other.right], 1),
            self.shape,
        )
