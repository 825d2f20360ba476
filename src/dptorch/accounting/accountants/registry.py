"""Accountants by name."""

from __future__ import annotations

from collections.abc import Callable

from dptorch.accounting.accountants.protocol import Accountant
from dptorch.errors import one_of

__all__ = ["accountant_names", "get_accountant"]


def _exact() -> Accountant:
    from dptorch.accounting.accountants.exact import ExactAccountant

    return ExactAccountant()


def _pld() -> Accountant:
    from dptorch.accounting.accountants.pld import PLDAccountant

    return PLDAccountant()


def _rdp() -> Accountant:
    from dptorch.accounting.accountants.rdp import RDPAccountant

    return RDPAccountant()


def _prv() -> Accountant:
    from dptorch.accounting.accountants.prv import PRVAccountant

    return PRVAccountant()


def _gdp() -> Accountant:
    from dptorch.accounting.accountants.gdp import GDPAccountant

    return GDPAccountant()


_MAKERS: dict[str, Callable[[], Accountant]] = {
    "exact": _exact,
    "pld": _pld,
    "rdp": _rdp,
    "prv": _prv,
    "gdp": _gdp,
}
_ALIASES = {"glw": "prv"}


def accountant_names() -> list[str]:
    """Return the names of the accountants, without aliases.

    Example:
        >>> accountant_names()
        ['exact', 'pld', 'rdp', 'prv', 'gdp']
    """
    return list(_MAKERS)


def get_accountant(name: str) -> Accountant:
    """Return the accountant called `name`; "glw" (Gopi, Lee, Wutschitz) is another name of "prv".

    Raises:
        dptorch.errors.ConfigurationError: no accountant has that name; all names are listed.

    Example:
        >>> get_accountant("glw").name
        'prv'
    """
    one_of("accountant", name, [*_MAKERS, *_ALIASES])
    return _MAKERS[_ALIASES.get(name, name)]()
