"""What is wrong with a module."""

from __future__ import annotations

from dptorch.errors import ConfigurationError

__all__ = ["ShouldReplaceModuleError", "UnsupportedModuleError"]


class UnsupportedModuleError(ConfigurationError):
    """A module mixes examples, or cannot be followed."""


class ShouldReplaceModuleError(UnsupportedModuleError):
    """A module mixes examples, and ``ModuleValidator.fix`` replaces it."""
