"""Convolutions of rank 1 to 3, plain and transposed, with groups, dilation and string padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from dptorch.tape.gradients import Convolution, Dense, Geometry, Outer, PerExampleGradient
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import rows
from dptorch.tape.rules.input_gradient import convolve, in_parts_pays
from dptorch.tape.rules.recorder import Recorder
from dptorch.tape.rules.registry import detached, rule

# Bytes of the largest input of a convolution that each recording has seen.
_LARGEST_INPUT: WeakKeyDictionary[Recorder, int] = WeakKeyDictionary()


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * rank
    value = tuple(value)
    return value * rank if len(value) == 1 else value


@rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
def convolution(call: Call, recording: Recorder) -> Any:
    """Weight and bias of any convolution over a batch in dimension 0."""
    x, w, b = call.arg("input"), call.arg("weight"), call.arg("bias")
    rank = int(call.name[-2])
    tag = call.tag_of(x)
    if tag is None or tag.dim != 0 or len(call.tagged) > 1:
        return NotImplemented
    if x.dim() != rank + 2:
        return NotImplemented
    transposed = "transpose" in call.name
    stride = _tuple(call.arg("stride", 1), rank)
    padding = call.arg("padding", 0)
    if transposed:
        output_padding = _tuple(call.arg("output_padding", 0), rank)
        groups, dilation = call.arg("groups", 1), _tuple(call.arg("dilation", 1), rank)
    else:
        output_padding = (0,) * rank
        dilation, groups = _tuple(call.arg("dilation", 1), rank), call.arg("groups", 1)
    pads: list[int] = []
    if isinstance(padding, str):
        padding, pads = _resolve(padding, w.shape[2:], dilation)
    geometry = Geometry(
        stride, _tuple(padding, rank), dilation, output_padding, transposed, int(groups)
    )
    size = x.numel() * x.element_size()
    largest = _LARGEST_INPUT[recording] = max(_LARGEST_INPUT.get(recording, 0), size)
    # Smaller ones are not where memory peaks.
    if not pads and size >= largest / 2 and in_parts_pays(x, w):
        out = convolve(x, detached(w), detached(b), geometry)
    else:
        out = call.run({id(t): t.detach() for t in call.parameters})
    want_w, want_b = call.is_parameter(w), b is not None and call.is_parameter(b)
    n = call.batch_size

    def gradients(
        grads: Sequence[Tensor | None], saved: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, PerExampleGradient]]:
        assert grads[0] is not None
        g = rows(grads[0], tag, n)  # [B, m, P, ...]
        if want_w:
            inputs = rows(F.pad(saved[0], pads) if any(pads) else saved[0], tag, n)
            yield w, _form(inputs, g, w.shape, geometry)
        if want_b:
            assert b is not None
            yield b, Dense(g.flatten(3).sum((1, 3)))

    return recording.tap(call, out, [tag], (x.detach(),) if want_w else (), gradients)


def _form(inputs: Tensor, g: Tensor, shape: torch.Size, geometry: Geometry) -> PerExampleGradient:
    """A convolution; or a linear layer, where the windows tile the input without overlap (a patch
    embedding): inputs [B, m, C, ...], g [B, m, P, ...]."""
    rank, kernel = len(geometry.stride), shape[2:]
    tiles = not geometry.transposed and geometry.groups == 1 and math.prod(kernel) > 1
    if not tiles or geometry.stride != tuple(kernel) or any(geometry.padding):
        return Convolution(inputs, g, shape, geometry)
    if any(d != 1 for d, k in zip(geometry.dilation, kernel, strict=True) if k > 1):
        return Convolution(inputs, g, shape, geometry)
    x = inputs
    for i, (n, k) in enumerate(zip(g.shape[3:], kernel, strict=True)):
        # Each spatial dimension becomes two: the window, and the place in it.
        x = x.narrow(3 + 2 * i, 0, n * k).unflatten(3 + 2 * i, (n, k))
    windows, places = [3 + 2 * i for i in range(rank)], [4 + 2 * i for i in range(rank)]
    columns = x.permute(0, 1, *windows, 2, *places).flatten(2 + rank).flatten(1, 1 + rank)
    left = g.permute(0, 1, *range(3, 3 + rank), 2).flatten(1, 1 + rank)
    return Outer(left, columns, shape)


def _resolve(
    padding: str, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, ...], list[int]]:
    """Numbers for padding="same" or "valid": symmetric padding, or explicit F.pad amounts where the
    two sides differ."""
    if padding == "valid":
        return (0,) * len(kernel), []
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if all(t % 2 == 0 for t in total):
        return tuple(t // 2 for t in total), []
    pads = [amount for t in reversed(total) for amount in (t // 2, t - t // 2)]
    return (0,) * len(kernel), pads


__all__ = ["convolution"]
