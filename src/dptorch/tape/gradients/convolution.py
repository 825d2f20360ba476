"""Gradients of convolutions of every rank, plain and transposed.

Shape legend: B examples, m images of one example, C input channels, P output channels, ... space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dptorch.tape.gradients.base import (
    PerExampleGradient,
    at_least_float32,
    square_sum,
    weigh,
    without_cancellation,
)
from dptorch.tape.gradients.dense import Dense
from dptorch.tape.gradients.outer import gram_is_cheaper

__all__ = ["Convolution", "Geometry"]


@dataclass(frozen=True)
class Geometry:
    """How the kernel moves: one entry a spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    groups: int


class Convolution(PerExampleGradient):
    """The weight gradient of a convolution, from its input and its output's gradient.

    Forming it treats the batch as groups of one native convolution backward; the weighted sum is
    the native backward of the weighted output gradient. With few positions the norm comes from
    Gram matrices of the unfolded input instead.

    Args:
        inputs: [B, m, C, ...].
        grads: [B, m, P, ...].
        shape: the weight's shape.
        geometry: see `Geometry`.
    """

    def __init__(
        self, inputs: Tensor, grads: Tensor, shape: torch.Size, geometry: Geometry
    ) -> None:
        self.grads = at_least_float32(grads)
        self.inputs = at_least_float32(inputs).to(self.grads.dtype)
        self.shape = shape
        self.geometry = geometry
        self.batch_size = inputs.shape[0]

    def _backward(self, inputs: Tensor, grads: Tensor, shape: torch.Size, groups: int) -> Tensor:
        g = self.geometry
        weight = inputs.new_empty(1).expand(shape)  # only its shape is read
        result: Tensor = torch.ops.aten.convolution_backward(
            grads,
            inputs,
            weight,
            None,
            list(g.stride),
            list(g.padding),
            list(g.dilation),
            g.transposed,
            list(g.output_padding),
            groups,
            [False, True, False],
        )[1]
        return result

    def dense(self) -> Tensor:
        b, m = self.inputs.shape[:2]
        inputs = self.inputs.transpose(0, 1).reshape(m, -1, *self.inputs.shape[3:])
        grads = self.grads.transpose(0, 1).reshape(m, -1, *self.grads.shape[3:])
        shape = torch.Size((b * self.shape[0], *self.shape[1:]))
        out = self._backward(inputs, grads, shape, b * self.geometry.groups)
        return out.view(b, *self.shape)

    def take(self, index: Tensor, dtype: torch.dtype | None = None) -> Convolution:
        dtype = dtype or self.grads.dtype
        return Convolution(
            self.inputs.index_select(0, index).to(dtype),
            self.grads.index_select(0, index).to(dtype),
            self.shape,
            self.geometry,
        )

    def _can_unfold(self) -> bool:
        g = self.geometry
        return len(g.stride) == 2 and g.groups == 1 and not g.transposed

    def _gram_wins(self) -> bool:
        positions = math.prod(self.grads.shape[3:]) * self.grads.shape[1]
        return self._can_unfold() and gram_is_cheaper(
            positions, self.shape[0], math.prod(self.shape[1:])
        )

    def squared_norm(self) -> Tensor:
        by_gram = self._gram_wins()
        squared = self._gram_norm() if by_gram else square_sum(self.dense())
        return without_cancellation(squared, self.magnitude(), [self], formed=not by_gram)

    def magnitude(self) -> Tensor:
        # No larger than the product of the factors' norms times the kernel's overlap; the sum over
        # positions of products would need the unfolded input.
        reach = math.sqrt(math.prod(self.shape[2:]))
        inputs = torch.linalg.vector_norm(self.inputs.flatten(1), dim=1)
        return reach * inputs * torch.linalg.vector_norm(self.grads.flatten(1), dim=1)

    def measured(self) -> tuple[Tensor, PerExampleGradient]:
        if self._gram_wins():
            return self.squared_norm(), self
        formed = Dense(self.dense())
        norms = formed.squared_norm()
        norms = without_cancellation(norms, self.magnitude(), [self], formed=True)
        smaller = formed.values.numel() <= self.inputs.numel() + self.grads.numel()
        return norms, formed if smaller else self

    def _gram_norm(self) -> Tensor:
        g = self.geometry
        b, m = self.inputs.shape[:2]
        columns = F.unfold(
            self.inputs.flatten(0, 1), self.shape[2:], g.dilation, g.padding, g.stride
        )  # [B * m, C * kernel, T]
        grads = self.grads.flatten(3).flatten(0, 1)  # [B * m, P, T]
        columns = columns.unflatten(0, (b, m)).transpose(1, 2).flatten(2)
        grads = grads.unflatten(0, (b, m)).transpose(1, 2).flatten(2)
        gram = torch.bmm(columns.transpose(1, 2), columns)
        gram *= torch.bmm(grads.transpose(1, 2), grads)
        return gram.sum((1, 2)).clamp_(min=0)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        grads = weigh(self.grads, weights)
        return self._backward(
            self.inputs.flatten(0, 1), grads.flatten(0, 1), self.shape, self.geometry.groups
        )

    def merge(self, other: PerExampleGradient) -> PerExampleGradient | None:
        if not isinstance(other, Convolution) or other.geometry != self.geometry:
            return None
        if other.inputs.shape[2:] != self.inputs.shape[2:]:
            return None
        return Convolution(
            torch.cat([self.inputs, other.inputs], 1),
            torch.cat([self.grads, other.grads], 1),
            self.shape,
            self.geometry,
        )
