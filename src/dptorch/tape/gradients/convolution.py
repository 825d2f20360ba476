"""Gradients of convolutions of every rank, plain and transposed.

Shape legend: B examples, m images of one example, C input channels, P output channels, ... space.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dptorch.tape.gradients.base import (
    PerExampleGradient,
    at_least_float32,
    formed_norm,
    in_parts,
    square_sum,
    weigh,
    without_cancellation,
    without_underflow,
)
from dptorch.tape.gradients.clipping_modes import NormMethod
from dptorch.tape.gradients.dense import Dense
from dptorch.tape.gradients.gram import gram_norm

__all__ = ["Convolution", "Geometry"]


# With more pairs of input positions for an example, Gram matrices are made strip by strip.
_PAIRS_BYTES = 2**26
# Gradients to form in one native call, which takes twice as much again while it runs.
_GROUPED_BYTES = 2**20


def _behind(dims: int, *window: slice) -> tuple[slice, ...]:
    """An index that takes `window` of the dimensions behind the first `dims`."""
    return (slice(None),) * dims + window


@dataclass(frozen=True)
class Geometry:
    """How the kernel moves: one entry a spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    groups: int

    def arguments(self) -> tuple[Any, ...]:
        """As aten's convolution and its backward take it, from the stride on."""
        stride, padding, dilation = list(self.stride), list(self.padding), list(self.dilation)
        return stride, padding, dilation, self.transposed, list(self.output_padding), self.groups


class Convolution(PerExampleGradient):
    """The weight gradient of a convolution, from its input and its output's gradient.

    Three kernels serve it. *Forming* takes one batched product for each offset of the kernel, on
    shifted views of the input, or, where channels are few, one native convolution backward that sees
    the batch as groups. The *Gram* norm takes the products of all pairs of input positions once and
    adds them up along the kernel's offsets, so that the unfolded input is never made: it costs as if
    the kernel had one position. The *weighted sum* is the native backward of the weighted output
    gradient.

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

    def held(self) -> tuple[Tensor, ...]:
        return self.inputs, self.grads

    def _backward(self, inputs: Tensor, grads: Tensor, shape: torch.Size, groups: int) -> Tensor:
        weight = inputs.new_empty(1).expand(shape)  # only its shape is read
        arguments = replace(self.geometry, groups=groups).arguments()
        result: Tensor = torch.ops.aten.convolution_backward(
            grads, inputs, weight, None, *arguments, [False, True, False]
        )[1]
        return result

    def dense(self) -> Tensor:
        return self._formed().dense()

    def _formed(self) -> Dense:
        if not self._few_offsets():
            return Dense(self._by_groups())
        parts = self._by_offsets()
        first = next(parts)
        b, p, c = first.shape
        offsets = math.prod(self.shape[2:])
        values = first.new_empty(b, offsets, p, c)
        values[:, 0] = first
        for i, part in enumerate(parts, 1):
            values[:, i] = part
        rank = len(self.shape) - 2
        unfolded = values.view(b, *self.shape[2:], p, c)
        return Dense(unfolded, (0, rank + 1, rank + 2, *range(1, rank + 1)))

    def _formed_norm(self) -> Tensor:
        """Squared norms from gradients that are dropped, offset by offset where that is possible."""
        if not self._few_offsets():
            return formed_norm(self)
        return sum((square_sum(part) for part in self._by_offsets()), torch.zeros(()))

    def _few_offsets(self) -> bool:
        """Whether products at each offset beat the native backward, as measured on CPU and known of
        cuDNN, whose grouped backward is slow."""
        g, offsets = self.geometry, math.prod(self.shape[2:])
        if g.transposed or g.groups > 1 or len(g.stride) > 2 or offsets > 25:
            return False
        wide = self.shape[0] * self.shape[1] > 64 * 64 or self.shape[1] == 1
        return wide or self.inputs.is_cuda or offsets == 1

    def _by_groups(self) -> Tensor:
        b, each = self.batch_size, self.grads.element_size() * math.prod(self.shape)
        step = max(4 * torch.get_num_threads(), _GROUPED_BYTES // max(1, each))
        if step >= b:
            return self._grouped()
        out = self.grads.new_empty(b, *self.shape)
        for i in range(0, b, step):
            out[i : i + step] = self.part(i, min(i + step, b))._grouped()
        return out

    def _grouped(self) -> Tensor:
        """One native call that sees the examples as groups, [B, *shape]."""
        b, m = self.inputs.shape[:2]
        inputs = self.inputs.transpose(0, 1).reshape(m, -1, *self.inputs.shape[3:])
        grads = self.grads.transpose(0, 1).reshape(m, -1, *self.grads.shape[3:])
        shape = torch.Size((b * self.shape[0], *self.shape[1:]))
        out = self._backward(inputs, grads, shape, b * self.geometry.groups)
        return out.view(b, *self.shape)

    def _padded(self) -> tuple[Tensor, list[tuple[Any, ...]]]:
        """The padded input, and the window of it that each offset of the kernel meets the output in."""
        g = self.geometry
        pads = [amount for p in reversed(g.padding) for amount in (p, p)]
        inputs = F.pad(self.inputs, pads) if any(pads) else self.inputs
        sizes = self.grads.shape[3:]
        windows = []
        for offset in itertools.product(*(range(k) for k in self.shape[2:])):
            starts = [o * d for o, d in zip(offset, g.dilation, strict=True)]
            windows.append(
                tuple(
                    slice(start, start + (n - 1) * step + 1, step)
                    for start, n, step in zip(starts, sizes, g.stride, strict=True)
                )
            )
        return inputs, windows

    def _by_offsets(self) -> Iterator[Tensor]:
        """The gradient at each offset of the kernel, [B, P, C]."""
        inputs, windows = self._padded()
        grads = self.grads.transpose(1, 2).flatten(2)  # [B, P, m * positions]
        for window in windows:
            seen = inputs[_behind(3, *window)]
            seen = seen.transpose(1, 2).flatten(2)  # [B, C, m * positions]
            yield torch.bmm(grads, seen.transpose(1, 2))

    def take(self, index: Tensor, dtype: torch.dtype | None = None) -> Convolution:
        dtype = dtype or self.grads.dtype
        return Convolution(
            self.inputs.index_select(0, index).to(dtype),
            self.grads.index_select(0, index).to(dtype),
            self.shape,
            self.geometry,
        )

    def part(self, start: int, stop: int) -> Convolution:
        return Convolution(
            self.inputs[start:stop], self.grads[start:stop], self.shape, self.geometry
        )

    def _gram_possible(self) -> bool:
        g = self.geometry
        return g.groups == 1 and not g.transposed and self.inputs.shape[1] == 1

    def sizes(self) -> tuple[tuple[str, int], ...]:
        t = self.grads.shape[1] * math.prod(self.grads.shape[3:])
        d, p = math.prod(self.shape[1:]), self.shape[0]
        return ("B", self.batch_size), ("T", t), ("d", d), ("p", p)

    def _seen(self) -> int:
        """Positions of the padded input."""
        sizes = zip(self.inputs.shape[3:], self.geometry.padding, strict=True)
        return math.prod(n + 2 * q for n, q in sizes)

    def _columns_bytes(self) -> int:
        positions = math.prod(self.grads.shape[3:])
        return self.grads.element_size() * positions * math.prod(self.shape[1:])

    def norm_methods(self) -> tuple[NormMethod, ...]:
        b, size = self.batch_size, self.grads.element_size()
        p, d, offsets = self.shape[0], math.prod(self.shape[1:]), math.prod(self.shape[2:])
        t = self.grads.shape[1] * math.prod(self.grads.shape[3:])
        if self.geometry.transposed:  # the roles of input and output are exchanged
            t = self.inputs.shape[1] * math.prod(self.inputs.shape[3:])
        form, factors = 2.0 * b * t * p * d, size * (self.inputs.numel() + self.grads.numel())
        formed = size * b * p * d
        copied = 2 * offsets * self.inputs.numel() * size / math.prod(self.geometry.stride)
        methods = [
            NormMethod("form", form, form, copied + 2 * formed, factors, formed),
            NormMethod("keep", form, 2 * formed / size, copied + 3 * formed, formed, formed),
        ]
        if self._gram_possible():
            seen = self._seen()
            flops = 2.0 * b * (seen * seen * self.inputs.shape[2] + t * t * p)
            pairs = size * b * t * t
            moved = pairs * (2 * offsets + 5)
            methods.append(NormMethod("gram", flops, form, moved, factors, 2 * pairs))
        return tuple(methods)

    def measured(self, method: str) -> tuple[Tensor, PerExampleGradient]:
        kept: PerExampleGradient = self
        if method == "gram":
            return self.gram(), self
        if method == "keep":
            kept = self._formed()
            squared = kept.squared_norm()
        else:
            squared = self._formed_norm()
        return without_cancellation(squared, self.magnitude(), [self], formed=True), kept

    def gram(self) -> Tensor:
        """Squared norms from Gram matrices, [B]."""
        pairs = self.grads.element_size() * self._seen() ** 2
        if pairs <= _PAIRS_BYTES:
            squared = in_parts(self, pairs, Convolution._gram_norm)
        else:
            squared = in_parts(self, self._columns_bytes(), Convolution._unfolded_gram_norm)
        magnitude = self.magnitude()
        inputs, grads = self._lengths()
        positions = math.prod(self.grads.shape[3:])
        terms = positions**2 * (self.shape[0] + math.prod(self.shape[1:]))
        longest = torch.maximum(inputs, grads).square()
        squared, magnitude = without_underflow(self, squared, magnitude, longest, terms)
        return without_cancellation(squared, magnitude, [self], formed=False)

    def _lengths(self) -> tuple[Tensor, Tensor]:
        """Of inputs and output gradients, [B] each."""
        inputs = torch.linalg.vector_norm(self.inputs.flatten(1), dim=1)
        return inputs, torch.linalg.vector_norm(self.grads.flatten(1), dim=1)

    def squared_norm(self) -> Tensor:
        return self.measured("form")[0]

    def magnitude(self) -> Tensor:
        # No larger than the product of the factors' norms times the kernel's overlap; the sum over
        # positions of products would need the unfolded input.
        reach = math.sqrt(math.prod(self.shape[2:]))
        inputs, grads = self._lengths()
        return reach * inputs * grads

    def _gram_norm(self) -> Tensor:
        inputs, windows = self._padded()
        b, p = inputs.shape[0], self.shape[0]
        flat = inputs.flatten(3)[:, 0]  # [B, C, positions of the padded input]
        pairs = torch.bmm(flat.transpose(1, 2), flat).view(b, *inputs.shape[3:], *inputs.shape[3:])
        gram = pairs[_behind(1, *windows[0], *windows[0])].clone(
            memory_format=torch.contiguous_format
        )
        for window in windows[1:]:
            gram += pairs[_behind(1, *window, *window)]
        grads = self.grads.reshape(b, p, -1)
        product = torch.bmm(grads.transpose(1, 2), grads)
        product *= gram.view(product.shape)
        return product.sum((1, 2)).clamp_(min=0)

    def _unfolded_gram_norm(self) -> Tensor:
        inputs, windows = self._padded()
        seen = [inputs[:, 0][_behind(2, *window)].flatten(2) for window in windows]
        columns = torch.cat(seen, 1).transpose(1, 2)  # [B, positions, C * offsets]
        return gram_norm(self.grads[:, 0].flatten(2).transpose(1, 2), columns)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        grads = weigh(self.grads, weights)
        return self._backward(
            self.inputs.flatten(0, 1), grads.flatten(0, 1), self.shape, self.geometry.groups
        )

    def fits(self, other: PerExampleGradient) -> bool:
        return (
            isinstance(other, Convolution)
            and other.geometry == self.geometry
            and other.inputs.shape[2:] == self.inputs.shape[2:]
        )

    def merged(self, others: Sequence[PerExampleGradient]) -> PerExampleGradient:
        inputs, grads = zip(*(f.held() for f in (self, *others)), strict=True)
        return Convolution(torch.cat(inputs, 1), torch.cat(grads, 1), self.shape, self.geometry)
