"""Make names of Opacus importable that have no meaning here; used, they say what to do instead."""

from __future__ import annotations

from typing import Any

from dptorch.errors import ConfigurationError

__all__ = ["stand_in"]


def stand_in(name: str, instead: str) -> Any:
    """Return a class called `name` that raises when it is called, or made an object of.

    Args:
        name: as in Opacus.
        instead: why it is not here, and what to call.

    Example:
        >>> try:
        ...     stand_in("DPDDP", "Train in one process.")(model=None)
        ... except ValueError as error:
        ...     print(error)
        DPDDP is not in dptorch. Train in one process.
    """

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise ConfigurationError(f"{name} is not in dptorch. {instead}")

    return type(name, (), {"__new__": refuse, "__doc__": f"Not in dptorch. {instead}"})
