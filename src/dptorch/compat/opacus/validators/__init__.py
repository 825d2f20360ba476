"""Names of ``opacus.validators``."""

from dptorch.compat.opacus.validators.module_validator import ModuleValidator

__all__ = ["ModuleValidator"]
