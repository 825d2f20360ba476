"""`GradSampleModule`: a private model under the names that code written for Opacus expects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dptorch.compat.arguments import known_arguments
from dptorch.compat.opacus.scheduled_run import run_of
from dptorch.errors import ConfigurationError, PrivacyError

__all__ = ["GradSampleModule"]

_PREFIX = "_module."


class GradSampleModule(nn.Module):
    """Passes everything on to the model inside, `_module`; names in its state have that prefix.

    It is a name and nothing more: per-example gradients belong to the engine on the model inside.
    ``PrivacyEngine.make_private`` returns one. One that was made by hand is not private by itself.

    Args:
        m: the model.
        batch_first, loss_reduction: must be as they are: give others to ``make_private``.
        strict: accepted: ``make_private`` always validates the model.
        force_functorch: accepted: it is a matter of speed there.

    Raises:
        ConfigurationError: an argument that only ``make_private`` can honour.

    Example:
        >>> model = GradSampleModule(nn.Linear(2, 1))
        >>> list(model.state_dict()), model.in_features
        (['_module.weight', '_module.bias'], 2)
    """

    @known_arguments
    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
    ) -> None:
        super().__init__()
        if not batch_first or loss_reduction != "mean":
            raise ConfigurationError(
                f"GradSampleModule(batch_first={batch_first!r}, loss_reduction={loss_reduction!r}) "
                "does not change how gradients are taken. Give both arguments to "
                "PrivacyEngine.make_private, with the model itself."
            )
        self._module = m

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
        """Call `remove_hooks`; returns the model inside."""
        self.remove_hooks()
        return self._module

    def remove_hooks(self) -> None:
        """End the private training of the model, which is then an ordinary one again.

        What was spent stays counted. The optimizer that was made private with it refuses further
        steps: call ``make_private`` again, or make a new optimizer for training without privacy.
        """
        run = run_of(self._module)
        if run is not None:
            run.end()

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
            "per-example gradients are not kept on parameters. They are exact functions of private "
            "data. For analysis use dptorch.record(model)."
        )
