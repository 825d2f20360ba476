"""Gradients that are sums of outer products over positions: every kind of linear layer.

Shape legend: B examples, T positions, P rows (outputs), D columns (inputs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dptorch.tape.gradients.base import (
    PerExampleGradient,
    at_least_float32,
    formed_norm,
    weigh,
    without_cancellation,
    without_underflow,
)
from dptorch.tape.gradients.clipping_modes import NormMethod
from dptorch.tape.gradients.dense import Dense
from dptorch.tape.gradients.gram import gram_cost, gram_norm_and_lengths

__all__ = ["Outer"]


class Outer(PerExampleGradient):
    """``gradient[b] = sum_t left[b, t] (x) right[b, t]``, of shape [P, D].

    The norm is taken from Gram matrices (`dptorch.tape.gradients.gram`) or from the formed gradient.

    Args:
        left: [B, T, P].
        right: [B, T, D].
        shape: the parameter's shape, P * D elements in row-major order.
    """

    def __init__(self, left: Tensor, right: Tensor, shape: torch.Size) -> None:
        # Under autocast the two come in different dtypes, which no matrix product takes.
        self.left = at_least_float32(left)
        self.right = at_least_float32(right).to(self.left.dtype)
        self.shape = shape
        self.batch_size = left.shape[0]

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.left.shape[1], self.left.shape[2], self.right.shape[2]

    def held(self) -> tuple[Tensor, ...]:
        return self.left, self.right

    def dense(self) -> Tensor:
        product = torch.bmm(self.left.transpose(1, 2), self.right)
        return product.view(self.batch_size, *self.shape)

    def take(self, index: Tensor, dtype: torch.dtype | None = None) -> Outer:
        left, right = self.left.index_select(0, index), self.right.index_select(0, index)
        return Outer(left.to(dtype), right.to(dtype), self.shape)

    def part(self, start: int, stop: int) -> Outer:
        return Outer(self.left[start:stop], self.right[start:stop], self.shape)

    def magnitude(self) -> Tensor:
        left, right = self._lengths()
        return (left * right).sum(1)

    def _most(self) -> Tensor:
        """At least the `magnitude`, by Cauchy and Schwarz, [B]: short rows take long to measure."""
        left, right = (torch.linalg.vector_norm(x, dim=(1, 2)) for x in self.held())
        most = left * right
        # A factor may be too long for the square of its length, and the other nothing beside it.
        return most if bool(most.isfinite().all()) else self.magnitude()

    def _lengths(self) -> tuple[Tensor, Tensor]:
        """Of the factors, [B, T] each."""
        left, right = torch.linalg.vector_norm(self.left, dim=2), self.right
        return left, torch.linalg.vector_norm(right, dim=2)

    def sizes(self) -> tuple[tuple[str, int], ...]:
        t, p, d = self._sizes
        return ("B", self.batch_size), ("T", t), ("d", d), ("p", p)

    def norm_methods(self) -> tuple[NormMethod, ...]:
        t, p, d = self._sizes
        b, size = self.batch_size, self.left.element_size()
        form, factors = 2.0 * b * t * p * d, size * (self.left.numel() + self.right.numel())
        formed = size * b * p * d
        if t == 1:
            gram = NormMethod("gram", 2 * b * (p + d), form, 2 * factors, factors, 0)
        else:
            flops, moved = gram_cost(self.left, self.right)
            gram = NormMethod("gram", flops, form, moved, factors, 2 * size * b * t * t)
        return (
            gram,
            NormMethod("form", form, form, 2 * formed, factors, formed),
            NormMethod("keep", form, 2 * formed / size, 3 * formed, formed, formed),
        )

    def measured(self, method: str) -> tuple[Tensor, PerExampleGradient]:
        if method == "gram":
            return self.gram(), self
        kept: PerExampleGradient = self
        if method == "keep":
            kept = Dense(self.dense())
            squared = kept.squared_norm()
        else:
            squared = formed_norm(self)
        # What was formed is a sum of T terms too, and the
        # sum that is released adds them in another order.
        return without_cancellation(squared, self._most(), [self], formed=True), kept

    def squared_norm(self) -> Tensor:
        t, p, d = self._sizes
        # T² (P + D) multiplications for each example against T P D.
        return self.measured("gram" if t * (p + d) <= p * d else "form")[0]

    def gram(self) -> Tensor:
        """Squared norms from Gram matrices, [B]."""
        t, p, d = self._sizes
        if t == 0:  # the layer got no row of the only example
            return self.left.new_zeros(self.batch_size)
        if t == 1:
            left, right = self._lengths()
            # Multiplied first: the square of one length alone leaves float32 sooner.
            squared = (left * right).square().sum(1)
        else:
            squared, left, right = gram_norm_and_lengths(self.left, self.right)
        magnitude = (left * right).sum(1)
        longest = torch.maximum(left.amax(), right.amax()).square()
        squared, magnitude = without_underflow(self, squared, magnitude, longest, t * t * (p + d))
        if t == 1:
            # A single outer product has no terms that could cancel.
            return squared
        return without_cancellation(squared, magnitude, [self], formed=False)

    def factored_inner(self, other: PerExampleGradient) -> Tensor | None:
        if not isinstance(other, Outer) or other.shape != self.shape:
            return None
        t, p, d = self._sizes
        s = other.left.shape[1]
        # Worth it while T S (P + D) multiplications are fewer than the (T + S) P D of forming both.
        if (other.left.shape[2], other.right.shape[2]) != (p, d) or t * s * (p + d) > (
            t + s
        ) * p * d:
            return None
        gram = torch.bmm(self.left, other.left.transpose(1, 2))
        gram *= torch.bmm(self.right, other.right.transpose(1, 2))
        return gram.sum((1, 2))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        left, right = self.left, self.right
        # The narrower factor is weighed: that copy is the smaller one. Examples
        # and positions are then one contracted dimension of a single product.
        if left.shape[2] <= right.shape[2]:
            left = weigh(left, weights)
        else:
            right = weigh(right, weights)
        return torch.mm(left.flatten(0, 1).t(), right.flatten(0, 1)).view(self.shape)

    def fits(self, other: PerExampleGradient) -> bool:
        return (
            isinstance(other, Outer)
            and other.shape == self.shape
            and other.left.shape[2] == self.left.shape[2]
        )

    def merged(self, others: Sequence[PerExampleGradient]) -> Outer:
        # Several uses of a parameter are one with more positions, so cross terms need no code.
        left, right = zip(*(f.held() for f in (self, *others)), strict=True)
        return Outer(torch.cat(left, 1), torch.cat(right, 1), self.shape)
