"""A convolution whose input gradient is made a few examples at a time.

The native backward reorders memory for all examples at once: beside the gradient it takes as much
again, or twice as much. That is where a step's memory peaks, because what is kept for clipping comes
on top. In parts it gives the same numbers; docs/cost_profile.md says in how much more time.

Shape legend: N images, C input channels, P output channels, ... space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dptorch.tape.gradients import Geometry

__all__ = ["convolve", "in_parts_pays"]

# Of the larger of input and output that one native call sees, and its fewest examples.
_PART_BYTES, _FEWEST = 3 * 2**18, 4


def in_parts_pays(x: Tensor, w: Tensor) -> bool:
    """Whether `convolve` is to be preferred. Under autocast the functional op must do the casting."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    large = x.numel() * x.element_size() > 2 * _PART_BYTES and len(x) > _FEWEST
    return large and x.requires_grad and x.dtype == w.dtype


class _Convolve(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        out: Tensor = torch.convolution(x, weight, bias, *geometry.arguments())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,), grad = ctx.saved_tensors, grads[0]
        arguments = ctx.geometry.arguments()
        found = grad.new_empty(ctx.shape)
        each = max(found[0].numel(), grad[0].numel()) * grad.element_size()
        step = max(_FEWEST, _PART_BYTES // max(1, each))
        for i in range(0, len(found), step):
            part = found[i : i + step]  # as an argument only its shape is read
            part[:] = torch.ops.aten.convolution_backward(
                grad[i : i + step], part, weight, None, *arguments, [True, False, False]
            )[0]
        return found, None, None, None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of x [N, C, ...] with a weight and a bias that need no gradient, [N, P, ...]."""
    out: Tensor = _apply(x, weight, bias, geometry)
    return out


# Bound before a recording patches Function.apply.
_apply: Callable[..., Any] = _Convolve.apply
