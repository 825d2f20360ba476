"""Check numbers that a user gave. Each function returns its value, or raises with what was expected."""

from __future__ import annotations

import math
import operator

from dptorch.errors import ConfigurationError

__all__ = ["noise_of", "number", "positive", "positive_int", "rate_of"]


def positive_int(name: str, value: object, *, least: int = 1) -> int:
    """Return `value` as an int of at least `least`.

    Raises:
        ConfigurationError: it is a bool, not a whole number, or too small.

    Example:
        >>> positive_int("steps", 3)
        3
        >>> positive_int("steps", 2.5)
        Traceback (most recent call last):
        ...
        dptorch.errors.ConfigurationError: steps=2.5 must be a whole number, at least 1 (an int).
    """
    problem = f"{name}={value!r} must be a whole number, at least {least} (an int)."
    if isinstance(value, bool):
        raise ConfigurationError(problem)
    try:
        found = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigurationError(problem) from None
    if found < least:
        raise ConfigurationError(problem)
    return found


def noise_of(value: object) -> float:
    """Return a noise multiplier that is finite and at least 0; else raise ConfigurationError."""
    sigma = number("noise_multiplier", value)
    if not 0 <= sigma < math.inf:
        raise ConfigurationError(
            f"noise_multiplier={value!r} must be finite and at least 0. "
            "It is the noise's standard deviation divided by max_grad_norm."
        )
    return sigma


def rate_of(value: object) -> float:
    """Return a sample rate in (0, 1]; else raise ConfigurationError."""
    rate = number("sample_rate", value)
    if not 0 < rate <= 1:
        raise ConfigurationError(
            f"sample_rate={value!r} must be in (0, 1]. A run that draws no record "
            "has no steps: pass steps=0, or the rate that the sampler really uses."
        )
    return rate


def number(name: str, value: object) -> float:
    """Return any number but NaN, as a float; else raise ConfigurationError."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except OverflowError:  # and Python may refuse to write it out
        raise ConfigurationError(f"{name} is an integer that is too large for a float.") from None
    except (TypeError, ValueError):
        found = math.nan
    if math.isnan(found) or isinstance(value, (bool, str, bytes)):
        raise ConfigurationError(f"{name}={value!r} is not a number. Pass a float.")
    return found


def positive(name: str, value: float) -> None:
    """Return without an error if `value` is a finite number above 0; else raise ConfigurationError."""
    if isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{name}={value!r} must be a finite number above 0.")
