"""Truncated Poisson sampling: Poisson batches cut off at a capacity, so that shapes never change."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from dptorch.accounting.events import TruncatedPoissonGaussian
from dptorch.errors import ConfigurationError
from dptorch.randomness import RootKey
from dptorch.sampling.poisson import PoissonSampler, poisson_indices
from dptorch.sampling.sampler import check_key, distinct_indices, stream
from dptorch.sampling.scheme import PUBLIC_SIZE, Scheme, Terms

__all__ = ["TRUNCATED_POISSON", "TruncatedPoissonSampler"]


class TruncatedPoissonSampler:
    """Poisson sampling of which at most `capacity` examples are kept, a uniformly random subset.

    A loader pads each batch to `capacity`, so every step has the same shape: it compiles once, needs
    the same memory, and its duration does not tell how many examples were drawn. While no batch
    exceeds the capacity this is Poisson sampling. The chance that one does is what it costs.

    Args:
        sample_size, sample_rate, key: as for `PoissonSampler`.
        capacity: most examples in a batch, at least the mean batch size.

    Guarantees:
        `draw(step)` is `PoissonSampler.draw(step)` wherever that has at most `capacity` examples.
        Held by `test_truncation_keeps_a_uniform_subset`.

    Example:
        >>> sampler = TruncatedPoissonSampler(1000, 0.1, RootKey.from_seed(0), capacity=100)
        >>> max(len(sampler.draw(step)) for step in range(50))
        100
    """

    scheme: Final = "truncated-poisson"

    def __init__(self, sample_size: int, sample_rate: float, key: RootKey, capacity: int) -> None:
        poisson = PoissonSampler(sample_size, sample_rate, key)
        if isinstance(capacity, bool) or not isinstance(capacity, int | np.integer):
            raise ConfigurationError(f"capacity={capacity!r} must be a whole number of examples.")
        if capacity < poisson.expected_batch_size:
            raise ConfigurationError(_too_small(int(capacity), poisson.expected_batch_size))
        self._sample_size, self._sample_rate = poisson.sample_size, poisson.sample_rate
        self._capacity = int(capacity)
        self._key = check_key(key)

    @property
    def sample_size(self) -> int:
        """Number of examples N."""
        return self._sample_size

    @property
    def capacity(self) -> int:
        """Most examples in a batch."""
        return self._capacity

    def draw(self, step: int) -> NDArray[np.int64]:
        """Sorted distinct int64 indices of logical batch `step`; possibly none."""
        generator = stream(self._key, step)
        drawn = poisson_indices(generator, self._sample_size, self._sample_rate)
        if len(drawn) <= self._capacity:
            return drawn
        # After the sample and from the same stream: who stays depends on nothing but the key.
        return drawn[distinct_indices(generator, len(drawn), self._capacity)]


def _sampler(terms: Terms, size: int, key: RootKey) -> TruncatedPoissonSampler:
    assert terms.capacity is not None
    return TruncatedPoissonSampler(size, terms.sample_rate, key, terms.capacity)


def _event(terms: Terms, noise: float, steps: int) -> TruncatedPoissonGaussian:
    assert terms.sample_size is not None
    assert terms.capacity is not None
    return TruncatedPoissonGaussian(
        noise, terms.sample_rate, steps, terms.sample_size, terms.capacity
    )


def _capacity(terms: Terms, steps: int, delta: float) -> int:
    assert terms.sample_size is not None
    # A cut costs (1 + e^ε) · overflow of δ where an accountant knows no
    # better: 1e-6 of δ keeps that below a fortieth of it up to ε = 10.
    return TruncatedPoissonGaussian.safe_capacity(
        terms.sample_rate, terms.sample_size, steps, overflow=1e-6 * delta
    )


def _settle(terms: Terms) -> Terms:
    if terms.capacity is not None and terms.capacity < terms.expected_batch_size:
        raise ConfigurationError(_too_small(terms.capacity, terms.expected_batch_size))
    return terms


def _too_small(capacity: int, expected: float) -> str:
    return (
        f"capacity={capacity} is below the mean batch size {expected:g}: every other batch would lose "
        "examples. Leave it out for one that costs next to nothing, about B + 8 sqrt(B)."
    )


TRUNCATED_POISSON: Final = Scheme(
    name="truncated-poisson",
    law="every {unit} enters every batch with probability {sample_rate:.6g}, independently of all "
    "others and of all other steps; of a batch above {capacity}, a random {capacity} are kept",
    theorem="Poisson sampling but for the chance that a batch is cut, where one record may take the "
    "place of another; it is computed from a public number of records (Chua et al. 2024, "
    "arXiv:2411.04205, Theorem 3.3, and 2025, arXiv:2508.15089)",
    adjacencies=PUBLIC_SIZE,
    sampler=_sampler,
    event=_event,
    settle=_settle,
    capacity=_capacity,
)
