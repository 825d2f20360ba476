"""Per-example gradients of one parameter at one site, in whatever form is cheapest to hold.

Shape legend: B examples, T positions, D inputs, P outputs, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["PerExampleGradient", "weigh"]


class PerExampleGradient(ABC):
    """The gradients [B, *shape] of B examples, usually never formed.

    Subclasses must give `dense`; the others have an exact, slow default. All arithmetic is at
    least float32, whatever the model's dtype.

    Attributes:
        shape: the parameter's shape.
        batch_size: number of examples B.
    """

    shape: torch.Size
    batch_size: int

    @abstractmethod
    def dense(self) -> Tensor:
        """All gradients, [B, *shape]."""

    @abstractmethod
    def take(self, index: Tensor) -> PerExampleGradient:
        """The gradients of some examples only (int64 [B'])."""

    def squared_norm(self) -> Tensor:
        """Squared L2 norm of each example's gradient, [B]."""
        return square_sum(self.dense())

    def measured(self) -> tuple[Tensor, PerExampleGradient]:
        """The squared norms, and the form to keep from here on: the formed gradient where the norm
        needed it and it is no larger than what it replaces."""
        return self.squared_norm(), self

    def inner(self, other: PerExampleGradient) -> Tensor:
        """Inner product with another gradient of the same parameter, example by example, [B]."""
        for first, second in ((self, other), (other, self)):
            found = first.factored_inner(second)
            if found is not None:
                return found
        product = self.dense() * other.dense()
        return product.reshape(self.batch_size, -1).sum(1)

    def factored_inner(self, other: PerExampleGradient) -> Tensor | None:
        """`inner` without forming either gradient, or None if this form does not know how."""
        return None

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``sum_b weights[b] * gradient[b]`` of the parameter's shape, for weights [B]."""
        dense = self.dense()
        flat = dense.reshape(self.batch_size, -1)
        return torch.mv(flat.t(), weights.to(dense.dtype)).view(self.shape)

    def merge(self, other: PerExampleGradient) -> PerExampleGradient | None:
        """The sum of both as one object, if this form can hold it; otherwise None."""
        return None


def square_sum(dense: Tensor) -> Tensor:
    """Squared L2 norms of the rows of [B, ...], at least in float32."""
    flat = at_least_float32(dense).reshape(dense.shape[0], -1)
    return torch.linalg.vector_norm(flat, dim=1).square()


def at_least_float32(t: Tensor) -> Tensor:
    """bfloat16 and float16 are too coarse for norms and sums."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def weigh(t: Tensor, weights: Tensor) -> Tensor:
    """``weights[b] * t[b]`` for t [B, ...] and weights [B]."""
    return t * weights.to(t.dtype).view([-1] + [1] * (t.dim() - 1))
