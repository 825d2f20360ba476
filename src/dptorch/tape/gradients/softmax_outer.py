"""Gradients of the layer before a softmax over many classes, without the logits of all positions.

Shape legend: B examples, T positions, H inputs, V classes, c classes that are looked at together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dptorch.tape.gradients.base import (
    PerExampleGradient,
    lengthened,
    square_sum,
    weigh,
    without_cancellation,
)
from dptorch.tape.gradients.clipping_modes import NormMethod
from dptorch.tape.gradients.outer import Outer
from dptorch.tape.gradients.scatter import Scatter

__all__ = ["Logits", "SoftmaxOuter"]


@dataclass(frozen=True, eq=False)
class Logits:
    """What the logits of all classes, and the gradients at them, are computed from again.

    Attributes:
        hidden: [B, T, H].
        weight, bias: of the layer, [V, H] and [V] or None.
        labels: int64 [B, T]; of positions whose `scale` is 0 any class.
        scale: what each position's loss is multiplied by, [B, T]; 0 where it does not count.
        normaliser: log of the sum of exp(logits), [B, T].
        columns: c, classes whose logits are in memory at once.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    scale: Tensor
    normaliser: Tensor
    columns: int

    def starts(self) -> range:
        """The first class of each part."""
        return range(0, self.weight.shape[0], self.columns)

    def part(self, start: int) -> Tensor:
        """Logits [B, T, c] of the classes from `start` on."""
        return self.of(self.weight[start : start + self.columns], self.bias_of(start))

    def bias_of(self, start: int) -> Tensor | None:
        return None if self.bias is None else self.bias[start : start + self.columns]

    def of(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(self.hidden, weight, bias)

    def gradients(self) -> Iterator[tuple[int, Tensor]]:
        """(first class, gradients at the logits [B, T, c]) of each part."""
        for start in self.starts():
            # With the normaliser of all classes a part needs no other, and no exponential is above 1.
            left = self.part(start).sub_(self.normaliser[..., None]).exp_()
            at = self.labels - start
            # Labels of other parts are clamped and take away 0. Picking rows
            # by a mask would have to wait, on a GPU, for how many there are.
            inside = (at >= 0) & (at < left.shape[2])
            left.scatter_add_(
                2,
                at.clamp(0, left.shape[2] - 1)[..., None],
                -inside[..., None].to(left.dtype),
            )
            # Positions that do not count become exactly 0 here, whatever class they were given.
            yield start, left.mul_(self.scale[..., None])

    def take(self, index: Tensor, dtype: torch.dtype | None) -> Logits:
        """Those of some examples (int64 [B']), in another precision if asked."""

        def chosen(t: Tensor) -> Tensor:
            return t.index_select(0, index).to(dtype or t.dtype)

        return replace(
            self,
            hidden=chosen(self.hidden),
            weight=self.weight.to(dtype or self.weight.dtype),
            bias=None if self.bias is None else self.bias.to(dtype or self.bias.dtype),
            labels=self.labels.index_select(0, index),
            scale=chosen(self.scale),
            normaliser=chosen(self.normaliser),
        )


class SoftmaxOuter(PerExampleGradient):
    """``gradient[b] = sum_t (softmax - one-hot)[b, t] (x) hidden[b, t]``, of shape [V, H].

    The first factor, [B, T, V], is computed again a part of the classes at a time, for the norm and
    for the sum. What is kept is [B, T, H].

    Args:
        logits: what it is computed from.
        lengths: norms of the first factor, [B, T].
    """

    def __init__(self, logits: Logits, lengths: Tensor) -> None:
        self.logits = logits
        self.lengths = lengths
        self.shape = logits.weight.shape
        self.batch_size = logits.hidden.shape[0]

    def held(self) -> tuple[Tensor, ...]:
        found = self.logits
        return found.hidden, found.scale, found.normaliser, found.labels, self.lengths

    def dense(self) -> Tensor:
        hidden = self.logits.hidden
        whole = hidden.new_empty(self.batch_size, *self.shape)
        for start, left in self.logits.gradients():
            whole[:, start : start + left.shape[2]] = torch.bmm(left.transpose(1, 2), hidden)
        return whole

    def take(self, index: Tensor, dtype: torch.dtype | None = None) -> SoftmaxOuter:
        lengths = self.lengths.index_select(0, index).to(dtype or self.lengths.dtype)
        return SoftmaxOuter(self.logits.take(index, dtype), lengths)

    def magnitude(self) -> Tensor:
        return (self.lengths * torch.linalg.vector_norm(self.logits.hidden, dim=2)).sum(1)

    def recomputed_error(self) -> Tensor:
        """See `PerExampleGradient.recomputed_error`.

        Logits are products, which round otherwise beside other examples and in another precision.
        Where a label has a probability of nearly 1, the first factor may be nothing but this error.

        Guarantees:
            Clipped to length C, a gradient is at most that long in a sum without some of the examples.
            Held by `test_logits_that_round_otherwise_stay_within_the_bound` and
            `test_the_error_of_computing_logits_again_is_bounded`.
        """
        found = self.logits
        hidden = torch.linalg.vector_norm(found.hidden, dim=2)
        largest = torch.linalg.vector_norm(found.weight, dim=1).amax()
        logits = (
            hidden * largest if found.bias is None else hidden * largest + found.bias.abs().amax()
        )
        # A logit is off by a few eps of |hidden| |weight| (Cauchy and Schwarz), its exponential by as
        # much of itself. Positions may be alike, so their errors are added as they are. TF32 rounds
        # factors alike in every product of them.
        return 4 * torch.finfo(hidden.dtype).eps * (found.scale.abs() * logits * hidden).sum(1)

    def sizes(self) -> tuple[tuple[str, int], ...]:
        b, t, h = self.logits.hidden.shape
        return ("B", b), ("T", t), ("d", h), ("p", self.shape[0])

    def norm_methods(self) -> tuple[NormMethod, ...]:
        b, t, h = self.logits.hidden.shape
        size = self.logits.hidden.element_size()
        # Counted twice below: every use computes the logits again before it multiplies by them.
        product = 2.0 * b * t * h * self.shape[0]
        kept = size * b * t * (h + 4)
        space = size * b * self.logits.columns * max(t, h)
        moved = 4.0 * size * b * self.shape[0] * (t + h)
        return (NormMethod("recomputed", 2 * product, 2 * product, moved, kept, space),)

    def squared_norm(self) -> Tensor:
        hidden = self.logits.hidden
        squared = hidden.new_zeros(self.batch_size)
        # Parts are disjoint rows of the gradient, so their squares add up.
        for _, left in self.logits.gradients():
            for b in range(self.batch_size):  # one [c, H] at a time
                squared[b] += square_sum((left[b].t() @ hidden[b])[None])[0]
        squared = without_cancellation(squared, self.magnitude(), [self], formed=True)
        return lengthened(squared, self.recomputed_error())

    def factored_inner(self, other: PerExampleGradient) -> Tensor | None:
        hidden = self.logits.hidden
        if isinstance(other, Scatter):
            # sum_s <values[s], sum_t left[t, ids[s]] hidden[t]>, with the logits of looked-up rows.
            at = other.ids
            picked = torch.bmm(hidden, self.logits.weight[at].to(hidden.dtype).transpose(1, 2))
            if self.logits.bias is not None:
                picked += self.logits.bias[at][:, None]
            picked = picked.sub_(self.logits.normaliser[..., None]).exp_()
            picked -= (self.logits.labels[:, :, None] == at[:, None, :]).to(picked.dtype)
            picked *= self.logits.scale[..., None]
            gram = torch.bmm(hidden, other.values.transpose(1, 2).to(hidden.dtype))
            return (gram * picked).sum((1, 2))
        if isinstance(other, SoftmaxOuter):
            right, parts = other.logits.hidden, (part for _, part in other.logits.gradients())
        elif isinstance(other, Outer) and other.left.shape[2] == self.shape[0]:
            right, columns = other.right, self.logits.columns
            parts = (other.left[:, :, start : start + columns] for start in self.logits.starts())
        else:
            return None
        # Inner products of the first factors add up over the classes; the second need theirs once.
        total = hidden.new_zeros(self.batch_size, hidden.shape[1], right.shape[1])
        for (_, left), theirs in zip(self.logits.gradients(), parts, strict=True):
            total += torch.bmm(left, theirs.transpose(1, 2).to(left.dtype))
        return (total * torch.bmm(hidden, right.transpose(1, 2).to(hidden.dtype))).sum((1, 2))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        # H numbers of each position are weighed, not V.
        hidden = weigh(self.logits.hidden, weights).flatten(0, 1)
        whole = hidden.new_empty(self.shape)
        for start, left in self.logits.gradients():
            torch.mm(left.flatten(0, 1).t(), hidden, out=whole[start : start + left.shape[2]])
        return whole
