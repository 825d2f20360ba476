"""What mixes examples, found and replaced."""

from dptorch.compat.opacus.validators.module_validator import ModuleValidator

__all__ = ["ModuleValidator"]
