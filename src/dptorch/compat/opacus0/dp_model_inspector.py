"""`DPModelInspector`: says whether a model mixes examples."""

from __future__ import annotations

from torch import nn

from dptorch.compat.arguments import known_arguments
from dptorch.compat.opacus.validators import ModuleValidator
from dptorch.compat.opacus.validators.errors import UnsupportedModuleError

__all__ = ["DPModelInspector", "IncompatibleModuleException"]


class IncompatibleModuleException(UnsupportedModuleError):
    """The model cannot be trained privately as it is."""


class DPModelInspector:
    """Finds modules that mix examples.

    Args:
        should_throw: whether `validate` raises, or returns False.

    Example:
        >>> DPModelInspector(should_throw=False).validate(nn.Sequential(nn.BatchNorm1d(8)))
        False
    """

    @known_arguments
    def __init__(self, should_throw: bool = True) -> None:
        self.should_throw = should_throw

    @known_arguments
    def validate(self, model: nn.Module) -> bool:
        """Whether `model` can be trained privately.

        Raises:
            IncompatibleModuleException: it cannot, and `should_throw` is set.
        """
        errors = ModuleValidator.validate(model)
        if errors and self.should_throw:
            found = "\n".join(str(error).split(". ")[0] + "." for error in errors)
            raise IncompatibleModuleException(
                f"{found}\nmodule_modification.convert_batchnorm_modules(model) replaces them."
            )
        return not errors
