"""The table of op families, and how it is asked.

There is no default: an op that is not in the table loses its examples, and a result that has lost
them may not meet a parameter or a loss. `rowwise` adds an op of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from dptorch.tape.provenance.calls import Call, words
from dptorch.tape.provenance.tags import Lost, Reduced, Tag, complete

__all__ = ["FAMILIES", "Family", "Found", "agree", "family", "infer", "named_dims", "rowwise"]

# What is known of an output: a tag, a reduction over the examples, or None for a constant.
Found = Tag | Reduced | None
Family = Callable[[Call, Sequence[Any]], "Found | list[Found]"]
F = TypeVar("F", bound=Family)

FAMILIES: dict[str, Family] = {}

# Joins and look-ups, whose operands may each be one whole example; and ops that look at more than
# the values of their operands.
_SEVERAL_EXAMPLES = words("""stack cat column_stack hstack vstack batch_norm""")


def family(names: str) -> Callable[[F], F]:
    """Register a function under one or more op names, separated by spaces."""

    def add(function: F) -> F:
        for name in names.split():
            FAMILIES[name] = function
        return function

    return add


def infer(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """The tag (or reduction) of each output.

    Raises:
        Lost: if the examples meet, or the op has no rule.
    """
    tagged = call.tagged
    for _, tag in tagged:
        if tag.dim is None and (call.batch_size == 1 or call.name not in _SEVERAL_EXAMPLES):
            if call.name == "batch_norm":
                FAMILIES["batch_norm"](call, outputs)
            if any(other is not tag and other != tag for _, other in tagged):
                raise Lost("different examples meet")
            return [tag] * len(outputs)
    found = FAMILIES.get(call.name)
    if found is None:
        raise Lost(
            "the op has no provenance rule; declare it with dptorch.tape.rowwise if it is one"
        )
    result = found(call, outputs)
    if type(result) is Tag:
        return [result] * len(outputs)
    results = result if isinstance(result, list) else [result] * len(outputs)
    if any(isinstance(r, Reduced) for r in results) and not all(complete(t) for _, t in tagged):
        raise Lost("rows that belong to no example are summed with the examples")
    return results


def rowwise(name: str) -> None:
    """Declare that the op called `name` treats the rows of dimension 0 independently.

    Use it for a custom op whose result keeps the batch in dimension 0 and whose row i depends on
    row i of its operands alone. This is a promise: a wrong one voids the privacy guarantee.

    Example:
        >>> rowwise("my_fused_op")
    """
    FAMILIES[name] = _declared


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
    if not tags or tags.count(tags[0]) < len(tags):
        raise Lost("operands carry the examples in different places")
    return tags[0]


def named_dims(call: Call, x: Tensor, position: int, default: Any = None) -> list[int]:
    """The dimensions an op reduces or scans, non-negative; all of them when none is named."""
    dim = call.kwargs.get("dim", call.kwargs.get("axis"))
    if dim is None and len(call.args) > position:
        candidate = call.args[position]
        if isinstance(candidate, (tuple, list)) or type(candidate) is int:
            dim = candidate
    if dim is None:
        dim = default
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return list(range(x.dim()))
    return [d % max(x.dim(), 1) for d in ((dim,) if isinstance(dim, int) else dim)]
