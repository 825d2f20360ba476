"""Make names of Opacus importable that have no meaning here; used, they say what to do instead."""

from __future__ import annotations

from typing import Any

from dptorch.errors import ConfigurationError

__all__ = ["NOT_BY_LAYER", "ONE_PROCESS", "stand_in"]

#: Why there are no functions for the gradients of single layers.
NOT_BY_LAYER = (
    "No per-example gradient is computed layer by layer. PrivacyEngine.make_private follows the whole "
    "model, and dptorch.record(model) gives per-example gradients for analysis."
)
#: Why models and optimizers are in one process.
ONE_PROCESS = (
    "Opacus adds noise on each process. Train in one process: give the model itself to "
    "PrivacyEngine.make_private, and use BatchMemoryManager for large batches; or on several with "
    "dptorch.PrivacyEngine, which adds up clipped sums and adds noise once: see docs/scale.md."
)


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
