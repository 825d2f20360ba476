"""`ModuleValidator`: what mixes examples, found and replaced."""

from __future__ import annotations

import copy

from torch import nn

from dptorch.compat.arguments import known_arguments
from dptorch.compat.opacus.validators.errors import ShouldReplaceModuleError, UnsupportedModuleError
from dptorch.errors import ConfigurationError
from dptorch.validation.conversion import preparation, prepare

__all__ = ["ModuleValidator"]


class ModuleValidator:
    """`dptorch.prepare`, under the names of Opacus.

    Recurrent layers and attention are valid as they are. What no table can know, a forward that mixes
    examples in a way of its own, the engine looks for in the first batch, and `dptorch.check` names.
    """

    @classmethod
    @known_arguments
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[UnsupportedModuleError]:
        """What is wrong with the modules inside; with `strict` raised instead.

        Raises:
            UnsupportedModuleError: with `strict`, if anything is.

        Example:
            >>> len(ModuleValidator.validate(nn.Sequential(nn.BatchNorm1d(8))))
            1
        """
        errors: list[UnsupportedModuleError] = []
        try:
            for change in preparation(module).changes:
                errors.append(
                    ShouldReplaceModuleError(
                        f"{change.before} at '{change.module}' mixes the examples of a batch. "
                        f"ModuleValidator.fix(model) replaces it by {change.after} ({change.detail})."
                    )
                )
        except ConfigurationError as error:
            errors.append(UnsupportedModuleError(str(error)))
        if strict and errors:
            raise UnsupportedModuleError("\n".join(str(error) for error in errors))
        return errors

    @classmethod
    def is_valid(cls, module: nn.Module) -> bool:
        """Whether `validate` finds nothing."""
        return not cls.validate(module)

    @classmethod
    @known_arguments
    def fix(cls, module: nn.Module, *, replace_bn_with_in: bool = False) -> nn.Module:
        """A copy of `module` in which what mixes examples is replaced; scales and shifts are kept.

        Make the optimizer from the copy's parameters.

        Args:
            module: stays as it is.
            replace_bn_with_in: not offered: it would forget what BatchNorm learned.

        Raises:
            ConfigurationError: something cannot be replaced.

        Example:
            >>> ModuleValidator.is_valid(ModuleValidator.fix(nn.Sequential(nn.BatchNorm1d(8))))
            True
        """
        if replace_bn_with_in:
            raise ConfigurationError(
                "replace_bn_with_in=True: InstanceNorm has no place for the scale and shift that "
                "BatchNorm learned. Leave it out (GroupNorm), or use "
                "dptorch.prepare(model, batchnorm='frozen')."
            )
        return prepare(copy.deepcopy(module), report=None)

    @classmethod
    def fix_and_validate(cls, module: nn.Module) -> nn.Module:
        """`fix`, then `validate` strictly."""
        module = cls.fix(module)
        cls.validate(module, strict=True)
        return module
