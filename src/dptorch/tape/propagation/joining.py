"""Concatenation, stacking, gathers and scatters: several operands, one result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dptorch.tape.propagation.elementwise import along_broadcast
from dptorch.tape.propagation.table import Found, agree, family
from dptorch.tape.provenance.aliases import owner_of_each
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.layouts import guesses
from dptorch.tape.provenance.tags import (
    NOBODY,
    Lost,
    Tag,
    owners,
    read_owners,
    regular_or_explicit,
)

__all__ = ["refuse_rows_by_place", "territory"]


@family("cat")
def cat(call: Call, outputs: Sequence[Any]) -> Found:
    """Concatenation, along the examples or across them."""
    parts = [t for t in call.arg("tensors") if t.numel() or t.dim() > 1]
    dim = int(call.arg("dim", 0)) % outputs[0].dim()
    tags = [call.tag_of(t) for t in parts]
    known = [g for g in tags if g is not None]
    # Constant rows may join what needs no gradient: a batch that is put together, and not a loss.
    constants = not any(t.requires_grad for t in parts)
    if all(constants if g is None else g.dim in (dim, None) for g in tags):
        device = outputs[0].device
        owner = torch.cat(
            [
                owners(g, t.shape[dim], call.batch_size, device)
                if g is not None and g.dim is not None
                else torch.full((t.shape[dim],), NOBODY if g is None else g.step, device=device)
                for t, g in zip(parts, tags, strict=True)
            ]
        )
        return regular_or_explicit(owner, dim, call.batch_size, known[0].step)
    if any(g.dim is None or g.dim == dim for g in known):
        raise Lost("rows that belong to no example join the batch")
    if known[0].explicit is not None and len(known) < len(parts):
        raise Lost("a constant with one row for each meets irregularly ordered examples")
    return agree(known)


@family("stack")
def stack(call: Call, outputs: Sequence[Any]) -> Found:
    """Stacking makes a new dimension."""
    parts = list(call.arg("tensors"))
    dim = int(call.arg("dim", 0)) % outputs[0].dim()
    tags = [call.tag_of(t) for t in parts]
    known = [g for g in tags if g is not None]
    if all(g is not None and g.dim is None for g in tags):
        owner = torch.tensor([g.step for g in known], device=outputs[0].device)
        return regular_or_explicit(owner, dim, call.batch_size)
    tag = agree(known)
    if tag.explicit is not None and len(known) < len(parts):
        raise Lost("a constant with one row for each meets irregularly ordered examples")
    if tag.dim is None:
        raise Lost("rows that belong to no example join the batch")
    return tag.at(tag.dim + (dim <= tag.dim))


@family("pad_sequence")
def pad_sequence(call: Call, outputs: Sequence[Any]) -> Found:
    """Sequences of one example each, one beside the other; what pads a sequence is its own."""
    tags = [call.tag_of(t) for t in call.arg("sequences")]
    if any(g is None or g.dim is not None for g in tags):
        raise Lost("sequences of one example each are expected")
    owner = torch.tensor([g.step for g in tags if g is not None], device=outputs[0].device)
    return regular_or_explicit(owner, 0 if call.arg("batch_first", False) else 1, call.batch_size)


@family("gather take_along_dim")
def gather(call: Call, outputs: Sequence[Any]) -> Found:
    """Look-ups along a dimension; along that of the examples each row is looked up for its own."""
    dim = call.arg("dim")
    if dim is None:
        raise Lost("indices into the flattened batch")
    x, index = call.arg("input"), call.arg("index", call.arg("indices"))
    dim %= x.dim()
    tag, by = call.tag_of(x), call.tag_of(index)
    if tag is None:
        assert by is not None
        return by  # looking up in constants
    if tag.dim is None:
        return agree([tag] if by is None else [tag, by])
    if tag.dim == dim:
        if index.numel() and int(index.max()) >= x.shape[dim]:
            raise Lost("an index is out of range")
        owner = owners(tag, x.shape[dim], call.batch_size, x.device)[index.long()].to(torch.int32)
        return _moved(owner.cpu(), index, by, call.batch_size)
    if index.shape[tag.dim] != x.shape[tag.dim]:
        raise Lost("only some of the examples are looked up")
    if by is None and tag.explicit is not None:
        raise Lost("a constant with one row for each meets irregularly ordered examples")
    return tag if by is None else agree([tag, by])


@family("take")
def take(call: Call, outputs: Sequence[Any]) -> Found:
    """Numbers of elements of a constant."""
    if call.tag_of(call.first) is not None:
        raise Lost("it looks up in the flattened batch")
    return call.tag_of(call.arg("index"))


def _moved(owner: Tensor, index: Tensor, by: Tag | None, batch_size: int) -> Tag | None:
    """The tag of elements with these owners, which `index` chose.

    Raises:
        Lost: if one example's index chose from another.
    """
    if by is not None and not torch.equal(owner, owner_of_each(index, by, batch_size)):
        raise Lost("an index that carries examples picks rows of others")
    return read_owners(owner, batch_size) if owner.numel() else by


@family("scatter scatter_add scatter_reduce")
def scatter(call: Call, outputs: Sequence[Any]) -> Found:
    """Scatters along a dimension; along that of the examples each row goes to its own."""
    x, index = call.first, call.arg("index")
    dim = call.arg("dim") % x.dim()
    tags = [tag for _, tag in call.tagged]
    if any(g.dim in (dim, None) for g in tags):
        return _scatter_along(call, x, dim, index)
    if any(t.shape[g.dim] != outputs[0].shape[g.dim] for t, g in call.tagged if g.dim is not None):
        raise Lost("only some of the examples are written to")
    # Fewer than index, source and what is written to: one of them is a constant.
    if tags[0].explicit is not None and len(tags) < 3:
        raise Lost("a constant with one row for each meets irregularly ordered examples")
    return agree(tags)


def _scatter_along(call: Call, x: Tensor, dim: int, index: Tensor) -> Tag | None:
    """Elements go to rows that were nobody's or their own example's."""
    n = call.batch_size
    source = call.arg("src")
    by = call.tag_of(index)
    writers = owner_of_each(index, by, n)
    if isinstance(source, Tensor):
        of = owner_of_each(source, call.tag_of(source), n)
        of = of[tuple(slice(0, k) for k in index.shape)]
        if bool(((writers >= 0) & (of >= 0) & (writers != of)).any()):
            raise Lost("rows are moved by an index of another example")
        writers = torch.maximum(writers, of)
        if by is not None and by.dim is not None and call.tag_of(source) is None:
            refuse_rows_by_place(by, source, by.dim)
    if by is not None and call.tag_of(x) is None:
        return territory(index, writers.to(index.device), x.shape[dim], n).at(dim)
    before = owner_of_each(x, call.tag_of(x), n).clone()
    where = index.cpu()
    # The smallest and the largest writer of a place are one where no two examples write to it.
    first = before.scatter_reduce(dim, where, writers, "amin", include_self=False)
    last = before.scatter_reduce(dim, where, writers, "amax", include_self=False)
    constant = last == NOBODY
    kept = constant | (before == last) | (before == NOBODY)
    last = torch.where(constant, before, last)
    if not torch.equal(first, torch.where(constant, first, last)) or not bool(kept.all()):
        raise Lost("rows are written to another example")
    return read_owners(last, n)


def refuse_rows_by_place(by: Tag | None, value: Tensor, dim: int) -> None:
    """Raise if a constant has other rows for irregularly ordered examples, one after the other."""
    if by is not None and by.explicit and not bool((value == value.narrow(dim, 0, 1)).all()):
        raise Lost("a constant with one row for each meets irregularly ordered examples")


def territory(index: Tensor, writers: Tensor, size: int, batch_size: int) -> Tag:
    """The tag of a constant with `size` rows that examples wrote to at places of their own choice.

    The rows must be laid out in a way that gives every written row to its writer; rows that were left
    out are then said to be those examples' too, which could have written there.

    Raises:
        Lost: if there is no such layout (places are classes, say: examples of one class would meet).
    """
    for tag in guesses(size, batch_size):
        owner = owners(tag, size, batch_size, index.device)
        if torch.equal(owner[index.long()], writers.to(owner.dtype)):
            return tag
    raise Lost("examples write to rows that are not their own")


@family("index_add index_copy index_fill index_reduce")
def by_index(call: Call, outputs: Sequence[Any]) -> Found:
    """Writes at indices along one dimension, which may hold the examples if each stays its own."""
    x, index = call.first, call.arg("index")
    dim = call.arg("dim") % x.dim()
    value = call.arg("value" if call.name == "index_fill" else "source")
    into, by, of = call.tag_of(x), call.tag_of(index), call.tag_of(value)
    if call.name == "index_fill" and of is not None:
        raise Lost("the value that is filled in carries examples")
    if into is not None and into.dim is None:
        return agree([g for g in (into, by, of) if g is not None])
    across = [g for g in (into, of) if g is not None and g.dim not in (dim, None)]
    if across:
        if by is not None or (into is not None and of is not None and into != of):
            raise Lost("an index moves rows between examples")
        return across[0]
    # Each written row has an owner; a row that nobody owns yet may be taken by anyone.
    device, index = x.device, index.reshape(-1)
    count = len(index)
    writers = [
        torch.full((count,), g.step, dtype=torch.int64, device=device)
        if g.dim is None
        else owners(g, count, call.batch_size, device)
        for g in (by, of)
        if g is not None
    ]
    if not writers:
        return into
    if any(not torch.equal(w, writers[0]) for w in writers):
        raise Lost("rows are moved by an index of another example")
    if of is None and isinstance(value, Tensor) and value.dim():
        refuse_rows_by_place(by, value, dim)
    if into is None and by is not None:
        return territory(index, writers[0], x.shape[dim], call.batch_size).at(dim)
    if into is None:
        owner = torch.full((x.shape[dim],), NOBODY, dtype=torch.int64, device=device)
    else:
        owner = owners(into, x.shape[dim], call.batch_size, device).clone()
    # Of several writers of a row the last one stays, so the others read a name that is not theirs.
    before = owner[index]
    owner[index] = writers[0]
    if not bool(((before == writers[0]) | (before == NOBODY)).all()) or not torch.equal(
        owner[index], writers[0]
    ):
        raise Lost("rows are written to another example")
    return regular_or_explicit(owner, dim, call.batch_size)


@family("masked_scatter")
def masked_scatter(call: Call, outputs: Sequence[Any]) -> Found:
    """Elements in a row are put where a mask is true."""
    x, mask, source = call.arg("input"), call.arg("mask"), call.arg("source")
    tag, by, of = call.tag_of(x), call.tag_of(mask), call.tag_of(source)
    if by is not None and of is None:
        raise Lost("which element of a constant an example gets depends on the examples before it")
    shape, n = outputs[0].shape, call.batch_size
    if by is not None:
        by = by if by.dim is None else along_broadcast(mask, by, shape)
        if tag not in (None, by):
            raise Lost("a mask that carries examples writes to others")
    known = by if tag is None else tag
    if of is not None:
        if known is None:
            raise Lost("examples are written into constants")
        # The n-th true place takes the n-th element of the source: both have to be the same example's.
        target = owner_of_each(outputs[0], known, n)[mask.cpu().expand(shape)]
        if not torch.equal(owner_of_each(source, of, n).reshape(-1)[: len(target)], target):
            raise Lost("examples are written over other examples")
    return known
