"""Names of ``opacus.accountants``."""

from dptorch.compat.opacus.accountants import registry
from dptorch.compat.opacus.accountants.accountant import (
    GaussianAccountant,
    IAccountant,
    PRVAccountant,
    RDPAccountant,
)
from dptorch.compat.opacus.accountants.registry import create_accountant, register_accountant

__all__ = [
    "GaussianAccountant",
    "IAccountant",
    "PRVAccountant",
    "RDPAccountant",
    "create_accountant",
    "register_accountant",
    "registry",
]
