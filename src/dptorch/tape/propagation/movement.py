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
from dptorch.tape.propagation.table import Found, agree, family, only_tag
from dptorch.tape.provenance.aliases import owner_of_each
from dptorch.tape.provenance.calls import Call, each_tensor
from dptorch.tape.provenance.tags import (
    Lost,
    Tag,
    owners,
    read_owners,
    read_shadow,
    regular_or_explicit,
    shadow,
    tag_after_view,
)

__all__ = ["region", "taken"]

_LARGEST = 2**24  # elements of memory that are looked at one by one
_ELSEWHERE = -2


@family(
    """view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel _reshape_alias
    _unsafe_view"""
)
def view(call: Call, outputs: Sequence[Any]) -> Found:
    """Reshapes."""
    x = call.first
    tag = call.tag_of(x)
    if tag is None:  # only the shape of the other operand was used
        return None
    if call.name == "view" and x.dtype != outputs[0].dtype:
        if x.element_size() != outputs[0].element_size():
            raise Lost("elements are reinterpreted at another size")
        return tag
    return tag_after_view(x.shape, tag, outputs[0].shape, call.batch_size)


@family("as_strided")
def as_strided(call: Call, outputs: Sequence[Any]) -> Found:
    """Overlapping windows, say: whose each element is, is read off the memory of the operand."""
    x, tag, out = call.first, call.tag_of(call.first), outputs[0]
    if tag is None:
        return None
    owner = owner_of_each(x, tag, call.batch_size)
    places = [(x.shape, x.stride()), (out.shape, out.stride())]
    start = out.storage_offset() - x.storage_offset()
    if all(shape[-1:] == x.shape[-1:] and stride[-1:] == (1,) for shape, stride in places):
        width = x.shape[-1]  # of blocks that both keep whole, and that are one example's
        others = [s for _, stride in places for s in stride[:-1]]
        if tag.dim != x.dim() - 1 and all(s % width == 0 for s in (*others, start)):
            places = [(shape[:-1], [s // width for s in stride[:-1]]) for shape, stride in places]
            owner, start = owner[..., 0], start // width
    reach = [
        sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) for shape, stride in places
    ]
    if start < 0 or start + reach[1] > reach[0] or not x.numel() or reach[0] > _LARGEST:
        raise Lost("it reads memory by strides")
    if any(n > 1 and not s for n, s in zip(*places[0], strict=True)):
        raise Lost("it reads memory of an expanded tensor by strides")
    memory = torch.full((reach[0] + 1,), _ELSEWHERE, dtype=owner.dtype)
    memory.as_strided(*places[0]).copy_(owner)
    found = memory.as_strided(*places[1], start)
    if bool((found == _ELSEWHERE).any()):
        raise Lost("it reads memory between the elements of its operand")
    return read_owners(
        found.reshape(*found.shape, *([1] * (out.dim() - found.dim()))), call.batch_size
    )


@family("view_as_real")
def view_as_real(call: Call, outputs: Sequence[Any]) -> Found:
    """A new last dimension."""
    return call.tagged[0][1]


@family("transpose")
def transpose(call: Call, outputs: Sequence[Any]) -> Found:
    """Two dimensions change places."""
    x, tag = call.tagged[0]
    a, b = call.arg("dim0") % x.dim(), call.arg("dim1") % x.dim()
    assert tag.dim is not None
    return tag.at(b) if tag.dim == a else tag.at(a) if tag.dim == b else tag


@family("permute")
def permute(call: Call, outputs: Sequence[Any]) -> Found:
    """All dimensions change places."""
    x, tag = call.tagged[0]
    order = call.arg("dims")
    return tag.at([d % x.dim() for d in order].index(tag.dim))


# Ops that cut along one dimension, by default the first.
@family(
    "split chunk split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk narrow slice"
)
def cut(call: Call, outputs: Sequence[Any]) -> Found | list[Found]:
    """Slices along one dimension, usually not that of the examples."""
    x, tag = call.tagged[0]
    dim = call.arg("dim", 0)
    if isinstance(dim, int) and x is call.first and dim % x.dim() != tag.dim:
        return tag
    return movement(call, outputs)


@family("select unbind")
def drop(call: Call, outputs: Sequence[Any]) -> Found | list[Found]:
    """The same, without the dimension."""
    x, tag = call.tagged[0]
    dim = call.arg("dim", 0)
    if isinstance(dim, int) and x is call.first and dim % x.dim() != tag.dim:
        assert tag.dim is not None
        return tag.at(tag.dim - 1) if dim % x.dim() < tag.dim else tag
    return movement(call, outputs)


@family(
    """movedim t .T .mT .H .mH adjoint tensor_split hsplit vsplit dsplit flip roll diagonal unfold
    rot90 __iter__ fliplr flipud linalg_diagonal"""
)
def movement(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """Data movement of one operand, by its shadow."""
    x = call.first
    tag = only_tag(call, x)
    assert tag.dim is not None
    index = shadow(x.shape, tag.dim, x.device)
    is_property = call.name.startswith(".")
    moved = getattr(index, call.name[1:]) if is_property else call.run({id(x): index})
    parts = moved if isinstance(moved, (list, tuple)) else (moved,)
    size = x.shape[tag.dim]
    found: list[Found] = []
    for part in parts:
        read = read_shadow(part, tag, size, call.batch_size)
        found.append(read)
    return found


@family("diag diag_embed diagflat block_diag select_scatter slice_scatter diagonal_scatter")
def among_zeros(call: Call, outputs: Sequence[Any]) -> Found:
    """Elements are put among zeros or into those of another tensor: run on the owners themselves."""
    table = {
        # zero, which torch fills in, is nobody's
        id(t): owner_of_each(t, call.tag_of(t), call.batch_size).to(torch.int64, copy=True) + 1
        for t in each_tensor(call.args, call.kwargs)
    }
    table = {i: t.to(outputs[0].device) for i, t in table.items()}
    owner = (call.run(table) - 1).to(torch.int32).cpu()
    return read_owners(owner, call.batch_size)


@family("expand expand_as broadcast_to")
def expand(call: Call, outputs: Sequence[Any]) -> Found:
    """New dimensions come in front."""
    x = call.first
    tag = call.tag_of(x)
    return None if tag is None else along_broadcast(x, tag, outputs[0].shape)


@family("index_select")
def index_select(call: Call, outputs: Sequence[Any]) -> Found:
    """Rows by number; numbers that carry examples must pick from their own, or from a constant."""
    x, index = call.arg("input"), call.arg("index")
    dim = call.arg("dim") % x.dim()
    tag, by = call.tag_of(x), call.tag_of(index)
    if tag is None:
        assert by is not None
        return by.at(dim)
    picked: Found = tag
    if tag.dim == dim:
        owner = owners(tag, x.shape[dim], call.batch_size, x.device)[index.reshape(-1)]
        picked = regular_or_explicit(owner, dim, call.batch_size, tag.step)
    if by is not None and by.at(dim) != picked:
        raise Lost("an index that carries examples picks rows of others")
    return picked


@family("masked_select")
def masked_select(call: Call, outputs: Sequence[Any]) -> Found:
    """The selected elements in a row, each still its example's."""
    x, mask = call.arg("input"), call.arg("mask")
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    tag = agree([along_broadcast(t, g, shape) for t, g in call.tagged])
    assert tag.dim is not None
    which = shadow(shape, tag.dim, x.device)[mask.expand(shape)]
    return read_shadow(which, tag, shape[tag.dim], call.batch_size)


@family("__getitem__")
def getitem(call: Call, outputs: Sequence[Any]) -> Found:
    """Indexing: the data, the index tensors, or both may carry the examples."""
    x, index = call.args
    index = _as_tensors(index)
    tag = call.tag_of(x)
    if tag is not None and len(call.tagged) == 1:
        if tag.dim is None:
            return tag
        simple = _basic(x, tag, index)
        if simple is not None:
            return simple
    return region(call, x, tag, index)


@family("index _unsafe_index")
def index(call: Call, outputs: Sequence[Any]) -> Found:
    """What indexing becomes in the core: a tensor or None for each dimension."""
    x = call.first
    parts = tuple(slice(None) if p is None else p for p in call.arg("indices"))
    return region(call, x, call.tag_of(x), parts)


def _as_tensors(index: Any) -> Any:
    """The same index with tensors for lists, ranges and arrays of numbers."""
    parts = index if isinstance(index, tuple) else (index,)
    made = tuple(
        torch.as_tensor(list(p) if isinstance(p, range) else p)
        if isinstance(p, (list, range)) or type(p).__module__ == "numpy"
        else p
        for p in parts
    )
    return made if isinstance(index, tuple) else made[0]


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
    found = [] if tag is None else [taken(call, x, tag, index)]
    by = [(i, p, call.tag_of(p)) for i, p in enumerate(parts) if isinstance(p, Tensor)]
    for i, p, own in by:
        if own is None:
            continue
        if own.dim is None:
            found.append(own)
            continue
        if p.dtype in (torch.bool, torch.uint8):
            # What is picked must depend on nothing but the example it is picked from.
            placed = own.at(own.dim + _consumed(x, parts[:i]))
            if len(by) > 1 or tag not in (None, placed):
                raise Lost("a mask that carries examples selects from data of others")
            found.append(taken(call, x, placed, index))
            continue
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
    return agree([t for t in found if t.explicit != ()] or found)


def taken(call: Call, x: Tensor, tag: Tag, index: Any) -> Tag:
    """The owners of ``x[index]``, if those of x are `tag`."""
    if tag.dim is None:
        return tag
    moved = shadow(x.shape, tag.dim, x.device)[index]
    return read_shadow(moved, tag, x.shape[tag.dim], call.batch_size)


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
def repeat_interleave(call: Call, outputs: Sequence[Any]) -> Any:
    """Each index several times in a row."""
    x = call.first
    tag, times = call.tag_of(x), call.arg("repeats")
    dim = call.arg("dim")
    if dim is None and (tag is None or tag.dim != 0 or x.dim() > 1):
        if tag is None or tag.dim != 0 or tag.explicit is not None:
            raise Lost("repeat_interleave folds examples together")
        if isinstance(times, Tensor):
            return NotImplemented
        return Tag(0, tag.step * times * (math.prod(x.shape) // x.shape[0]))
    dim = 0 if dim is None else dim % x.dim()
    if isinstance(times, Tensor):
        return _repeated_by_counts(call, x, tag, times, dim)
    if tag is None:
        raise Lost("the number of repeats carries examples")
    if dim != tag.dim:
        return tag
    if tag.explicit is not None:
        return Tag(tag.dim, 1, tuple(o for o in tag.explicit for _ in range(times)))
    return Tag(tag.dim, tag.step * times)


def _repeated_by_counts(call: Call, x: Tensor, tag: Tag | None, times: Tensor, dim: int) -> Tag:
    """Each index as often as its own example says."""
    by = call.tag_of(times)
    n, size = call.batch_size, x.shape[dim]
    counts = times.expand(size) if times.numel() == 1 else times
    if tag is not None and tag.dim != dim:
        if by is not None:
            raise Lost("how often something is repeated depends on the examples")
        return tag
    if tag is not None and by is not None and tag != by.at(dim):
        raise Lost("the number of repeats is another example's")
    own = tag if tag is not None else by
    assert own is not None
    if own.dim is None or times.numel() == 1 < size:
        raise Lost("the number of repeats is another example's")
    if tag is None and size != x.shape[dim]:
        raise Lost("rows that belong to no example are repeated")
    owner = owners(own, size, n, counts.device).repeat_interleave(counts)
    return regular_or_explicit(owner, dim, n)
