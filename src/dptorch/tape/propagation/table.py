"""The table of op families, and how it is asked.

There is no default. `inference` opens an op that is not in the table into the core operators that it
is made of; one of them that is not in the table either loses the examples, and a result that has lost
them may not meet a parameter or a loss. `rowwise` adds an op of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Lost, Reduced, Tag

__all__ = [
    "FAMILIES",
    "Family",
    "Found",
    "agree",
    "family",
    "find",
    "named_dims",
    "only_tag",
    "rowwise",
]

# What is known of an output: a tag, a reduction over the examples, or None for a constant.
Found = Tag | Reduced | None
Family = Callable[[Call, Sequence[Any]], "Found | list[Found]"]
F = TypeVar("F", bound=Family)

FAMILIES: dict[str, Family] = {}


def family(names: str) -> Callable[[F], F]:
    """Register a function under one or more op names, separated by spaces."""

    def add(function: F) -> F:
        for name in names.split():
            FAMILIES[name] = function
        return function

    return add


def find(name: str) -> Family | None:
    """The family of an op, by its `canonical_name` or the name of a core operator; None if unknown.

    What torch tags as pointwise is elementwise, and ``slice_copy`` moves data as ``slice`` does.
    """
    found = FAMILIES.get(name)
    if found is not None or name in _NO_FAMILY:
        return found
    if name.endswith("_copy"):
        found = FAMILIES.get(name.removesuffix("_copy"))
    elif _is_pointwise(name):
        found = FAMILIES["add"]
    if found is None:
        _NO_FAMILY.add(name)
    else:
        FAMILIES[name] = found
    return found


_NO_FAMILY: set[str] = set()


def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if packet is None:
        return False
    overloads = [getattr(packet, o) for o in packet.overloads()]
    # Overloads of numbers alone belong to torch.jit, those with out= to kernels; both carry no tags.
    of_tensors = [
        o
        for o in overloads
        if any(str(a.type) == "Tensor" for a in o._schema.arguments)
        and not any(a.is_out for a in o._schema.arguments)
    ]
    return bool(of_tensors) and all(torch.Tag.pointwise in o.tags for o in of_tensors)


def rowwise(name: str) -> None:
    """Declare that the op called `name` treats the rows of dimension 0 independently.

    Use it for a custom op whose result keeps the batch in dimension 0 and whose row i depends on
    row i of its operands alone. This is a promise: a wrong one voids the privacy guarantee.

    Example:
        >>> rowwise("my_fused_op")
    """
    FAMILIES[name] = _declared
    _NO_FAMILY.discard(name)


def _declared(call: Call, outputs: Sequence[Any]) -> Found:
    for _, tag in call.tagged:
        if tag.dim != 0:
            raise Lost("the op takes its rows from dimension 0, where the examples are not")
    return agree([tag for _, tag in call.tagged])


def agree(tags: Sequence[Tag]) -> Tag:
    """The tag that all operands have.

    Raises:
        Lost: if they differ.
    """
    # Equal, not merely compatible: where two differ, some row of the result would hold two examples.
    if not tags or tags.count(tags[0]) < len(tags):
        raise Lost("operands carry the examples in different places")
    return tags[0]


def named_dims(call: Call, x: Tensor, default: Any = None) -> list[int]:
    """The dimensions an op reduces or scans, non-negative; all of them when none is named."""
    dim = call.arg("dim")
    dim = default if dim is None else dim
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return list(range(x.dim()))
    return [d % max(x.dim(), 1) for d in ((dim,) if isinstance(dim, int) else dim)]


def only_tag(call: Call, x: Any) -> Tag:
    """The tag of `x`, which is to be the only operand that carries examples, spread along a dimension.

    Raises:
        Lost: if another operand carries them.
    """
    tag = call.tag_of(x)
    if tag is None or tag.dim is None or any(t is not x for t, _ in call.tagged):
        raise Lost("an operand other than the first carries examples")
    return tag
