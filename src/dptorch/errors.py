"""What can go wrong, by kind. Every message states the value, what was expected and the way out."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from types import FrameType
from typing import Final

__all__ = [
    "BudgetExhausted",
    "ConfigurationError",
    "DataError",
    "ExamplesMixError",
    "LedgerError",
    "NotCoveredError",
    "PrivacyError",
    "PrivacyWarning",
    "one_of",
    "warn",
]

# Packages whose frames lie between a user's line and a warning about it.
_NOT_THE_CALLER: Final = ("dptorch", "torch", "contextlib", "functools")


class PrivacyError(RuntimeError):
    """The guarantee could not be given, so nothing was released."""


class NotCoveredError(PrivacyError):
    """A trainable parameter is used in a way whose per-example gradient the tape cannot follow."""


class ExamplesMixError(PrivacyError):
    """One example's loss or gradient depends on another example (BatchNorm, in-batch negatives...)."""


class BudgetExhausted(PrivacyError):
    """The next step would spend more than the plan allows; it was not taken."""


class LedgerError(PrivacyError):
    """The ledger cannot be read or written, so the step it should have counted was not taken."""


class ConfigurationError(ValueError):
    """An argument has a value that no run can honour."""


class DataError(ValueError):
    """A data file cannot be read; the message names the file and, where there is one, the row."""


class PrivacyWarning(UserWarning):
    """The run goes on, but its guarantee means less than the reader might think."""


def one_of(name: str, value: object, valid: Iterable[str]) -> str:
    """Return `value` if it is one of the `valid` names; otherwise raise with the nearest one.

    Raises:
        ConfigurationError: naming the value, all valid names and the nearest.

    Example:
        >>> one_of("clipping_fn", "abadi", ["abadi", "automatic"])
        'abadi'
        >>> try:
        ...     one_of("style", "flatt", ["flat", "layer"])
        ... except ConfigurationError as error:
        ...     print(error)
        style='flatt' is not known. Valid: 'flat', 'layer'. Did you mean 'flat'?
    """
    names = list(valid)
    if isinstance(value, str) and value in names:
        return value
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(repr(n) for n in names)
    raise ConfigurationError(f"{name}={value!r} is not known. Valid: {listed}.{hint}")


def warn(message: str) -> None:
    """Give a `PrivacyWarning` at the caller's line: that of the first frame outside dptorch, and
    outside torch, whose calls and hooks lead to many warnings.

    Guarantees:
        The warning names the user's file and line, however deep inside dptorch it is given
        (`tests/test_errors.py`).
        Held by `test_a_warning_points_at_the_users_line`.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warn("the run goes on")
        >>> str(caught[0].message), caught[0].category.__name__
        ('the run goes on', 'PrivacyWarning')
    """
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and _package_of(frame) in _NOT_THE_CALLER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, PrivacyWarning, stacklevel=level)


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
