"""Whose the values of a batch are that the engine's loader hands out, in whatever form it comes.

One example that was collated alone shows the form: where it has one row and the batch has as many as
examples are the rows of the batch, be it along a dimension of a tensor or in a list of rows. What holds
rows and cannot be followed is said.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dptorch.errors import ConfigurationError, warn
from dptorch.tape.provenance.tags import Order, Tag, regular_or_explicit
from dptorch.tape.recording.batch_dims import BatchDims, Ragged, argument_names, packed_owners
from dptorch.tape.recording.batches import Batch
from dptorch.tape.recording.outputs import (
    DEEPEST,
    RecordedTensor,
    attributes,
    beside,
    follow,
    refuse_mixed,
)
from dptorch.tape.recording.tensor_states import GUESSED, batch_of

__all__ = ["taint"]

_NUMBERS = (bool, int, float, complex, np.number, np.bool_)
_ENDS = (Tensor, PackedSequence, str, bytes, type(None), *_NUMBERS)
_FLAT = {bool, int, float, str, type(None)}
_ARRAYS = "arrays of NumPy"
_PYTHON_NUMBERS = "numbers of Python"
_NO_ROWS = "tensors that no dimension of is known to hold the rows"
_OBJECTS_OF_ROWS = "rows in lists of objects"
_NOTHING = "nothing that is looked into"


class _Leaf(NamedTuple):
    """A value in a batch.

    Attributes:
        one: what an example that is collated alone has there; None where that is not known.
        owner: whose it is, where all of it is one example's.
        name: its key, attribute or the argument of the model at its place; "" for none.
        is_free: whether another object may take its place.
    """

    value: Any
    one: Any
    owner: int | None = None
    name: str = ""
    is_free: bool = True


def taint(
    value: Any,
    batch: Batch,
    model: nn.Module,
    alone: Sequence[Any] = (),
    batch_dims: BatchDims = 0,
) -> tuple[Any, frozenset[str]]:
    """Say which rows of `batch` the tensors in `value` hold, and warn where they cannot be followed.

    Tensors stay the objects that they are, but for those of a list of rows, which may be the data
    set's own: aliases take their places.

    Args:
        model: names modules in messages, and the values of a tuple by its arguments.
        alone: examples, each collated without others.
        batch_dims: as the model's inputs hold the examples.

    Returns:
        The batch, and what cannot be followed, in words.

    Guarantees:
        Wherever plain tensors are, they are followed, or somebody is told that they are not.
        Held by ``test_rows_are_followed_in_each_form_or_the_statement_says_so``.
    """
    recording, rows = beside(batch, model), batch.size
    root = _Leaf(value, alone[0] if alone else None)
    whose = _Whose(root, rows, model, batch_dims)
    unknown: dict[str, bool] = {}  # what, and whether it is warned of
    found = False

    def mark(t: Tensor, tag: Tag | Order, kind: str = "loader") -> Tensor:
        nonlocal found
        found = True
        if type(t) is RecordedTensor and batch_of(t) is not batch:
            refuse_mixed(t)
        recording.mark(t, tag)
        setattr(t, GUESSED, kind)
        follow(t, recording)
        return t

    def visit(leaf: _Leaf) -> Any:
        v = leaf.value
        if isinstance(v, PackedSequence):
            if (tag := whose.tag_of_packed(leaf)) is None:
                unknown[f"objects of class {type(v).__name__}"] = True
                return v
            mark(v.data, tag)
            for order in (v.sorted_indices, v.unsorted_indices):
                if order is not None:
                    mark(order, Order())
        elif isinstance(v, Tensor):
            tag = whose.tag(leaf)
            if tag is None:
                if rows > 1 and (v.is_nested or v.numel()):
                    unknown.setdefault(_NO_ROWS, False)
            elif type(v) not in (Tensor, RecordedTensor):
                unknown[f"tensors of class {type(v).__name__}"] = True
            elif leaf.owner is None:
                mark(v, tag)
            elif not leaf.is_free or v.requires_grad:
                unknown[_OBJECTS_OF_ROWS] = True
            else:
                with torch._C.DisableTorchFunction():
                    v = v.detach()
                mark(v, tag, "row")
        elif isinstance(v, np.ndarray):
            if v.dtype.kind in "biufcV" and (leaf.owner is not None or (v.ndim and len(v) == rows)):
                unknown[_ARRAYS] = unknown.get(_ARRAYS, False) or v.dtype.kind in "fc"
        elif isinstance(v, _NUMBERS):
            if leaf.owner is not None:
                loud = isinstance(v, (float, complex, np.inexact))
                unknown[_PYTHON_NUMBERS] = unknown.get(_PYTHON_NUMBERS, False) or loud
        elif not isinstance(v, (*_ENDS, type)) and (
            callable(v) or any(hasattr(v, n) for n in ("__next__", "__len__", "__array__"))
        ):
            unknown.setdefault(f"objects of class {type(v).__name__}", False)
        return v

    made = _walk(visit, root, rows)
    if rows > 1:
        loud = [what for what, is_loud in unknown.items() if is_loud]
        if not found and not loud:
            loud = [*unknown] or [_NOTHING]
        if loud:
            _warn_of_rows(", ".join(sorted(loud)))
            unknown.update(dict.fromkeys(loud, True))
    return made, frozenset(unknown)


class _Whose:
    """Whose the rows of the tensors of a batch are, by what is in it beside them."""

    def __init__(self, root: _Leaf, rows: int, model: nn.Module, batch_dims: BatchDims) -> None:
        self._rows = rows
        self._dims = batch_dims
        self._named: dict[str, Tensor] = {}
        self._vectors: list[Tensor] = []  # that may say whose the rows of others are
        named = {} if isinstance(batch_dims, int) else batch_dims
        self._ragged = {n: d for n, d in named.items() if isinstance(d, Ragged)}
        self._places: dict[int, str] = {}
        if not self._ragged:
            return
        if isinstance(root.value, (tuple, list)) and not hasattr(root.value, "_fields"):
            names = argument_names(model, len(root.value))
            self._places = {id(v): n for v, n in zip(root.value, names, strict=True)}

        def note(leaf: _Leaf) -> Any:
            if isinstance(leaf.value, Tensor):
                self._named[self._name(leaf)] = leaf.value
                if leaf.value.dim() == 1 and not leaf.value.dtype.is_floating_point:
                    self._vectors.append(leaf.value)
            return leaf.value

        _walk(note, root._replace(is_free=False), rows)

    def _name(self, leaf: _Leaf) -> str:
        return leaf.name or self._places.get(id(leaf.value), "")

    def tag(self, leaf: _Leaf) -> Tag | None:
        """Whose the rows of a tensor are; None where nothing says it."""
        t, one, rows = leaf.value, leaf.one, self._rows
        if leaf.owner is not None:
            return Tag(None, leaf.owner)
        if t.is_nested:
            return None
        dim = self._dims if isinstance(self._dims, int) else self._dims.get(self._name(leaf), 0)
        declared = dim % t.dim() if isinstance(dim, int) and t.dim() else 0
        fits = [d for d in range(t.dim()) if t.shape[d] == rows]
        sure = []
        if isinstance(one, Tensor) and one.dim() == t.dim():
            sure = [d for d in fits if one.shape[d] == 1]
        if not sure and self._ragged and (found := self._of_ragged(leaf)) is not None:
            return found
        fits = sure or [d for d in fits if d in (0, declared)]
        if not fits:
            return None
        return Tag(declared if declared in fits else fits[0]) if rows > 1 else Tag(None, 0)

    def tag_of_packed(self, leaf: _Leaf) -> Tag | None:
        """Whose the rows of a packed sequence are; None if it has not one sequence for each example."""
        owner, count = packed_owners(leaf.value)
        if leaf.owner is not None or count != self._rows:
            return None
        return regular_or_explicit(owner, 0, count) if count > 1 else Tag(None, 0)

    def _of_ragged(self, leaf: _Leaf) -> Tag | None:
        name = self._name(leaf)
        if name in self._ragged:
            found = self._by(self._ragged[name], name, leaf.value, self._named)
            if found is not None:
                return found
        tags = set()
        for how in self._ragged.values():
            for said in self._vectors:
                if how.how == "owners" and bool((said[1:] < said[:-1]).any()):
                    continue  # classes, say
                tags.add(
                    self._by(replace(how, by="said", examples=None), "", leaf.value, {"said": said})
                )
        tags.discard(None)
        return tags.pop() if len(tags) == 1 else None

    def _by(self, how: Ragged, name: str, t: Tensor, given: Mapping[str, Any]) -> Tag | None:
        """The tag by what the batch holds, if it fits."""
        rows = self._rows
        try:
            with torch._C.DisableTorchFunctionSubclass():
                owner, count = how.owners(name, t, given)
                fits = count <= rows if how.how == "owners" else count == rows
                if not fits or not len(owner):
                    return None
                return (
                    regular_or_explicit(owner, how.dim % t.dim(), rows)
                    if rows > 1
                    else Tag(None, 0)
                )
        except (ConfigurationError, LookupError, RuntimeError, TypeError):
            return None


def _walk(visit: Callable[[_Leaf], Any], root: _Leaf, rows: int) -> Any:
    """Call `visit` with each leaf of a batch; returns the batch with what it returned in their places.

    Looks into tuples, lists, sets, mappings, arrays of objects, buffers and attributes.
    """
    above: set[int] = set()

    def into(leaf: _Leaf, depth: int) -> Any:
        value = leaf.value
        children = _children(value, depth)
        if children is None:
            return visit(leaf)
        if id(value) in above:
            return value
        ones = _children(leaf.one, 0) or {}
        apart = leaf.owner is None and _are_rows_apart(value, leaf.one, rows)
        if children and all(type(v) in _FLAT for v in children.values()):  # a long list, for one
            children = dict([next(iter(children.items()))])
        is_free = leaf.is_free and _is_rebuilt(value)
        if leaf.owner is None and not isinstance(value, (*_SEQUENCES, nn.Module)):
            is_free = True  # the collate function made it
        deeper = depth + (not isinstance(value, (Mapping, *_SEQUENCES)))
        new = {}
        above.add(id(value))
        for key, v in children.items():
            one = ones.get(0 if apart else key)
            owner = int(key) if apart else leaf.owner
            made = into(_Leaf(v, one, owner, key if isinstance(key, str) else "", is_free), deeper)
            if made is not v:
                new[key] = made
        above.discard(id(value))
        return _rebuilt(value, new) if new else value

    return into(root, 0)


_SEQUENCES = (tuple, list, deque, set, frozenset, np.ndarray)


def _children(value: Any, depth: int) -> dict[Any, Any] | None:
    """What is in a value, by key, name or place; None for one that is not looked into."""
    if isinstance(value, _ENDS) or (isinstance(value, np.ndarray) and value.dtype != object):
        return None
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, np.ndarray):
        return dict(enumerate(value.flat))
    if isinstance(value, _SEQUENCES):
        return dict(enumerate(value))
    if isinstance(value, nn.Module):
        return dict(value.named_buffers())
    return (attributes(value) or None) if depth < DEEPEST else None


def _are_rows_apart(value: Any, one: Any, rows: int) -> bool:
    """Whether a sequence has one value for each row of the batch."""
    kinds = (tuple, list, deque, np.ndarray)
    if not isinstance(value, kinds) or hasattr(value, "_fields") or len(value) != rows:
        return False
    if isinstance(one, kinds):
        return len(one) == 1
    held = [v for v in value if isinstance(v, Tensor)]
    return bool(held) and not any(v.dim() and v.shape[0] == rows for v in held)


def _is_rebuilt(value: Any) -> bool:
    return type(value) in (tuple, list, dict, deque) or (
        isinstance(value, tuple) and hasattr(value, "_fields")
    )


def _rebuilt(value: Any, new: Mapping[Any, Any]) -> Any:
    """A copy of a container with other values at some places; an object with others is that object."""
    if type(value) is dict:
        return {**value, **new}
    if hasattr(value, "_fields"):
        return value._replace(**new)
    if isinstance(value, (tuple, list, deque)):
        return type(value)(new.get(i, v) for i, v in enumerate(value))
    for key, v in new.items():
        if isinstance(value, Mapping):
            value[key] = v  # type: ignore[index]
        else:
            object.__setattr__(value, key, v)
    return value


@lru_cache(maxsize=64)
def _warn_of_rows(what: str) -> None:
    """Warn, once of each kind."""
    warn(
        f"the batches of engine.loader hold {what}: what is computed from their rows beside the model "
        "is not followed, so that a statistic of the batch would enter a loss unseen. Let the collate "
        "function return plain tensors (t.as_subclass(torch.Tensor)) in tuples, lists, dicts or "
        "objects with attributes."
    )
