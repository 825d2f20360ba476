"""Refuse unknown arguments, and name the nearest known one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from dptorch.errors import one_of
from dptorch.plan import PlanSettings

__all__ = ["OPEN_END", "known_arguments"]

#: Steps of a run whose length was not said; the budget of what was never limited.
OPEN_END = 10**9

# The settings of a plan that an adapter leaves to its user. The others it derives from arguments of its
# own, which its signature names.
_DERIVED: Final = (
    "steps",
    "sample_rate",
    "accountant",
    "clipping_fn",
    "clipping_style",
    "adaptive_clipping",
)
_SETTINGS: Final = [name for name in PlanSettings.__annotations__ if name not in _DERIVED]

P = ParamSpec("P")
R = TypeVar("R")


def known_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate `function` to name the nearest valid argument where an unknown one is given.

    A function that takes ``**settings`` takes those of `dptorch.plan.PlanSettings`.

    Raises:
        ConfigurationError: on calls with an unknown keyword.

    Example:
        >>> @known_arguments
        ... def train(*, max_grad_norm): ...
        >>> try:
        ...     train(max_gradnorm=1.0)
        ... except ValueError as error:
        ...     print(error)
        argument of train='max_gradnorm' is not known. Valid: 'max_grad_norm'. \
Did you mean 'max_grad_norm'?
    """
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind in kinds and p.name not in ("self", "cls")]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names += _SETTINGS

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            one_of(f"argument of {function.__qualname__}", name, names)
        return function(*args, **kwargs)

    return call
