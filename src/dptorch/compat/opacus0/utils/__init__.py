"""Names of ``opacus.utils`` of Opacus 0.x."""

from dptorch.compat.opacus0.utils import module_modification

__all__ = ["module_modification"]
