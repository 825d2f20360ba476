"""Gradients of a looked-up table: rows added at the ids an example used.

Shape legend: B examples, T positions, D features, V rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dptorch.tape.gradients.base import (
    PerExampleGradient,
    at_least_float32,
    square_sum,
    weigh,
    without_cancellation,
)
from dptorch.tape.gradients.clipping_modes import NormMethod
from dptorch.tape.gradients.outer import Outer

__all__ = ["Scatter", "looked_up"]


class Scatter(PerExampleGradient):
    """``gradient[b][ids[b, t]] += values[b, t]``, of shape [V, D].

    The norm costs O(B T D): rows that an example adds to the same table entry are summed first.
    Neither [B, V, D] nor [T, T] is formed.

    Args:
        ids: int64 [B, T], each in [0, V).
        values: [B, T, D]; already zero where the id is padding.
        shape: [V, D].
    """

    def __init__(self, ids: Tensor, values: Tensor, shape: torch.Size) -> None:
        self.ids = ids
        self.values = at_least_float32(values)
        self.shape = shape
        self.batch_size = ids.shape[0]

    def _flat(self) -> Tensor:
        """Each (example, id) pair as one number, [B * T]."""
        offset = torch.arange(self.batch_size, device=self.ids.device) * self.shape[0]
        return (self.ids + offset[:, None]).flatten()

    def held(self) -> tuple[Tensor, ...]:
        return self.ids, self.values

    def dense(self) -> Tensor:
        table = self.values.new_zeros(self.batch_size * self.shape[0], self.values.shape[-1])
        table.index_add_(0, self._flat(), self.values.flatten(0, 1))
        return table.view(self.batch_size, *self.shape)

    def take(self, index: Tensor, dtype: torch.dtype | None = None) -> Scatter:
        values = self.values.index_select(0, index).to(dtype or self.values.dtype)
        return Scatter(self.ids.index_select(0, index), values, self.shape)

    def magnitude(self) -> Tensor:
        return torch.linalg.vector_norm(self.values, dim=2).sum(1)

    def sizes(self) -> tuple[tuple[str, int], ...]:
        b, t, d = self.values.shape
        return ("B", b), ("T", t), ("d", d), ("V", self.shape[0])

    def norm_methods(self) -> tuple[NormMethod, ...]:
        numel = float(self.values.numel())
        held = numel * self.values.element_size()
        return (NormMethod("segments", 2 * numel, 2 * numel, 6 * held, held, held),)

    def squared_norm(self) -> Tensor:
        # Rows for one entry are added before they are squared. Squares of single rows would miss
        # what points alike, and an example that repeats a word would be clipped too little.
        pairs, where = torch.unique(self._flat(), return_inverse=True)
        summed = self.values.new_zeros(pairs.numel(), self.values.shape[-1])
        summed.index_add_(0, where, self.values.flatten(0, 1))
        norms = summed.new_zeros(self.batch_size)
        owner = torch.div(pairs, self.shape[0], rounding_mode="floor")
        squared = norms.index_add_(0, owner, square_sum(summed))
        return without_cancellation(squared, self.magnitude(), [self], formed=True)

    def factored_inner(self, other: PerExampleGradient) -> Tensor | None:
        if isinstance(other, Scatter):
            # Ids of padding are equal too: their values are 0.
            same = self.ids[:, :, None] == other.ids[:, None, :]
            gram = torch.bmm(self.values, other.values.transpose(1, 2).to(self.values.dtype))
            return (gram * same).sum((1, 2))
        if isinstance(other, Outer) and other.left.shape[2] == self.shape[0]:
            # sum_s <values[s], sum_t left[t, ids[s]] right[t]>: a [T, T] product, never [V, D].
            picked = other.left.gather(2, self.ids[:, None, :].expand(-1, other.left.shape[1], -1))
            gram = torch.bmm(other.right, self.values.transpose(1, 2).to(other.right.dtype))
            return (gram * picked).sum((1, 2))
        return None

    def weighted_sum(self, weights: Tensor) -> Tensor:
        table = self.values.new_zeros(self.shape)
        return table.index_add_(0, self.ids.flatten(), weigh(self.values, weights).flatten(0, 1))

    def fits(self, other: PerExampleGradient) -> bool:
        return isinstance(other, Scatter) and other.shape == self.shape

    def merged(self, others: Sequence[PerExampleGradient]) -> Scatter:
        ids, values = zip(*(f.held() for f in (self, *others)), strict=True)
        return Scatter(torch.cat(ids, 1), torch.cat(values, 1), self.shape)


def looked_up(
    table: Tensor, ids: Tensor, padding: int | None, batch_size: int
) -> tuple[Tensor, Callable[[Tensor], Scatter]]:
    """The table, and what makes its gradients of those [B, *ids.shape, D] at rows that every example
    looked up: the same ids, as they are now."""
    same = ids.detach().reshape(1, -1).clone().expand(batch_size, -1)

    def form(values: Tensor) -> Scatter:
        values = values.reshape(*same.shape, -1)
        if padding is not None:
            # A negative index counts from the end, as in torch.
            values = values * (same != padding % table.shape[0])[..., None]
        return Scatter(same, values, table.shape)

    return table, form
