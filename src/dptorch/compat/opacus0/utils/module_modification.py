"""`convert_batchnorm_modules` of ``opacus.utils.module_modification``."""

from __future__ import annotations

from torch import nn

from dptorch.compat.arguments import known_arguments
from dptorch.validation.conversion import prepare

__all__ = ["convert_batchnorm_modules"]


@known_arguments
def convert_batchnorm_modules(model: nn.Module) -> nn.Module:
    """Every BatchNorm inside becomes GroupNorm, in place, scale and shift kept: `dptorch.prepare`.

    Example:
        >>> type(convert_batchnorm_modules(nn.Sequential(nn.BatchNorm1d(16)))[0]).__name__
        'GroupNorm'
    """
    return prepare(model, report=None)
