"""Errors of `ModuleValidator`, by Opacus's names."""

from __future__ import annotations

from dptorch.errors import ConfigurationError

__all__ = [
    "IllegalModuleConfigurationError",
    "NotYetSupportedModuleError",
    "ShouldReplaceModuleError",
    "UnsupportableModuleError",
    "UnsupportedModuleError",
]


class UnsupportedModuleError(ConfigurationError):
    """A module mixes examples, or cannot be followed."""


class ShouldReplaceModuleError(UnsupportedModuleError):
    """A module mixes examples, and ``ModuleValidator.fix`` replaces it."""


class UnsupportableModuleError(UnsupportedModuleError):
    """A module that no replacement can make private. Never raised here; it exists to be caught."""


class NotYetSupportedModuleError(UnsupportedModuleError):
    """A module without a rule. Never raised here: every module is followed, or refused in use."""


class IllegalModuleConfigurationError(UnsupportedModuleError):
    """A module in a mode that training forbids. Never raised here: eval mode is followed too."""
