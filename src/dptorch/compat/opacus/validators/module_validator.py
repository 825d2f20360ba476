"""`ModuleValidator`: finds modules that mix examples, and replaces them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dptorch.compat.arguments import known_arguments
from dptorch.compat.opacus.validators.errors import ShouldReplaceModuleError, UnsupportedModuleError
from dptorch.errors import ConfigurationError
from dptorch.validation.conversion import groups_for, preparation, prepare

__all__ = ["ModuleValidator"]

# Opacus's number of groups (Wu and He 2018, arXiv:1803.08494), where it divides the channels.
_GROUPS = 32


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
            for change in preparation(module, num_groups=_opacus_groups).changes:
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
    def fix(
        cls,
        module: nn.Module,
        *,
        replace_bn_with_in: bool = False,
        num_groups: int | None = None,
    ) -> nn.Module:
        """Return a copy of `module` in which modules that mix examples are replaced.

        BatchNorm becomes GroupNorm of as many groups as in Opacus, so state dicts fit both ways. Its
        scale, shift and running statistics are folded in. Make the optimizer from the copy's
        parameters.

        Args:
            module: stays as it is.
            replace_bn_with_in: not offered: it would forget what BatchNorm learned.
            num_groups: number of groups; by default gcd(32, channels). A BatchNorm1d whose groups
                would then be of fewer than 16 channels gets fewer groups, with a warning: one value
                per channel normalised in groups of one is constant.

        Raises:
            ConfigurationError: something cannot be replaced.

        Guarantees:
            Default groups and explicit `num_groups` are those of Opacus, and a state dict trained
            there computes the same here: `test_fix_makes_the_groups_of_opacus`.

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
        groups = _warned_groups(module) if num_groups is None else num_groups
        return prepare(copy.deepcopy(module), num_groups=groups, report=None)

    @classmethod
    @known_arguments
    def fix_and_validate(
        cls,
        module: nn.Module,
        *,
        replace_bn_with_in: bool = False,
        num_groups: int | None = None,
    ) -> nn.Module:
        """Call `fix`, then `validate` strictly; returns the fixed copy."""
        module = cls.fix(module, replace_bn_with_in=replace_bn_with_in, num_groups=num_groups)
        cls.validate(module, strict=True)
        return module


def _opacus_groups(norm: _BatchNorm) -> int:
    """Opacus's number of groups, where each group has something to normalise."""
    groups = math.gcd(_GROUPS, norm.num_features)
    if isinstance(norm, nn.BatchNorm1d):
        # Of [N, C] inputs a group of one channel is a single number, which normalises to zero.
        return min(groups, groups_for(norm.num_features))
    return groups


def _warned_groups(model: nn.Module) -> Callable[[_BatchNorm], int]:
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d):
            ours, theirs = _opacus_groups(module), math.gcd(_GROUPS, module.num_features)
            if ours != theirs:
                warnings.warn(
                    f"'{name}' (BatchNorm1d, {module.num_features} channels) becomes GroupNorm of "
                    f"{ours} group{'s' if ours > 1 else ''}. Opacus makes {theirs}, of "
                    f"{module.num_features // theirs} channel"
                    f"{'s' if module.num_features > theirs else ''} each, which erases inputs of "
                    f"shape [N, C]. Pass num_groups={theirs} for weights that were trained there.",
                    stacklevel=4,
                )
    return _opacus_groups
