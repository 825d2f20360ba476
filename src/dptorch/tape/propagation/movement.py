"""Views, permutations, indexing: ops that move the elements of one tensor.

The common ones are worked out from their arguments. The rest are run a second time, on a
zero-stride tensor of indices along the example dimension (`provenance.shadow`), and the tag is read
off the result: one mechanism instead of a rule for each op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dptorch.tape.propagation.elementwise import along_broadcast
from dptorch.tape.propagation.table import Found, agree, family
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import (
    Lost,
    Tag,
    owners,
    read_shadow,
    regular_or_explicit,
    shadow,
    tag_after_view,
)

__all__ = ["region"]


@family(
    """view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel _reshape_alias
    atleast_1d atleast_2d atleast_3d"""
)
def view(call: Call, outputs: Sequence[Any]) -> Found:
    """Reshapes."""
    x = call.args[0]
    tag = call.tag_of(x)
    if tag is None:  # only the shape of the other operand was used
        return None
    if call.name == "view" and len(call.args) > 1 and isinstance(call.args[1], torch.dtype):
        if x.element_size() != outputs[0].element_size():
            raise Lost("elements are reinterpreted at another size")
        return tag
    return tag_after_view(x.shape, tag, outputs[0].shape, call.batch_size)


@family("view_as_real")
def view_as_real(call: Call, outputs: Sequence[Any]) -> Found:
    """A new last dimension."""
    return call.tagged[0][1]


@family("transpose")
def transpose(call: Call, outputs: Sequence[Any]) -> Found:
    """Two dimensions change places."""
    x, tag = call.tagged[0]
    a = call.arg(1, "dim0", call.kwargs.get("axis0")) % x.dim()
    b = call.arg(2, "dim1", call.kwargs.get("axis1")) % x.dim()
    assert tag.dim is not None
    return tag.at(b) if tag.dim == a else tag.at(a) if tag.dim == b else tag


@family("permute")
def permute(call: Call, outputs: Sequence[Any]) -> Found:
    """All dimensions change places."""
    x, tag = call.tagged[0]
    order = call.kwargs.get("dims", call.args[1] if len(call.args) == 2 else call.args[1:])
    return tag.at([d % x.dim() for d in order].index(tag.dim))


# Where `dim` stands, and what it is by default, in ops that cut along one dimension.
_CUT = {"split": (2, 0), "chunk": (2, 0), "split_with_sizes": (2, 0), "narrow": (1, None)}
_DROP = {"select": (1, None), "unbind": (1, 0)}


@family("split chunk split_with_sizes narrow select unbind")
def cut(call: Call, outputs: Sequence[Any]) -> Found | list[Found]:
    """Slices along one dimension, usually not that of the examples."""
    x, tag = call.tagged[0]
    dropped = call.name in _DROP
    position, default = (_DROP if dropped else _CUT)[call.name]
    dim = call.arg(position, "dim", default)
    if isinstance(dim, int) and call.args and call.args[0] is x:
        dim %= x.dim()
        if dim != tag.dim:
            assert tag.dim is not None
            return tag.at(tag.dim - 1) if dropped and dim < tag.dim else tag
    return movement(call, outputs)


@family(
    """movedim t .T .mT .H .mH adjoint tensor_split hsplit vsplit dsplit flip roll diagonal unfold
    rot90 __iter__ fliplr flipud"""
)
def movement(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """Data movement of one operand, by its shadow."""
    x = call.args[0]
    tag = call.tag_of(x)
    if tag is None or len(call.tagged) > 1:
        raise Lost("an index carries examples")
    assert tag.dim is not None
    index = shadow(x.shape, tag.dim, x.device)
    if call.name.startswith("."):
        moved = getattr(index, call.name[1:])
    else:
        moved = call.func(index, *call.args[1:], **call.kwargs)
    parts = moved if isinstance(moved, (list, tuple)) else (moved,)
    size = x.shape[tag.dim]
    found: list[Found] = []
    for part in parts:
        read = read_shadow(part, tag, size, call.batch_size)
        found.append(read)
    return found


@family("expand expand_as broadcast_to")
def expand(call: Call, outputs: Sequence[Any]) -> Found:
    """New dimensions come in front."""
    x = call.args[0]
    tag = call.tag_of(x)
    return None if tag is None else along_broadcast(x, tag, outputs[0].shape)


@family("index_select")
def index_select(call: Call, outputs: Sequence[Any]) -> Found:
    """Rows by number; numbers that carry examples must pick from their own, or from a constant."""
    x, index = call.arg(0, "input"), call.arg(2, "index")
    dim = call.arg(1, "dim") % x.dim()
    tag, by = call.tag_of(x), call.tag_of(index)
    if tag is None:
        assert by is not None
        return by.at(dim)
    picked: Found = tag
    if tag.dim == dim:
        owner = owners(tag, x.shape[dim], call.batch_size, x.device)[index]
        picked = regular_or_explicit(owner, dim, call.batch_size, tag.step)
    if by is not None and by.at(dim) != picked:
        raise Lost("an index that carries examples picks rows of others")
    return picked


@family("masked_select")
def masked_select(call: Call, outputs: Sequence[Any]) -> Found:
    """The selected elements in a row, each still its example's."""
    x, mask = call.arg(0, "input"), call.arg(1, "mask")
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    tag = agree([along_broadcast(t, g, shape) for t, g in call.tagged])
    assert tag.dim is not None
    which = shadow(shape, tag.dim, x.device)[mask.expand(shape)]
    return read_shadow(which, tag, shape[tag.dim], call.batch_size)


@family("__getitem__")
def getitem(call: Call, outputs: Sequence[Any]) -> Found:
    """Indexing: the data, the index tensors, or both may carry the examples."""
    x, index = call.args
    tag = call.tag_of(x)
    if tag is not None and len(call.tagged) == 1:
        simple = _basic(x, tag, index)
        if simple is not None:
            return simple
    return region(call, x, tag, index)


def _basic(x: Tensor, tag: Tag, index: Any) -> Tag | None:
    """Slices, numbers, None and one ellipsis that leave the example dimension whole."""
    parts = index if isinstance(index, tuple) else (index,)
    assert tag.dim is not None
    used = 0
    for p in parts:
        kind = type(p)
        if kind is int or kind is slice:
            used += 1
        elif p is not None and p is not Ellipsis:
            return None
    at, out = 0, 0
    for p in parts:
        if p is None:
            out += 1
            continue
        if p is Ellipsis:
            skipped = x.dim() - used
            if at <= tag.dim < at + skipped:
                return tag.at(out + tag.dim - at)
            at, out = at + skipped, out + skipped
            continue
        if at == tag.dim:
            whole = type(p) is slice and p.start is None and p.stop is None and p.step is None
            return tag.at(out) if whole else None
        at += 1
        out += type(p) is slice
    return tag.at(out + tag.dim - at)


def region(call: Call, x: Tensor, tag: Tag | None, index: Any) -> Tag:
    """The tag of ``x[index]``.

    Raises:
        Lost: if the index carries examples that are not those of the data it picks.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    found: list[Tag] = []
    if tag is not None:
        assert tag.dim is not None
        moved = shadow(x.shape, tag.dim, x.device)[index]
        found.append(read_shadow(moved, tag, x.shape[tag.dim], call.batch_size))
    by = [(i, p, call.tag_of(p)) for i, p in enumerate(parts) if isinstance(p, Tensor)]
    for i, p, own in by:
        if own is None:
            continue
        if p.dtype in (torch.bool, torch.uint8):
            # What is picked must depend on nothing but the example it is picked from.
            assert own.dim is not None
            if tag is None or len(by) > 1 or own.at(own.dim + _consumed(x, parts[:i])) != tag:
                raise Lost("a mask that carries examples selects from data of others")
            continue
        assert own.dim is not None
        if any(q.dtype in (torch.bool, torch.uint8) for _, q, _ in by):
            raise Lost("a mask and an index that carries examples")
        first, last = by[0][0], by[-1][0]
        adjacent = all(isinstance(q, (Tensor, int)) for q in parts[first : last + 1])
        broadcast = torch.broadcast_shapes(*[q.shape for _, q, _ in by])
        numbers = [j for j, q in enumerate(parts) if isinstance(q, int) and not isinstance(q, bool)]
        adjacent = adjacent and all(j > first for j in numbers if j > last or j < first)
        offset = _kept(x, parts, first) if adjacent and not numbers else 0
        if numbers and adjacent:
            raise Lost("numbers beside an index that carries examples; use slices")
        found.append(own.at(offset + own.dim - p.dim() + len(broadcast)))
        if p.shape[own.dim] != broadcast[own.dim - p.dim() + len(broadcast)]:
            raise Lost("an index is broadcast along its examples")
    return agree(found)


def _consumed(x: Tensor, before: Sequence[Any]) -> int:
    """How many dimensions of x the index parts before a tensor take up."""
    taken = 0
    for p in before:
        if p is Ellipsis or isinstance(p, Tensor):
            raise Lost("an ellipsis or another tensor before an index that carries examples")
        taken += p is not None
    return taken


def _kept(x: Tensor, parts: Sequence[Any], first: int) -> int:
    """How many dimensions of the result come before those of the index tensors."""
    kept = 0
    for p in parts[:first]:
        if p is Ellipsis:
            named = sum(q is not None and q is not Ellipsis for q in parts)
            kept += x.dim() - named
        else:
            kept += 1
    return kept


@family("repeat tile")
def repeat(call: Call, outputs: Sequence[Any]) -> Found:
    """Periodic owners stay periodic."""
    x, tag = call.tagged[0]
    assert tag.dim is not None
    dim = tag.dim + outputs[0].dim() - x.dim()
    if tag.explicit is not None:
        times = outputs[0].shape[dim] // x.shape[tag.dim]
        return Tag(dim, 1, tag.explicit * times)
    return tag.at(dim)


@family("repeat_interleave")
def repeat_interleave(call: Call, outputs: Sequence[Any]) -> Found:
    """Each index several times in a row."""
    x = call.args[0]
    tag = call.tag_of(x)
    times = call.arg(1, "repeats")
    dim = call.arg(2, "dim")
    if tag is None or not isinstance(times, int):
        raise Lost("the number of repeats carries examples, or is a tensor")
    if dim is None:
        inner = math.prod(x.shape[(tag.dim or 0) :]) // x.shape[tag.dim or 0]
        if tag.dim != 0 or tag.explicit is not None:
            raise Lost("repeat_interleave folds examples together")
        return Tag(0, tag.step * times * inner)
    if dim % x.dim() != tag.dim:
        return tag
    if tag.explicit is not None:
        return Tag(tag.dim, 1, tuple(o for o in tag.explicit for _ in range(times)))
    return Tag(tag.dim, tag.step * times)
