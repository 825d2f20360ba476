"""Matrix products and einsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dptorch.tape.propagation.elementwise import along_broadcast, elementwise, refuse_positions
from dptorch.tape.propagation.table import Found, agree, family
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Lost, Reduced, Tag

__all__ = ["einsum_operands", "expand_einsum"]


# Products with something that is added to them, in their first operand.
_ADDED = ("baddbmm", "addmm", "addmv", "addbmm", "addr", "_addmm_activation")


@family(
    """matmul mm bmm mv __rmatmul__ baddbmm addmm addmv addbmm _addmm_activation linear cdist
    _cdist_forward _sparse_mm dot vdot"""
)
def product(call: Call, outputs: Sequence[Any]) -> Found:
    """Matrix products: free dimensions keep the examples, the contracted one may not hold them, unless
    the product is one number: a weighted sum over the examples."""
    out, name = outputs[0], call.name
    operands = call.operands()
    found = []
    added: Tensor | None = None
    if name == "__rmatmul__":
        operands.reverse()
    elif name in _ADDED:
        added, operands = operands[0], operands[1:]
        tag = call.tag_of(added)
        if tag is not None:
            found.append(along_broadcast(added, tag, out.shape))
    elif name == "linear":
        if any(call.tag_of(t) is not None for t in operands[1:]):
            raise Lost("the weight of a linear layer carries examples")
        operands = operands[:2]  # the weight may be a vector
    a, b = operands[0], operands[1] if len(operands) > 1 else None
    if out.dim() == 0 and a.dim() == 1 and b is not None:
        agreed = elementwise(call, [a])
        assert isinstance(agreed, Tag)
        return Reduced("sum")
    tag = call.tag_of(a)
    if tag is not None:
        assert tag.dim is not None
        if tag.dim == a.dim() - 1 or (name == "addbmm" and tag.dim == 0):
            raise Lost("the product contracts the examples")
        vector = b is not None and b.dim() == 1
        # Counted from the last dimension, as leading ones
        # broadcast. A vector on the right takes one away.
        found.append(tag.at(tag.dim - a.dim() + out.dim() + vector))
    tag = call.tag_of(b)
    if b is not None and tag is not None:
        assert tag.dim is not None
        distances = name in ("cdist", "_cdist_forward")
        # Of the points [.., R, D] of `cdist` the last dimension
        # is contracted, of a matrix [.., K, N] the first.
        contracted = b.dim() - (1 if distances else 2)
        if b.dim() == 1 or tag.dim == contracted or (name == "addbmm" and tag.dim == 0):
            raise Lost("the product contracts the examples")
        # A vector on the left takes the row dimension away: what stands before it moves back by one.
        dim = tag.dim - b.dim() + out.dim() + (1 if a.dim() == 1 and tag.dim < contracted else 0)
        if distances and tag.dim == b.dim() - 2:
            dim = out.dim() - 1
        found.append(tag.at(dim))
    agreed = agree(found)
    # One matrix meets all rows alike. A stack of them has one for each
    # place, and which example stands there depends on the others.
    if agreed.explicit is not None and any(
        call.tag_of(t) is None and isinstance(t, Tensor) and t.dim() > 2 for t in operands
    ):
        raise Lost("a constant with one matrix for each meets irregularly ordered examples")
    if agreed.explicit is not None and added is not None and call.tag_of(added) is None:
        refuse_positions(call, agreed, out.shape, [added])
    return agreed


@family("outer ger addr")
def outer(call: Call, outputs: Sequence[Any]) -> Found:
    """Outer products of two vectors: each keeps its own dimension."""
    *added, a, b = call.operands()
    found = [along_broadcast(t, g, outputs[0].shape) for t in added if (g := call.tag_of(t))]
    found += [tag.at(i) for i, t in enumerate((a, b)) if (tag := call.tag_of(t)) is not None]
    return agree(found)


@family("einsum")
def einsum(call: Call, outputs: Sequence[Any]) -> Found:
    """The examples follow their letter."""
    equation, operands = einsum_operands(call)
    left, right = expand_einsum(equation, operands)
    found = []
    for letters, t in zip(left, operands, strict=True):
        tag = call.tag_of(t)
        if tag is not None:
            assert tag.dim is not None
            letter = letters[tag.dim]
            if letter not in right:
                raise Lost("einsum sums over the examples")
            found.append(tag.at(right.index(letter)))
    # Two letters would pair every example with every other.
    agreed = agree(found)
    assert agreed.dim is not None
    if agreed.explicit is not None and any(
        call.tag_of(t) is None and right[agreed.dim] in letters
        for letters, t in zip(left, operands, strict=True)
    ):
        raise Lost("a constant with one row for each meets irregularly ordered examples")
    return agreed


def einsum_operands(call: Call) -> tuple[str, list[Tensor]]:
    """The equation and the operands of an einsum call in either of its spellings."""
    equation = call.first
    if not isinstance(equation, str):
        raise Lost("einsum with sublists")
    rest = call.args[1:]
    if len(rest) == 1 and isinstance(rest[0], (list, tuple)):
        rest = tuple(rest[0])
    return equation.replace(" ", ""), list(rest)


def expand_einsum(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str]:
    """Index letters of each operand and of the result, ellipses replaced by capital letters.

    Example:
        >>> import torch
        >>> expand_einsum("...d,pd->...p", [torch.zeros(2, 3, 4), torch.zeros(5, 4)])
        (['ABd', 'pd'], 'ABp')
    """
    lhs, arrow, rhs = equation.partition("->")
    terms = lhs.split(",")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    longest = max(
        (t.dim() - len(s) + 3 for s, t in zip(terms, operands, strict=True) if "..." in s),
        default=0,
    )
    ellipsis = "".join(free[:longest])
    left = []
    for s, t in zip(terms, operands, strict=True):
        own = t.dim() - len(s) + 3
        left.append(s.replace("...", ellipsis[longest - own :]) if "..." in s else s)
    if not arrow:
        counted = "".join(terms).replace(".", "")
        rhs = ("..." if "..." in lhs else "") + "".join(
            sorted(c for c in set(counted) if counted.count(c) == 1)
        )
    return left, rhs.replace("...", ellipsis)
