"""A sampling scheme: its sampler, its law in words, its accounting event."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from dptorch.accounting import Adjacency
from dptorch.accounting.events import Event
from dptorch.errors import ConfigurationError
from dptorch.randomness import RootKey
from dptorch.sampling.sampler import Sampler

__all__ = ["ANY_ADJACENCY", "PUBLIC_SIZE", "Scheme", "Terms", "by_epochs"]

ANY_ADJACENCY = tuple(Adjacency)
# The relations under which the number of records is public.
PUBLIC_SIZE = (Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE)


@dataclass(frozen=True)
class Terms:
    """The numbers that a plan fixes about its batches. All of them are public.

    Attributes:
        sample_rate: share of the records that a step draws, in expectation.
        expected_batch_size: number of records that a step draws, in expectation.
        sample_size: number of records, if it is public.
        capacity: most records in a batch, for a scheme that has such a bound.
        bands: groups that take turns, for a scheme that has groups.
    """

    sample_rate: float
    expected_batch_size: float
    sample_size: int | None = None
    capacity: int | None = None
    bands: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which each record was drawn once, in expectation.

        Example:
            >>> Terms(sample_rate=0.3, expected_batch_size=30).steps_per_epoch
            3
        """
        return max(1, round(1 / self.sample_rate))


@dataclass(frozen=True)
class Scheme:
    """One way of drawing batches, with everything that depends on it.

    Attributes:
        name: what a plan calls it.
        law: the statement's sentence, with the fields of `Terms` and {unit}, {steps_per_epoch}.
        theorem: why its event covers it.
        adjacencies: the neighbouring relations under which the event covers it.
        sampler: (terms, number of records, key) -> sampler.
        event: (terms, noise multiplier, steps) -> what the first `steps` steps release.
        settle: terms -> the terms that the scheme can honour exactly; raises for impossible ones.
        separation: for a scheme that keeps a record's participations apart without drawing: terms ->
            the fewest steps from one to the next.
        capacity: for a scheme with a bound on the batch: (terms, steps, delta) -> a bound that costs
            next to nothing.
        places_kept: where a record's place in the data set decides when it takes part again: how long
            it must keep its place, "an epoch" or "the run".
    """

    name: str
    law: str
    theorem: str
    adjacencies: tuple[Adjacency, ...]
    sampler: Callable[[Terms, int, RootKey], Sampler]
    event: Callable[[Terms, float, int], Event]
    settle: Callable[[Terms], Terms] = lambda terms: terms
    capacity: Callable[[Terms, int, float], int] | None = None
    separation: Callable[[Terms], int] | None = None
    places_kept: str = ""

    def check(self, terms: Terms, adjacency: Adjacency) -> None:
        """Raise unless the event covers a run on `terms` under `adjacency`.

        Raises:
            ConfigurationError: naming what would be covered.
        """
        if adjacency not in self.adjacencies:
            able = " or ".join(repr(a.value) for a in self.adjacencies)
            raise ConfigurationError(
                f"sampling={self.name!r} is not covered under adjacency={adjacency.value!r}: "
                f"{self.theorem}. State adjacency={able}, or use sampling='poisson'."
            )
        if Adjacency.ADD_REMOVE not in self.adjacencies and terms.sample_size is None:
            raise ConfigurationError(
                f"sampling={self.name!r} needs sample_size, the number of records, which is public "
                "under its adjacency."
            )
        if terms.capacity is not None and self.capacity is None:
            raise ConfigurationError(
                f"capacity={terms.capacity!r} is for sampling='truncated-poisson'; "
                f"sampling={self.name!r} has none. Leave it out."
            )
        if terms.capacity is None and self.capacity is not None:
            raise ConfigurationError(
                f"sampling={self.name!r} needs a capacity; dptorch.make_plan finds one."
            )
        if terms.bands is not None and self.settle(replace(terms, bands=None)).bands is None:
            raise ConfigurationError(
                f"bands={terms.bands!r} is for sampling='cyclic-poisson', which mechanism='banded' "
                f"uses; sampling={self.name!r} has none. Leave it out."
            )
        if self.settle(terms) != terms:
            raise ConfigurationError(
                f"sampling={self.name!r} cannot honour {terms}; the nearest that it can is "
                f"{self.settle(terms)}. Use dptorch.make_plan, which settles this."
            )

    def describe(self, terms: Terms, unit: str) -> str:
        """Return the law in words, with the numbers of `terms`."""
        return self.law.format(unit=unit, steps_per_epoch=terms.steps_per_epoch, **terms.__dict__)


def by_epochs(terms: Terms) -> Terms:
    """Terms of which an epoch is a whole number of steps.

    Example:
        >>> by_epochs(Terms(sample_rate=0.3, expected_batch_size=30, sample_size=100)).sample_rate
        0.3333333333333333
    """
    rate = 1 / terms.steps_per_epoch
    expected = terms.expected_batch_size * (rate / terms.sample_rate)
    if terms.sample_size is not None:
        if terms.steps_per_epoch > terms.sample_size:
            raise ConfigurationError(
                f"an epoch of {terms.steps_per_epoch} steps over {terms.sample_size} records has "
                "steps without any. Use a batch size of at least 1."
            )
        expected = terms.sample_size / terms.steps_per_epoch
    if math.isclose(expected, terms.expected_batch_size):
        expected = terms.expected_batch_size
    return replace(terms, sample_rate=rate, expected_batch_size=expected)
