"""Functions of ``opacus.grad_sample.utils``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from dptorch.compat.opacus.grad_sample.grad_sample_module import GradSampleModule
from dptorch.errors import ConfigurationError, one_of, warn

__all__ = [
    "MODES",
    "NO_MODES",
    "get_gsm_class",
    "register_grad_sampler",
    "register_norm_sampler",
    "wrap_model",
]

F = TypeVar("F", bound=Callable[..., Any])

#: Opacus's modes that give the same gradients, and how they are computed here.
MODES = {"hooks": "auto", "ew": "auto", "functorch": "auto", "ghost": "ghost"}
#: Those that are not here, and why.
NO_MODES = {
    "no_op": "gradients that the user computes cannot be vouched for",
    "ghost_fsdp": "for divided models there is dptorch.PrivacyEngine (docs/scale.md)",
    "ghost_tp": "for divided models there is dptorch.PrivacyEngine (docs/scale.md)",
}


def get_gsm_class(grad_sample_mode: str) -> type[GradSampleModule]:
    """Return `GradSampleModule`, for every mode that gives the same gradients.

    Raises:
        ConfigurationError: another mode.
    """
    if grad_sample_mode in NO_MODES:
        raise ConfigurationError(
            f"grad_sample_mode={grad_sample_mode!r}: {NO_MODES[grad_sample_mode]}. Use 'hooks'."
        )
    one_of("grad_sample_mode", grad_sample_mode, MODES)
    return GradSampleModule


def wrap_model(model: nn.Module, grad_sample_mode: str, **kwargs: Any) -> GradSampleModule:
    """Return the model as a `GradSampleModule`, which is not private by itself."""
    return get_gsm_class(grad_sample_mode)(model, **kwargs)


def register_grad_sampler(
    target_class_or_classes: type[nn.Module] | Sequence[type[nn.Module]],
) -> Callable[[F], F]:
    """Return a decorator that leaves its function as it is, and warns that it is not used.

    Layers of your own are followed op by op, and their per-example gradients are exact without it.
    """
    classes = target_class_or_classes
    names = ", ".join(c.__name__ for c in ([classes] if isinstance(classes, type) else classes))

    def leave(f: F) -> F:
        warn(
            f"the sampler that is registered for {names} is not used: layers are followed op by op, "
            "and need no gradient of their own. Leave it out."
        )
        return f

    return leave


register_norm_sampler = register_grad_sampler
