"""Neighbouring relations: which two data sets an (ε, δ) statement compares."""

from __future__ import annotations

from enum import Enum

from dptorch.errors import one_of

__all__ = ["Adjacency"]


class Adjacency(str, Enum):
    """The neighbouring relation that an (ε, δ) statement is about.

    A record is one unit of privacy (an example, a user); each contributes a vector of norm at most
    C = `max_grad_norm` to a step's sum, and the noise has standard deviation C · noise_multiplier.

    Attributes:
        ADD_REMOVE: D' is D with one record added or removed. The number of records is itself
            protected, so nothing published may depend on it.
        ZERO_OUT: one record of D is replaced by one that contributes nothing. Costs the same as
            add/remove, but the number of records is public.
        REPLACE_ONE: one record of D is replaced by any other. The sum can move by 2C, so at equal
            noise ε is larger; the number of records is public.

    Example:
        >>> Adjacency("replace-one").sensitivity_factor
        2.0
        >>> Adjacency.of("add-remove") is Adjacency.ADD_REMOVE
        True
    """

    ADD_REMOVE = "add-remove"
    ZERO_OUT = "zero-out"
    REPLACE_ONE = "replace-one"

    @property
    def sensitivity_factor(self) -> float:
        """Bound on the distance of a step's clipped sums between neighbours, in units of C."""
        return 2.0 if self is Adjacency.REPLACE_ONE else 1.0

    @classmethod
    def of(cls, value: str | Adjacency) -> Adjacency:
        """Return the relation named `value`.

        Raises:
            dptorch.errors.ConfigurationError: no relation has that name; all names are listed.
        """
        if isinstance(value, cls):
            return value
        return cls(one_of("adjacency", value, [member.value for member in cls]))
