"""`GradSampleModule`: the model under the names that code written for Opacus expects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dptorch.errors import PrivacyError

__all__ = ["GradSampleModule"]

_PREFIX = "_module."


class GradSampleModule(nn.Module):
    """Passes everything on to the model inside, `_module`; names in its state have that prefix.

    It is a name and nothing more: per-example gradients belong to the engine on the model inside.

    Args:
        module: the model.

    Example:
        >>> model = GradSampleModule(nn.Linear(2, 1))
        >>> list(model.state_dict()), model.in_features
        (['_module.weight', '_module.bias'], 2)
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_module":
                raise
            return getattr(self._module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self._module(*args, **kwargs)

    def to_standard_module(self) -> nn.Module:
        """The model inside."""
        return self._module

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of `torch.nn.Module`; names may have the prefix or not."""
        plain = {n.removeprefix(_PREFIX): value for n, value in state_dict.items()}
        return self._module.load_state_dict(plain, strict=strict, assign=assign)

    @property
    def grad_sample(self) -> Any:
        """Refused.

        Raises:
            PrivacyError: always.
        """
        raise PrivacyError(
            "per-example gradients are not kept on parameters: they are exact functions of private "
            "data. For analysis use dptorch.record(model)."
        )
