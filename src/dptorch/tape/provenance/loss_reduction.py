"""What becomes of a loss once it is reduced over the examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dptorch.tape.provenance.calls import words
from dptorch.tape.provenance.public_number import PublicNumber
from dptorch.tape.provenance.tags import Mixed, Reduced, State, Tag

__all__ = ["follow_loss", "plus_constant"]

_LINEAR = words(
    """neg positive sum mean view reshape flatten squeeze unsqueeze to float double half bfloat16
    clone contiguous add sub type type_as cuda cpu nansum stack cat __getitem__ select expand
    .data"""
)


def follow_loss(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    reduced: Sequence[Reduced],
    *,
    examples: Sequence[tuple[Tensor, Tag]],
    is_loss: Callable[[Any], bool],
    where: Callable[[], str],
) -> State:
    """The state of a function of reduced losses: linear ones keep their meaning, others mix.

    Args:
        name, args, kwargs: of the op.
        reduced: the states of its reduced operands, at least one.
        examples: other operands, whose examples are still apart.
        is_loss: whether an operand is a reduced one.
        where: names the module, for messages.
    """

    def mixed(what: str) -> Mixed:
        return Mixed(f"{where()}: '{name}' {what}")

    first = reduced[0]
    if examples:
        # ``sum(losses)`` of a list goes on: each is the loss of one example.
        more = all(t.numel() == 1 and t.requires_grad and s.dim is None for t, s in examples)
        plain = name == "add" and kwargs.get("alpha", 1) == 1
        if more and plain and len(reduced) == 1 and first.kind == "sum":
            return first
        return mixed("joins a value reduced over the examples with single examples.")
    if len(reduced) > 1:
        if name not in ("add", "sub", "stack", "cat", "sum"):
            return mixed("multiplies losses that are reduced over the examples.")
        if any(r.kind != first.kind for r in reduced):
            return mixed("adds a sum and a mean over the examples.")
        alpha = float(kwargs.get("alpha", 1))
        terms = [r if i == 0 else r.times(alpha) for i, r in enumerate(reduced)]
        return Reduced(first.kind, tuple(f for r in terms for f in r.factors))
    if name in _LINEAR and kwargs.get("alpha", 1) == 1:
        return first
    if name in ("mul", "div") and len(args) > 1 and (name == "mul" or is_loss(args[0])):
        other = args[1] if is_loss(args[0]) else args[0]
        factor = _number(other)
        if factor is None:
            return mixed("multiplies the loss by a tensor of several numbers.")
        return first.times(factor if name == "mul" else 1 / factor if factor else math.inf)
    return mixed("is not linear, and its argument is reduced over the examples.")


def plus_constant(operands: Sequence[tuple[Tensor, State | None]], mixed: Mixed) -> Mixed | Reduced:
    """The state of a sum of a reduced loss and a mixed value: a value without a gradient changes the
    loss and leaves its gradient."""
    if any(t.requires_grad for t, state in operands if isinstance(state, Mixed)):
        return mixed
    return next((s for t, s in operands if isinstance(s, Reduced) and t.requires_grad), mixed)


def _number(value: Any) -> float | None:
    """The value of a number or of a tensor that holds one, 1 if it is said to be public; else None."""
    if isinstance(value, PublicNumber):
        return 1.0
    if isinstance(value, Tensor):
        return float(value.detach()) if value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) else None
