"""What becomes of a loss once it is reduced over the examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dptorch.tape.provenance import Mixed, Reduced, State

__all__ = ["follow_loss"]

_LINEAR = frozenset(
    """neg positive sum mean view reshape flatten squeeze unsqueeze to float double half bfloat16
    clone contiguous add sub type type_as cuda cpu nansum stack cat __getitem__ select expand
    .data""".split()
)


def follow_loss(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    reduced: Sequence[Reduced],
    *,
    meets_examples: bool,
    is_loss: Callable[[Any], bool],
    where: Callable[[], str],
) -> State:
    """The state of a function of reduced losses: linear ones keep their meaning, others mix.

    Args:
        name, args, kwargs: of the op.
        reduced: the states of its reduced operands, at least one.
        meets_examples: whether another operand still has its examples apart.
        is_loss: whether an operand is a reduced one.
        where: names the module, for messages.
    """

    def mixed(what: str) -> Mixed:
        return Mixed(f"{where()}: '{name}' {what}")

    if meets_examples:
        return mixed("joins a value reduced over the examples with single examples.")
    weight = reduced[0].weight
    if len(reduced) > 1:
        if name not in ("add", "sub", "stack", "cat", "sum"):
            return mixed("multiplies losses that are reduced over the examples.")
        if any(r.weight != weight for r in reduced):
            return mixed("adds a sum and a mean over the examples.")
        return Reduced(weight)
    if name in _LINEAR and kwargs.get("alpha", 1) == 1:
        return Reduced(weight)
    if name in ("mul", "div") and args:
        other = next((a for a in args if not isinstance(a, Tensor)), None)
        if isinstance(other, (int, float)) and not (name == "div" and args[0] is other):
            return Reduced(weight * other if name == "mul" else weight / other)
        if name == "mul" or is_loss(args[0]):
            return Reduced(weight)
    return mixed("is not linear, and its argument is reduced over the examples.")
