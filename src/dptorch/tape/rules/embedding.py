"""Looked-up tables.

Shape legend: B examples, T positions, D features, V rows of the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dptorch.errors import NotCoveredError
from dptorch.tape.gradients import PerExampleGradient, Scatter
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Tag, rows
from dptorch.tape.rules.recorder import Recorder
from dptorch.tape.rules.registry import rule


@rule("embedding")
def embedding(call: Call, recording: Recorder) -> Any:
    """F.embedding with ids of any shape; `padding_idx` rows get no gradient.

    Raises:
        NotCoveredError: for `max_norm`, which changes the table outside the noised step, and for
            `scale_grad_by_freq`, which divides by counts over the whole batch.
    """
    builtin = call.func is torch.embedding  # without max_norm, and with -1 for no padding
    table, ids = call.arg("weight"), call.arg("indices") if builtin else call.arg("input")
    padding = call.arg("padding_idx", -1 if builtin else None)
    padding = None if builtin and padding == -1 else padding
    if call.arg("max_norm") is not None:
        raise NotCoveredError(
            f"{recording.describe(table)}: max_norm rewrites the table in the forward pass, outside "
            "the noised step. Use max_norm=None."
        )
    if call.arg("scale_grad_by_freq", False):
        raise NotCoveredError(
            f"{recording.describe(table)}: scale_grad_by_freq divides by counts over the whole "
            "batch. Use scale_grad_by_freq=False."
        )
    tag = call.tag_of(ids)
    if tag is None or not call.is_parameter(table):
        return NotImplemented
    n = call.batch_size
    out = call.func(table.detach(), ids) if builtin else call.func(ids, table.detach())

    def gradients(
        grads: Sequence[Tensor | None], saved: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, PerExampleGradient]]:
        assert grads[0] is not None
        ids_BT = rows(saved[0], tag, n).flatten(1)
        g_BTD = rows(grads[0], tag, n).flatten(1, -2)
        if padding is not None:
            keep = ids_BT != padding % table.shape[0]
            g_BTD = g_BTD * keep[..., None]
        yield table, Scatter(ids_BT, g_BTD, table.shape)

    return recording.tap(call, out, [tag], (ids,), gradients)


@rule("embedding_bag")
def embedding_bag(call: Call, recording: Recorder) -> Any:
    """Sums and means of bags of rows, ids [B, T] or bags of one size in a row, [B * T] with offsets;
    other forms go to the generic rule.

    Raises:
        NotCoveredError: for `max_norm` and `scale_grad_by_freq`, as `embedding` does.
    """
    ids, table = call.arg("input"), call.arg("weight")
    mode, scale = call.arg("mode", "mean"), call.arg("per_sample_weights")
    padding = call.arg("padding_idx")
    if call.arg("max_norm") is not None or call.arg("scale_grad_by_freq", False):
        raise NotCoveredError(
            f"{recording.describe(table)}: max_norm rewrites the table in the forward pass, and "
            "scale_grad_by_freq divides by counts over the whole batch. Use neither."
        )
    tag = call.tag_of(ids)
    if tag is None or tag.dim != 0 or mode == "max":
        return NotImplemented
    if ids.dim() == 1:
        each = _size_of_bags(ids, call.arg("offsets"))
        if not each or not tag.regular or tag.step % each:
            return NotImplemented
        bag_tag, shape = Tag(0, tag.step // each), (-1, each)
    else:
        bag_tag, shape = tag, tuple(ids.shape)
    if [id(p) for p in call.parameters] != [id(table)]:
        return NotImplemented
    if scale is not None and call.tag_of(scale) != tag:
        return NotImplemented
    n = call.batch_size
    out = call.run({id(table): table.detach()})
    padding = None if padding is None else padding % table.shape[0]

    def gradients(
        grads: Sequence[Tensor | None], saved: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, PerExampleGradient]]:
        assert grads[0] is not None
        bags, *weights = (t.reshape(shape) for t in saved)
        share = (bags != padding if padding is not None else torch.ones_like(bags)).to(
            grads[0].dtype
        )
        if mode == "mean":
            share = share / share.sum(1, keepdim=True).clamp(min=1)
        if weights:
            share = share * weights[0]
        values = rows(grads[0][:, None] * share[..., None], bag_tag, n)  # [B, m, T, D]
        yield table, Scatter(rows(bags, bag_tag, n).flatten(1), values.flatten(1, 2), table.shape)

    kept = (ids,) if scale is None else (ids, scale.detach())
    return recording.tap(call, out, [bag_tag], kept, gradients)


def _size_of_bags(ids: Tensor, offsets: Tensor | None) -> int:
    """How many ids every bag holds if that is the same number for each, else 0."""
    if offsets is None or offsets.numel() == 0 or ids.numel() % offsets.numel():
        return 0
    each = ids.numel() // offsets.numel()
    even = torch.arange(0, ids.numel(), each, device=offsets.device) if each else offsets + 1
    return each if torch.equal(offsets.to(even.dtype), even) else 0
