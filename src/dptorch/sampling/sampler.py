"""The `Sampler` protocol, and what all samplers share."""

from __future__ import annotations

from typing import Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dptorch.errors import ConfigurationError
from dptorch.randomness import RootKey

__all__ = ["Sampler", "check_key", "check_sample_size", "distinct_indices", "stream"]

PURPOSE: Final = "sampling"


@runtime_checkable
class Sampler(Protocol):
    """Chooses the examples of each logical batch, as a pure function of its key and the step.

    Attributes:
        sample_size: number of examples the indices refer to.
        scheme: name of the scheme, by which an accountant knows whether it covers it.
    """

    @property
    def sample_size(self) -> int: ...

    @property
    def scheme(self) -> str: ...

    def draw(self, step: int) -> NDArray[np.int64]:
        """Indices in [0, sample_size) of logical batch `step`; possibly none. Distinct, unless the
        scheme draws with replacement."""
        ...


def stream(key: RootKey, *counters: int) -> np.random.Generator:
    """The generator of one step's (or epoch's) draws.

    numpy's Philox (4x64, 10 rounds) under the first 128 bits of ``key.derive("sampling", ...)``.
    Philox is statistically strong but not proven cryptographic; an observer never sees its output,
    only noisy sums over the batches it selects.
    """
    seed = key.derive(PURPOSE, *counters)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(seed[:16], "little")))


def distinct_indices(
    generator: np.random.Generator, population: int, count: int
) -> NDArray[np.int64]:
    """Sorted indices of a uniformly random subset of `count` of [0, population), in O(count).

    The first `count` distinct values of a sequence of independent uniform draws are such a subset. Of
    more than half the population, the complement is drawn.

    Example:
        >>> chosen = distinct_indices(np.random.default_rng(0), 10**12, 3)
        >>> len(set(chosen.tolist()))
        3
    """
    if 2 * count > population:
        kept = np.ones(population, bool)
        kept[distinct_indices(generator, population, population - count)] = False
        return np.flatnonzero(kept)
    drawn = np.empty(0, np.int64)
    while len(drawn) < count:
        more = generator.integers(0, population, size=count - len(drawn), dtype=np.int64)
        # In two sorts: np.unique on what was kept is in order of value, not of being drawn, but as
        # no value is ever given up, that order does not matter.
        drawn = np.unique(np.concatenate([drawn, more]))
    return drawn


def check_sample_size(value: object, *, below: int = 1 << 56) -> int:
    """Return a number of examples as an int.

    Raises:
        ConfigurationError: it is no whole number in [1, below).
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ConfigurationError(f"sample_size={value!r} must be a positive integer.")
    if not 0 < value < below:
        raise ConfigurationError(f"sample_size={value!r} must be in [1, {below}).")
    return int(value)


def check_key(key: object) -> RootKey:
    """Return `key` if it is a RootKey."""
    if not isinstance(key, RootKey):
        raise ConfigurationError(
            f"key must be a RootKey, not {type(key).__name__}. Use RootKey.from_os()."
        )
    return key
