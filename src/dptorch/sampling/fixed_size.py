"""Batches of a fixed size, drawn anew at each step, with or without replacement."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from dptorch.accounting.events import FixedSizeGaussian
from dptorch.errors import ConfigurationError
from dptorch.randomness import RootKey
from dptorch.sampling.sampler import check_key, check_sample_size, distinct_indices, stream
from dptorch.sampling.scheme import PUBLIC_SIZE, Scheme, Terms

__all__ = ["FIXED_SIZE", "FIXED_SIZE_WITH_REPLACEMENT", "FixedSizeSampler"]


class FixedSizeSampler:
    """Draws batches of `batch_size` examples, independent of each other, in O(batch_size) work.

    Args:
        sample_size: number of examples N.
        batch_size: number of examples of each batch.
        key: root key of the run.
        replacement: False: a uniformly random subset. True: `batch_size` independent uniform draws,
            so that an example may be in a batch several times, and then counts as often.

    Raises:
        ConfigurationError: a value out of range, or a subset larger than the data set.

    Example:
        >>> sampler = FixedSizeSampler(1000, 4, RootKey.from_seed(0))
        >>> len(set(sampler.draw(0).tolist()))
        4
    """

    def __init__(
        self, sample_size: int, batch_size: int, key: RootKey, *, replacement: bool = False
    ) -> None:
        self._sample_size = check_sample_size(sample_size)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
            raise ConfigurationError(
                f"batch_size={batch_size!r} must be a whole number of examples."
            )
        if batch_size < 1 or (batch_size > sample_size and not replacement):
            raise ConfigurationError(
                f"batch_size={batch_size!r} must be in [1, {sample_size}], the number of records."
            )
        self._batch_size = int(batch_size)
        self._replacement = bool(replacement)
        self._key = check_key(key)

    @property
    def scheme(self) -> Literal["fixed-size", "fixed-size-with-replacement"]:
        """Name of the scheme."""
        return "fixed-size-with-replacement" if self._replacement else "fixed-size"

    @property
    def sample_size(self) -> int:
        """Number of examples N."""
        return self._sample_size

    def draw(self, step: int) -> NDArray[np.int64]:
        """Sorted int64 indices of logical batch `step`; distinct unless drawn with replacement."""
        generator = stream(self._key, step)
        if self._replacement:
            # `integers` rejects, so every record is exactly
            # as likely: no remainder favours the first ones.
            return np.sort(generator.integers(0, self._sample_size, self._batch_size))
        return distinct_indices(generator, self._sample_size, self._batch_size)


def _settle(terms: Terms) -> Terms:
    if terms.sample_size is None:
        return terms
    # The plan's rate becomes that of the whole number which is drawn: the event has the same number.
    size = min(max(1, round(terms.expected_batch_size)), terms.sample_size)
    return replace(terms, sample_rate=size / terms.sample_size, expected_batch_size=float(size))


def _scheme(name: str, law: str, theorem: str, *, replacement: bool) -> Scheme:
    def event(terms: Terms, noise: float, steps: int) -> FixedSizeGaussian:
        assert terms.sample_size is not None
        size = round(terms.expected_batch_size)
        return FixedSizeGaussian(noise, size, terms.sample_size, steps, replacement)

    return Scheme(
        name=name,
        law=law,
        theorem=theorem
        + " (Balle, Barthe, Gaboardi 2018, arXiv:1807.01647), which needs batch and "
        "data set of public sizes",
        adjacencies=PUBLIC_SIZE,
        sampler=lambda terms, size, key: FixedSizeSampler(
            size, round(terms.expected_batch_size), key, replacement=replacement
        ),
        event=event,
        settle=_settle,
    )


FIXED_SIZE: Final = _scheme(
    "fixed-size",
    "every batch is a uniformly random subset of {expected_batch_size:.0f}, independent of all other "
    "batches",
    "amplification by sampling without replacement",
    replacement=False,
)
FIXED_SIZE_WITH_REPLACEMENT: Final = _scheme(
    "fixed-size-with-replacement",
    "every batch is {expected_batch_size:.0f} independent uniform draws; a {unit} drawn twice counts "
    "twice",
    "amplification by sampling with replacement",
    replacement=True,
)
