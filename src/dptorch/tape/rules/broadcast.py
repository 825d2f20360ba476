"""Parameters that meet activations by broadcasting: scales, shifts, class tokens, attention biases.

The parameter is *lifted*: replaced by a copy expanded along the examples, so that autograd itself
delivers one gradient for each. No op-specific mathematics is needed, in-place ops included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dptorch.tape.calls import Call
from dptorch.tape.provenance import Lost, Tag
from dptorch.tape.rules.registry import rule

if TYPE_CHECKING:
    from dptorch.tape.recording import Recording


@rule("add sub rsub mul div where lerp addcmul addcdiv maximum minimum pow masked_fill")
def elementwise(call: Call, recording: Recording) -> Any:
    """Elementwise ops of an activation with a parameter of any broadcastable shape."""
    tensors = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor)]
    if call.args and isinstance(call.args[0], Tensor) and call.is_parameter(call.args[0]):
        if call.func.__name__.endswith("_") and not call.func.__name__.endswith("__"):
            return NotImplemented  # writes into the parameter
        if call.func.__name__.startswith("__i"):
            return NotImplemented
    shape = torch.broadcast_shapes(*[t.shape for t in tensors])
    tag = _joint_tag(call, len(shape))
    table = {}
    for p in call.parameters:
        target = [1] * (len(shape) - p.dim()) + list(p.shape)
        if tag.dim is not None:
            target[tag.dim] = shape[tag.dim]
        table[id(p)] = recording.lift(p, target, tag)
    out = call.run(table)
    recording.mark(out, tag)
    return out


def _joint_tag(call: Call, rank: int) -> Tag:
    found = {
        tag if tag.dim is None else tag.at(tag.dim - t.dim() + rank) for t, tag in call.tagged
    }
    if len(found) != 1:
        raise Lost("operands carry the examples in different places")
    return found.pop()


@rule("cat stack")
def join(call: Call, recording: Recording) -> Any:
    """A class token or prompt joined to the sequence: it was expanded to the batch before."""
    parts = list(call.args[0])
    tag = call.tagged[0][1]
    dim = int(call.arg(1, "dim", call.kwargs.get("axis", 0)))
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


@rule("scaled_dot_product_attention")
def attention_bias(call: Call, recording: Recording) -> Any:
    """A bias or mask made from parameters alone (T5, Swin, BEiT), lifted along the batch."""
    mask = call.arg(3, "attn_mask")
    query = call.args[0]
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
