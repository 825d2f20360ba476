"""Concatenation, stacking, gathers and scatters: several operands, one result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dptorch.tape.propagation.elementwise import along_broadcast
from dptorch.tape.propagation.table import Found, agree, family
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import NOBODY, Lost, Tag, owners, regular_or_explicit

__all__: list[str] = []


@family("cat")
def cat(call: Call, outputs: Sequence[Any]) -> Found:
    """Concatenation, along the examples or across them."""
    parts = [t for t in call.arg(0, "tensors") if t.numel() or t.dim() > 1]
    dim = int(call.arg(1, "dim", call.kwargs.get("axis", 0))) % outputs[0].dim()
    tags = [call.tag_of(t) for t in parts]
    known = [g for g in tags if g is not None]
    if all(g is not None and g.dim in (dim, None) for g in tags):
        device = outputs[0].device
        owner = torch.cat(
            [
                owners(g, t.shape[dim], call.batch_size, device)
                if g.dim is not None
                else torch.full((t.shape[dim],), g.step, device=device)
                for t, g in zip(parts, tags, strict=True)
                if g is not None
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
    parts = list(call.arg(0, "tensors"))
    dim = int(call.arg(1, "dim", 0)) % outputs[0].dim()
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


@family("gather take_along_dim")
def gather(call: Call, outputs: Sequence[Any]) -> Found:
    """Look-ups along a dimension that does not hold the examples."""
    position, word = (2, "indices") if call.name == "take_along_dim" else (1, "index")
    dim = call.arg(position, "dim")
    if dim is None:
        raise Lost("indices into the flattened batch")
    x, index = call.arg(0, "input"), call.arg(3 - position, word)
    dim %= x.dim()
    tag, by = call.tag_of(x), call.tag_of(index)
    if tag is None:
        assert by is not None
        return by  # looking up in constants
    if tag.dim == dim:
        raise Lost("rows move between examples")
    assert tag.dim is not None
    if index.shape[tag.dim] != x.shape[tag.dim]:
        raise Lost("only some of the examples are looked up")
    if by is None and tag.explicit is not None:
        raise Lost("a constant with one row for each meets irregularly ordered examples")
    return tag if by is None else agree([tag, by])


@family("scatter scatter_add scatter_reduce")
def scatter(call: Call, outputs: Sequence[Any]) -> Found:
    """Scatters along a dimension that does not hold the examples."""
    x = call.arg(0, "input")
    dim = call.arg(1, "dim") % x.dim()
    tags = [tag for _, tag in call.tagged]
    if any(g.dim == dim for g in tags):
        raise Lost("rows move between examples")
    if any(t.shape[g.dim] != outputs[0].shape[g.dim] for t, g in call.tagged if g.dim is not None):
        raise Lost("only some of the examples are written to")
    return agree(tags)


@family("index_add index_copy index_fill")
def by_index(call: Call, outputs: Sequence[Any]) -> Found:
    """Writes at indices along one dimension, which may hold the examples if each stays its own."""
    x, index = call.arg(0, "input"), call.arg(2, "index")
    dim = call.arg(1, "dim") % x.dim()
    value = call.arg(3, "value" if call.name == "index_fill" else "source")
    into, by, of = call.tag_of(x), call.tag_of(index), call.tag_of(value)
    if call.name == "index_fill" and of is not None:
        raise Lost("the value that is filled in carries examples")
    across = [g for g in (into, of) if g is not None and g.dim != dim]
    if across:
        if by is not None or (into is not None and of is not None and into != of):
            raise Lost("an index moves rows between examples")
        return across[0]
    # Each written row has an owner; a row that nobody owns yet may be taken by anyone.
    device = x.device
    count = index.shape[0]
    writers = [owners(g.at(0), count, call.batch_size, device) for g in (by, of) if g is not None]
    if not writers:
        return into
    if any(not torch.equal(w, writers[0]) for w in writers):
        raise Lost("rows are moved by an index of another example")
    if into is None:
        owner = torch.full((x.shape[dim],), NOBODY, dtype=torch.int64, device=device)
    else:
        owner = owners(into, x.shape[dim], call.batch_size, device).clone()
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
    x, mask, source = call.arg(0, "input"), call.arg(1, "mask"), call.arg(2, "source")
    tag, by, of = call.tag_of(x), call.tag_of(mask), call.tag_of(source)
    known = tag if tag is not None else by
    if of is not None and known is not None and known.dim is not None:
        shape = outputs[0].shape
        index = owners(known, shape[known.dim], call.batch_size, x.device)
        view = index.view([-1 if i == known.dim else 1 for i in range(len(shape))])
        target = view.expand(shape)[mask.expand(shape)]
        if of.dim is None:
            raise Lost("one example is written over others")
        full = owners(of, source.shape[of.dim], call.batch_size, x.device)
        full = full.view([-1 if i == of.dim else 1 for i in range(source.dim())])
        if not torch.equal(full.expand(source.shape).reshape(-1)[: target.numel()], target):
            raise Lost("examples are written over other examples")
    elif of is not None:
        raise Lost("examples are written into constants")
    if by is not None and tag is not None and along_broadcast(mask, by, x.shape) != tag:
        raise Lost("a mask that carries examples writes to others")
    assert isinstance(known, Tag)
    return known
