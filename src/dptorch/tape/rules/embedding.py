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
from dptorch.tape.propagation.layers import bag_owners
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
    """Sums and means of bags of rows, ids [B, T] or ids in a row with the offsets of the bags; the
    largest of a bag goes to the generic rule.

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
    if tag is None or tag.dim not in (0, None) or mode == "max":
        return NotImplemented
    # Weights of single ids that are trained too are left to the generic rule.
    if [id(p) for p in call.parameters] != [id(table)]:
        return NotImplemented
    if scale is not None and call.tag_of(scale) != tag:
        return NotImplemented
    out = call.run({id(table): table.detach()})
    bags, n = out.shape[0], call.batch_size
    if ids.dim() == 1:
        offsets = call.arg("offsets")
        ends = torch.cat([offsets[1:], offsets.new_tensor([ids.shape[0]])])[:bags]
        bag_of_id = torch.arange(bags, device=ids.device).repeat_interleave(ends - offsets[:bags])
        bag_tag = tag if tag.dim is None else bag_owners(call, ids, offsets, bags)
    else:
        bag_of_id = torch.arange(bags, device=ids.device).repeat_interleave(ids.shape[1])
        bag_tag = tag
    ids_tag = tag if tag.dim is None or ids.dim() == 1 else Tag(0, tag.step * ids.shape[1])
    if ids.dim() > 1 and tag.explicit is not None:
        explicit = tuple(o for o in tag.explicit for _ in range(ids.shape[1]))
        ids_tag = Tag(0, 1, explicit)
    # A negative index counts from the end, and is compared with ids below.
    padding = None if padding is None else padding % table.shape[0]

    def gradients(
        grads: Sequence[Tensor | None], saved: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, PerExampleGradient]]:
        g = grads[0]
        assert g is not None
        flat, *weights = (t.reshape(-1) for t in saved)
        share = (flat != padding if padding is not None else torch.ones_like(flat)).to(g.dtype)
        if mode == "mean":
            counts = g.new_zeros(bags).index_add(0, bag_of_id, share)
            # A bag of padding alone has the mean zero, and not 0 / 0.
            share = share / counts.clamp(min=1)[bag_of_id]
        if weights:
            share = share * weights[0]
        values = g[bag_of_id] * share[:, None]
        yield (
            table,
            Scatter(
                rows(flat, ids_tag, n).flatten(1),
                rows(values, ids_tag, n).flatten(1, -2),
                table.shape,
            ),
        )

    kept = (ids,) if scale is None else (ids, scale.detach())
    return recording.tap(call, out, [bag_tag], kept, gradients)
