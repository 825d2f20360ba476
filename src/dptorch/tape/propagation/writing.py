"""Writing by index: ``x[index] = value``, where any of the three may carry examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dptorch.tape.propagation.joining import refuse_rows_by_place, territory
from dptorch.tape.propagation.movement import region, taken
from dptorch.tape.propagation.table import Found, family
from dptorch.tape.provenance.aliases import owner_of_each
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Lost, Tag, read_owners

__all__ = ["owners_after"]


@family("index_put _index_put_impl _unsafe_index_put")
def index_put(call: Call, outputs: Sequence[Any]) -> Found:
    """Assignment by index as a function."""
    indices = call.arg("indices")
    parts = tuple(slice(None) if p is None else p for p in indices)
    return owners_after(call, call.first, parts, call.arg("values"))


def owners_after(call: Call, x: Tensor, index: Any, value: Any) -> Tag | None:
    """The tag of `x` once ``x[index] = value`` was run.

    Raises:
        Lost: if one example is written over another, or decides where another is written.
    """
    before, tag = call.tag_of(x), call.tag_of(value)
    parts = index if isinstance(index, tuple) else (index,)
    by = [p for p in parts if isinstance(p, Tensor) and call.tag_of(p) is not None]
    if before is not None and before.dim is None:
        if any(t != before for t in (tag, *map(call.tag_of, by)) if t is not None):
            raise Lost("examples are written over other examples")
        return before
    if before is not None:
        if by:
            region(call, x, before, index)  # raises where an index reaches other examples
        if tag is None:
            return before
        placed = tag if tag.dim is None else tag.at(tag.dim - value.dim() + x[index].dim())
        if taken(call, x, before, index) == placed:
            return before
        if by:
            raise Lost("examples are written over other examples")
        # Rows that belonged to nobody yet may be taken.
    if by:
        return _by_index(call, x, index, value, before)
    assert tag is not None
    if call.batch_size == 1:
        return tag
    owner = owner_of_each(x, before, call.batch_size).clone()
    target = owner[index]
    new = owner_of_each(value, tag, call.batch_size).expand(target.shape)
    if bool(((target != new) & (target >= 0)).any()):
        raise Lost("examples are written over other examples")
    owner[index] = new
    if not torch.equal(owner[index], new):
        raise Lost("several examples are written to one place")
    return read_owners(owner, call.batch_size)


def _by_index(call: Call, x: Tensor, index: Any, value: Any, before: Tag | None) -> Tag | None:
    """A constant is written to at places that depend on the examples (a one-hot, a mask)."""
    parts = list(index) if isinstance(index, tuple) else [index]
    tensors = [p for p in parts if isinstance(p, Tensor)]
    new = call.tag_of(value)
    if (
        len(tensors) == 1
        and tensors[0].dtype in (torch.bool, torch.uint8)
        and parts[0] is tensors[0]
    ):
        tag = call.tag_of(tensors[0])
        assert tag is not None
        if new is not None:
            placed = new if new.dim is None else new.at(new.dim - value.dim() + x[index].dim())
            if taken(call, x, tag, index) != placed:
                raise Lost("examples are written over other examples")
        if before is not None and before != tag:
            raise Lost("an index that carries examples")
        return tag
    if before is None and len(tensors) == 1:
        found = _in_territory(call, x, index, value, new)
        if found is not None or new is not None:
            return found
    if before is not None or new is not None:
        raise Lost("an index that carries examples")
    if len(tensors) != len(parts) or any(p.dtype == torch.bool for p in tensors):
        raise Lost("an index that carries examples beside slices")
    shape = torch.broadcast_shapes(*[p.shape for p in tensors])
    owner = owner_of_each(x, None, call.batch_size).clone()
    who = torch.full(shape, -1, dtype=torch.int32)
    for p in tensors:
        tag = call.tag_of(p)
        if tag is not None:
            own = owner_of_each(p, tag, call.batch_size).expand(shape)
            if bool(((who >= 0) & (who != own)).any()):
                raise Lost("indices of different examples meet")
            who = own
    if who.numel() > 1 << 14:
        raise Lost("an index that carries examples is too long; use torch.nn.functional.one_hot")
    for place in torch.cartesian_prod(*[torch.arange(n) for n in shape]).reshape(-1, len(shape)):
        at = tuple(place.tolist())
        # Whatever the index might have been, that part of x depends on its example.
        reach = tuple(
            slice(None) if call.tag_of(p) is not None else int(p.expand(shape)[at]) for p in tensors
        )
        reached = owner[reach]
        if bool(((reached >= 0) & (reached != who[at])).any()):
            raise Lost("indices of different examples reach one row")
        owner[reach] = who[at]
    return read_owners(owner, call.batch_size)


def _in_territory(call: Call, x: Tensor, index: Any, value: Any, new: Tag | None) -> Tag | None:
    """Rows of a constant are written to at places that examples choose, each to rows of its own.

    Returns:
        None if the index or the rows are not such; a constant may still be written there.

    Raises:
        Lost: if values of examples are.
    """
    parts = index if isinstance(index, tuple) else (index,)
    at, p = next((i, p) for i, p in enumerate(parts) if isinstance(p, Tensor))
    own = call.tag_of(p)
    assert own is not None
    if p.dim() > 1 or any(type(q) is not slice for q in (*parts[:at], *parts[at + 1 :])):
        return None
    if new is not None:
        placed = new if new.dim is None else new.at(new.dim - value.dim() + x[index].dim())
        if placed != own.at(at):
            raise Lost("rows are moved by an index of another example")
    elif isinstance(value, Tensor) and value.dim():
        refuse_rows_by_place(own, value.expand(x[index].shape), at)
    writers = owner_of_each(p, own, call.batch_size).reshape(-1).to(p.device)
    try:
        return territory(p.reshape(-1), writers, x.shape[at], call.batch_size).at(at)
    except Lost:
        if new is not None:
            raise
        return None
