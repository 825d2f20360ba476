"""Matrix products and einsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dptorch.tape.propagation.elementwise import along_broadcast
from dptorch.tape.propagation.table import Found, agree, family
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Lost

__all__ = ["einsum_operands", "expand_einsum"]


@family("matmul mm bmm mv __rmatmul__ baddbmm addmm linear cdist")
def product(call: Call, outputs: Sequence[Any]) -> Found:
    """Matrix products: free dimensions keep the examples, the contracted one may not hold them."""
    out, name = outputs[0], call.name
    operands = list(call.args)
    found = []
    if name == "__rmatmul__":
        operands = [operands[1], operands[0]]
    elif name in ("baddbmm", "addmm"):
        added, operands = operands[0], operands[1:]
        tag = call.tag_of(added)
        if tag is not None:
            found.append(along_broadcast(added, tag, out.shape))
    elif name == "linear":
        bias = call.arg(2, "bias")
        if call.tag_of(bias) is not None or call.tag_of(call.arg(1, "weight")) is not None:
            raise Lost("the weight of a linear layer carries examples")
        operands = [call.arg(0, "input")]
    a = operands[0]
    b = operands[1] if len(operands) > 1 else call.kwargs.get("other", call.kwargs.get("mat2"))
    tag = call.tag_of(a)
    if tag is not None:
        assert tag.dim is not None
        if tag.dim == a.dim() - 1:
            raise Lost("the product contracts the examples")
        vector = b is not None and b.dim() == 1
        found.append(tag.at(tag.dim - a.dim() + out.dim() + (1 if vector else 0)))
    tag = call.tag_of(b)
    if b is not None and tag is not None:
        assert tag.dim is not None
        contracted = b.dim() - (1 if name == "cdist" else 2)
        if b.dim() == 1 or tag.dim == contracted:
            raise Lost("the product contracts the examples")
        dim = tag.dim - b.dim() + out.dim() + (1 if a.dim() == 1 and tag.dim < contracted else 0)
        if name == "cdist" and tag.dim == b.dim() - 2:
            dim = out.dim() - 1
        found.append(tag.at(dim))
    agreed = agree(found)
    if agreed.explicit is not None and any(
        call.tag_of(t) is None and isinstance(t, Tensor) and t.dim() > 2 for t in operands
    ):
        raise Lost("a constant with one matrix for each meets irregularly ordered examples")
    return agreed


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
    equation = call.args[0]
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
