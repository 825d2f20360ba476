"""Parameters that meet activations by broadcasting: scales, shifts, class tokens, attention biases.

The parameter is *lifted*: replaced by a copy expanded along the examples, so that autograd itself
delivers one gradient for each. No op-specific mathematics is needed, in-place ops included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dptorch.tape.gradients import Dense, PerExampleGradient
from dptorch.tape.propagation.elementwise import along_broadcast
from dptorch.tape.propagation.table import agree
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import ParamOnly, Tag, broadcast_shape, rows
from dptorch.tape.rules.generic_rule import generic
from dptorch.tape.rules.recorder import Recorder
from dptorch.tape.rules.registry import rule


@rule(
    """add sub rsub mul div where lerp addcmul addcdiv maximum minimum pow masked_fill clamp clip
    clamp_min clamp_max fmax fmin atan2 hypot logaddexp xlogy copysign float_power copy"""
)
def elementwise(call: Call, recording: Recorder) -> Any:
    """Elementwise ops of an activation with a parameter of any broadcastable shape."""
    tensors = call.operands()
    if call.in_place and call.is_parameter(call.first):
        return generic(call, recording)  # writes into the parameter
    if call.name == "masked_fill" and not call.in_place:
        x, mask, value = call.first, call.arg("mask"), call.arg("value")
        if isinstance(value, Tensor):  # masked_fill takes a value of no dimension only
            func = torch.where
            args = (mask, value, x)
            call = Call(func, "where", args, {}, call.tagged, call.parameters, call.batch_size)
            tensors = list(args)
    elif call.name == "masked_fill":
        return generic(call, recording)
    shape = broadcast_shape(*[t.shape for t in tensors])
    tag = _joint_tag(call, shape)
    table = {}
    for p in call.parameters:
        target = [1] * (len(shape) - p.dim()) + list(p.shape)
        if tag.dim is not None:
            target[tag.dim] = shape[tag.dim]
        table[id(p)] = recording.lift(p, target, tag)
    written = call.first if call.in_place else None
    before = None if written is None else recording.state(written)
    out = call.run(table)
    if written is not None and before != tag:
        recording.mark_written(out, before, tag)
    else:
        recording.mark(out, tag)
    return out


def _joint_tag(call: Call, shape: torch.Size) -> Tag:
    found = [
        tag if tag.dim is None else along_broadcast(t, tag, shape)
        for t, tag in call.tagged
        if not (call.name == "copy" and t is call.first)  # what it held is gone
    ]
    return agree(found or [tag for _, tag in call.tagged])


@rule("cat stack")
def join(call: Call, recording: Recorder) -> Any:
    """A class token or prompt joined to the sequence: it was expanded to the batch before."""
    parts = list(call.arg("tensors"))
    tag = call.tagged[0][1]
    dim = int(call.arg("dim", 0))
    rank = parts[0].dim()
    dim = dim % (rank + (call.name == "stack"))
    if any(g != tag for _, g in call.tagged) or tag.explicit is not None:
        return NotImplemented
    if tag.dim is not None and dim == tag.dim and call.name == "cat":
        return NotImplemented
    table = {id(p): recording.lift(p, p.shape, tag) for p in call.parameters}
    out = call.run(table)
    if tag.dim is not None and call.name == "stack" and dim <= tag.dim:
        tag = tag.at(tag.dim + 1)
    recording.mark(out, tag)
    return out


@rule("broadcast_tensors")
def broadcast_tensors(call: Call, recording: Recorder) -> Any:
    """Each operand expanded by itself; a parameter stays one, to be lifted where it meets the batch."""
    operands = call.args[0] if isinstance(call.args[0], (list, tuple)) else call.args
    shape = broadcast_shape(*[t.shape for t in operands])
    expanded = []
    for t in operands:
        e = t.expand(shape)
        tag = call.tag_of(t)
        if tag is not None:
            recording.mark(e, tag if tag.dim is None else along_broadcast(t, tag, shape))
        elif call.is_parameter(t):
            recording.mark(e, ParamOnly(source=t))
        expanded.append(e)
    return tuple(expanded)


@rule("scaled_dot_product_attention")
def attention_bias(call: Call, recording: Recorder) -> Any:
    """A bias or mask made from parameters alone (T5, Swin, BEiT), lifted along the batch."""
    mask = call.arg("attn_mask")
    query = call.arg("query")
    tag = call.tag_of(query)
    if tag is None or tag.explicit is not None or any(g != tag for _, g in call.tagged):
        return NotImplemented
    if [id(p) for p in call.parameters] != [id(mask)]:
        return NotImplemented
    target = [1] * (query.dim() - mask.dim()) + list(mask.shape)
    if tag.dim is not None:
        target[tag.dim] = query.shape[tag.dim]
    out = call.run({id(mask): recording.lift(mask, target, tag)})
    recording.mark(out, tag)
    return out


@rule("prelu")
def prelu(call: Call, recording: Recorder) -> Any:
    """``max(x, 0) + weight * min(x, 0)``, one slope in all or one a channel (dimension 1)."""
    x, weight = call.arg("input"), call.arg("weight")
    tag = call.tag_of(x)
    if tag is None or not call.is_parameter(weight) or tag.dim == 1 or x.dim() < 2:
        return NotImplemented
    slope = weight.detach()
    if weight.numel() > 1:
        if tag.dim is None:
            return NotImplemented
        slope = slope.view([-1 if i == 1 else 1 for i in range(x.dim())])
    out = call.func(x, weight.detach())
    n = call.batch_size

    def gradients(
        grads: Sequence[Tensor | None], saved: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, PerExampleGradient]]:
        assert grads[0] is not None
        per_element = grads[0] * saved[0].clamp(max=0)
        if slope.numel() == 1:
            total = rows(per_element, tag, n).flatten(1).sum(1, keepdim=True)
        else:
            assert tag.dim is not None
            channels_first = per_element.movedim(1, 0).unsqueeze(-1)  # behind the batch's shift
            at = tag.dim + 1 if tag.dim < 1 else tag.dim
            by_example = rows(channels_first, tag.at(at), n)  # [B, m, C, ...]
            total = by_example.flatten(3).sum((1, 3))
        yield weight, Dense(total.reshape(n, *weight.shape))

    return recording.tap(call, out, [tag], (x.detach(),), gradients)
