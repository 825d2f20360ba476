"""The table of rules: how an op that takes a trainable parameter is recorded.

A rule is a function ``rule(call, recording) -> result``. It runs the op with the parameter detached
and hands the output to ``recording.tap`` together with a function that turns the output's gradient
into per-example gradients (`dptorch.tape.gradients`). A rule that does not apply to a call returns
NotImplemented, and the generic rule takes it. It takes all calls with complex parameters too: no rule
conjugates the other factor.

To add one: write the function in the file of its op family and decorate it with ``@rule("name")``,
the name being the op's `canonical_name`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from dptorch.tape.provenance.calls import Call
    from dptorch.tape.rules.recorder import Recorder

__all__ = ["RULES", "Rule", "detached", "rule"]

Rule = Callable[["Call", "Recorder"], Any]

RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule under one or more op names, separated by spaces."""

    def add(function: Rule) -> Rule:
        for name in names.split():
            RULES[name] = function
        return function

    return add


def detached(t: Any) -> Any:
    """The parameter without its autograd history; anything else as it is."""
    return t.detach() if isinstance(t, Tensor) else t
