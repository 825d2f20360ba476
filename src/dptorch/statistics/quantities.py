"""What is asked of a column, and where its answer is in the vector that is released.

Every unit (a row, a person, a picture) contributes one vector to a sum. It consists of K *blocks*. What
a unit adds to a block has norm at most 1/√K, so that its whole vector has norm at most 1:

=========  ===========================================================================================
present    1 where the value is there; only for columns with missing values
mean       t, the value clipped to its bounds and scaled to [-1, 1]
square     2 t² - 1, again in [-1, 1]
histogram  a 1 at the value of a list
prefix     the column of the value's bin in a matrix C, over the norm of the first
=========  ===========================================================================================

C is the lower triangular Toeplitz matrix whose square is the prefix sum (Fichtenberger, Henzinger,
Upadhyay 2023, arXiv:2202.11205). Of a histogram h, C h is released with noise z. C (C h + z) is then
the number of values up to each bin, with noise that grows with the logarithm of the bins instead of
their root, and C⁻¹ (C h + z) the histogram. Noise of training that is correlated over steps uses the
same C.

A unit of several rows (a person's visits, a picture's pixels) contributes the mean of theirs, which is
no longer than the longest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dptorch.accounting.toeplitz import square_root
from dptorch.errors import ConfigurationError

__all__ = [
    "Block",
    "Choice",
    "Floats",
    "Numeric",
    "Quantity",
    "layout",
    "prefix_norm",
    "prefix_root",
]

Floats: TypeAlias = NDArray[np.float64]
_MOST_BINS: Final = 1024


@dataclass(frozen=True)
class Numeric:
    """Mean, deviation and, with bins, histogram and quantiles of a column of numbers.

    Attributes:
        name: of the column.
        bounds: public; values outside count as the nearer one.
        missing: whether a value may be missing (NaN), which is then counted too.
        bins: of the histogram; 0 for none.
        log: bins grow by a constant factor, for what spans orders of magnitude. Bounds are positive.

    Raises:
        ConfigurationError: a value out of range.
    """

    name: str
    bounds: tuple[float, float]
    missing: bool = False
    bins: int = 64
    log: bool = False

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not (low < high and math.isfinite(high - low) and math.isfinite(2 / (high - low))):
            raise ConfigurationError(
                f"bounds={self.bounds} of {self.name!r}: expected two finite numbers, low < high, that "
                "are not read off the data."
            )
        if self.log and low <= 0:
            raise ConfigurationError(
                f"bounds={self.bounds} of {self.name!r}: log=True needs bounds above 0."
            )
        if not 0 <= self.bins <= _MOST_BINS or self.bins == 1:
            raise ConfigurationError(
                f"bins={self.bins} of {self.name!r}: expected 0 (no histogram), or 2 to {_MOST_BINS}."
            )

    @property
    def edges(self) -> Floats:
        """Of the bins, float64 [bins + 1]."""
        space = np.geomspace if self.log else np.linspace
        return np.asarray(space(*self.bounds, self.bins + 1), np.float64)

    @property
    def blocks(self) -> tuple[tuple[str, int], ...]:
        """Kind and size of each block."""
        present = (("present", 1),) if self.missing else ()
        prefix = (("prefix", self.bins),) if self.bins else ()
        return (*present, ("mean", 1), ("square", 1), *prefix)

    def rows(self, values: Floats) -> Floats:
        """What rows with these values, [N], contribute: float64 [N, sizes of the blocks]."""
        low, high = self.bounds
        there = ~np.isnan(values)
        clipped = np.clip(np.where(there, values, low), low, high)
        t = (clipped - low) * (2 / (high - low)) - 1
        parts = [there[:, None].astype(np.float64)] if self.missing else []
        parts += [(t * there)[:, None], ((2 * t * t - 1) * there)[:, None]]
        if self.bins:
            columns = prefix_root(self.bins).T / prefix_norm(self.bins)
            places = np.searchsorted(self.edges[1:-1], clipped, "right")
            parts.append(columns[places] * there[:, None])
        return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class Choice:
    """How many have each value of a column.

    Attributes:
        name: of the column.
        values: public, in the order of the numbers 0, 1, ... that stand for them; one for what is
            missing (NaN) last, if that is to be counted.
        missing: whether the last value counts what is missing.
    """

    name: str
    values: tuple[str, ...]
    missing: bool = False

    def __post_init__(self) -> None:
        if len(self.values) < 1:
            raise ConfigurationError(f"values=() of {self.name!r}: expected a public list.")
        if twice := sorted({v for v in self.values if self.values.count(v) > 1}):
            raise ConfigurationError(f"values of {self.name!r}: {twice[0]!r} is there twice.")

    @property
    def blocks(self) -> tuple[tuple[str, int], ...]:
        """Kind and size of each block."""
        return (("histogram", len(self.values)),)

    def rows(self, values: Floats) -> Floats:
        """What rows with these values, [N], contribute: float64 [N, values]."""
        there = ~np.isnan(values)
        last = len(self.values) - 1
        numbers = np.where(there, values, last)
        counted = (numbers >= 0) & (numbers <= last) & (there | self.missing)
        counted &= numbers == np.trunc(numbers)
        places = np.clip(numbers, 0, last).astype(np.int64)
        return _one_hot(places, counted, len(self.values))


@lru_cache(maxsize=8)
def prefix_root(bins: int) -> Floats:
    """The matrix C, float64 [bins, bins], with C C h the sums of h up to each bin.

    Example:
        >>> (prefix_root(3) @ prefix_root(3)).round(12).tolist()
        [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    """
    lags = np.subtract.outer(np.arange(bins), np.arange(bins))
    return np.asarray(np.where(lags >= 0, square_root(bins)[np.maximum(lags, 0)], 0.0))


def prefix_norm(bins: int) -> float:
    """The largest norm of a column of C: that of the first."""
    return float(np.linalg.norm(square_root(bins)))


Quantity: TypeAlias = Numeric | Choice


@dataclass(frozen=True)
class Block:
    """A part of the vector.

    Attributes:
        name: of the column.
        kind: see the module.
        start, stop: its coordinates.
    """

    name: str
    kind: str
    start: int
    stop: int


def layout(quantities: Sequence[Quantity]) -> list[Block]:
    """The blocks of the vector, one after the other.

    Raises:
        ConfigurationError: there is no quantity, or two of one name.
    """
    names = [quantity.name for quantity in quantities]
    if not names or len(set(names)) != len(names):
        raise ConfigurationError(
            f"quantities={names}: expected at least one, and each column once."
        )
    blocks, start = list[Block](), 0
    for quantity in quantities:
        for kind, size in quantity.blocks:
            blocks.append(Block(quantity.name, kind, start, start + size))
            start += size
    return blocks


def _one_hot(places: NDArray[np.int64], counted: NDArray[np.bool_], size: int) -> Floats:
    found = np.zeros((len(places), size))
    found[np.arange(len(places)), places] = counted
    return found
