"""Make names of other libraries importable that have no meaning here; used, they say what to do."""

from __future__ import annotations

from typing import Any

from dptorch.errors import ConfigurationError

__all__ = ["LORA", "NOT_BY_LAYER", "ONE_PROCESS", "stand_in"]

#: Why there are no functions for the gradients of single layers.
NOT_BY_LAYER = (
    "No per-example gradient is computed layer by layer. PrivacyEngine.make_private follows the whole "
    "model, and dptorch.record(model) gives per-example gradients for analysis."
)
#: Why there are no layers for LoRA.
LORA = (
    "LoRA of the peft library is followed as any other module: get_peft_model(model, LoraConfig(...)), "
    "and then the engine."
)
#: Why models and optimizers are in one process.
ONE_PROCESS = (
    "Opacus adds noise on each process. Train in one process: give the model itself to "
    "PrivacyEngine.make_private, and use BatchMemoryManager for large batches; or on several with "
    "dptorch.PrivacyEngine, which adds up clipped sums and adds noise once: see docs/scale.md."
)


def stand_in(name: str, instead: str) -> Any:
    """Return a class called `name` that raises when it is called or an attribute of it is asked for.

    Args:
        name: as in the other library.
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

    def no_attribute(cls: type, attribute: str) -> Any:
        if attribute.startswith("__"):  # which Python itself looks for
            raise AttributeError(attribute)
        raise ConfigurationError(f"{name}.{attribute} is not in dptorch. {instead}")

    kind = type("StandIn", (type,), {"__getattr__": no_attribute})
    return kind(name, (), {"__new__": refuse, "__doc__": f"Not in dptorch. {instead}"})
