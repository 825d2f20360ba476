"""Accountants by name."""

from __future__ import annotations

from dptorch.compat.opacus.accountants.accountant import (
    GaussianAccountant,
    IAccountant,
    PRVAccountant,
    RDPAccountant,
)
from dptorch.errors import ConfigurationError, one_of

__all__ = ["create_accountant", "register_accountant"]

_ACCOUNTANTS: dict[str, type[IAccountant]] = {
    kind.mechanism(): kind for kind in (PRVAccountant, RDPAccountant, GaussianAccountant)
}


def create_accountant(mechanism: str) -> IAccountant:
    """Return an accountant by its name: "prv", "rdp", "gdp", or one that was registered."""
    return _ACCOUNTANTS[one_of("accountant", mechanism, _ACCOUNTANTS)]()


def register_accountant(mechanism: str, accountant: type[IAccountant], force: bool = False) -> None:
    """Make `accountant` known to `create_accountant` and ``PrivacyEngine(accountant=)``.

    Args:
        mechanism: the name.
        accountant: a subclass of `IAccountant`.
        force: replace one that has this name.

    Raises:
        ConfigurationError: the name is taken, or the class is no subclass.
    """
    if mechanism in _ACCOUNTANTS and not force:
        raise ConfigurationError(
            f"an accountant called {mechanism!r} is registered already. Use another name, or "
            "force=True."
        )
    if not (isinstance(accountant, type) and issubclass(accountant, IAccountant)):
        raise ConfigurationError(
            f"accountant={accountant!r} must be a subclass of "
            "dptorch.compat.opacus.accountants.IAccountant."
        )
    _ACCOUNTANTS[mechanism] = accountant
