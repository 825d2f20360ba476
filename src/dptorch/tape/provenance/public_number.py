"""Numbers that the user says are public: schedules of a term of the loss."""

from __future__ import annotations

from dptorch.errors import ConfigurationError

__all__ = ["PublicNumber", "public_number"]


class PublicNumber(float):
    """A number that depends on no private data; arithmetic on it gives ordinary numbers."""


def public_number(value: float) -> PublicNumber:
    """Say that a number which changes from step to step depends on nothing but public knowledge.

    What the terms of a loss are multiplied by may not change, because a number that comes from the
    batch lets one example rescale all others. A weight that follows a schedule (the number of the
    step, a metric of public data) is not told apart from one by its value, so the program says it.
    This is a promise: a wrong one voids the privacy guarantee.

    Args:
        value: the weight, as it enters the loss.

    Raises:
        ConfigurationError: for anything but a finite number of Python.

    Example:
        >>> import torch, dptorch
        >>> reconstruction, kl = torch.ones(4), torch.ones(4)
        >>> step = 30
        >>> losses = reconstruction + dptorch.tape.public_number(min(1.0, step / 100)) * kl
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value - value != 0:
        raise ConfigurationError(
            f"public_number({value!r}): expected a finite number of Python, such as "
            "min(1.0, step / 1000). A tensor or a number that was read from one is not public "
            "because it is said to be."
        )
    return PublicNumber(value)
