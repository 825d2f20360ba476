"""Samplers that use every example once an epoch: random allocation, shuffled, sequential."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dptorch.accounting import Adjacency
from dptorch.accounting.events import EpochwiseGaussian, RandomAllocationGaussian
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.randomness import RootKey
from dptorch.sampling.permutation import KeyedPermutation
from dptorch.sampling.sampler import check_key, check_sample_size, stream
from dptorch.sampling.scheme import PUBLIC_SIZE, Scheme, Terms, by_epochs

__all__ = [
    "RANDOM_ALLOCATION",
    "SEQUENTIAL",
    "SHUFFLED",
    "RandomAllocationSampler",
    "SequentialSampler",
    "ShuffledSampler",
]

Indices = NDArray[np.int64]


class _Dealer(ABC):
    """Cuts an order of all examples into consecutive batches, one for each step of an epoch.

    Args:
        sample_size: number of examples N, at most 2**40.
        steps_per_epoch: number of steps S of an epoch.
        key: root key of the run.
    """

    def __init__(self, sample_size: int, steps_per_epoch: int, key: RootKey) -> None:
        self._sample_size = check_sample_size(sample_size, below=(1 << 40) + 1)
        if isinstance(steps_per_epoch, bool) or not isinstance(steps_per_epoch, int | np.integer):
            raise ConfigurationError(f"steps_per_epoch={steps_per_epoch!r} must be a whole number.")
        if steps_per_epoch < 1:
            raise ConfigurationError(f"steps_per_epoch={steps_per_epoch!r} must be at least 1.")
        self._steps = int(steps_per_epoch)
        self._key = check_key(key)
        self._epoch = -1
        self._order: Callable[[Indices], Indices] | None = None
        self._bounds: Indices = np.empty(0, np.int64)

    @property
    def sample_size(self) -> int:
        """Number of examples N."""
        return self._sample_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps S of an epoch."""
        return self._steps

    def draw(self, step: int) -> Indices:
        """Sorted distinct int64 indices of logical batch `step`; possibly none."""
        epoch, at = divmod(step, self._steps)
        # The same for every call: what is kept is a cache, so that any process may draw any step.
        if epoch != self._epoch:
            self._order, self._bounds = self._deal(epoch)
            self._epoch = epoch
        places = np.arange(self._bounds[at], self._bounds[at + 1])
        return places if self._order is None else np.sort(self._order(places))

    @abstractmethod
    def _deal(self, epoch: int) -> tuple[Callable[[Indices], Indices] | None, Indices]:
        """The order of the examples (None: as they are), and where each step's batch begins."""

    def _permutation(self, epoch: int) -> KeyedPermutation:
        return KeyedPermutation(self._sample_size, self._key.derive("permutation", epoch))

    def _even_bounds(self) -> Indices:
        # In Python integers: N * S may pass 2**63.
        n, steps = self._sample_size, self._steps
        return np.array([n * at // steps for at in range(steps + 1)], np.int64)


class RandomAllocationSampler(_Dealer):
    """Every example enters one step of each epoch, uniformly chosen and independent of the others.

    Exactly that law: independent uniform choices give the steps multinomial numbers of examples and,
    given these, a uniformly random arrangement. So the numbers are drawn, O(S) an epoch, and a keyed
    permutation (`KeyedPermutation`, which says how random it is) is cut accordingly.

    Known as "balls in bins" (Chua et al. 2024, arXiv:2412.16802) and as random allocation (Feldman and
    Shenfeld 2025, arXiv:2502.08202).

    Example:
        >>> sampler = RandomAllocationSampler(100, 5, RootKey.from_seed(0))
        >>> bool((np.sort(np.concatenate([sampler.draw(t) for t in range(5)])) == range(100)).all())
        True
    """

    scheme: Final = "random-allocation"

    def _deal(self, epoch: int) -> tuple[KeyedPermutation | None, Indices]:
        # The sizes and the arrangement have keys of two
        # purposes: given the sizes, the arrangement is uniform.
        generator = stream(self._key, epoch)
        sizes = generator.multinomial(self._sample_size, np.full(self._steps, 1 / self._steps))
        return self._permutation(epoch), np.concatenate([[0], np.cumsum(sizes)])


class ShuffledSampler(_Dealer):
    """Draws each epoch in a new random order, in batches of N / S examples, rounded up or down.

    What ``DataLoader(shuffle=True)`` does. Every example enters each epoch once.

    Example:
        >>> sampler = ShuffledSampler(10, 3, RootKey.from_seed(0))
        >>> [len(sampler.draw(step)) for step in range(3)]
        [3, 3, 4]
    """

    scheme: Final = "shuffled"
    _given: Callable[[int], Indices] | None = None

    def follow(self, order: Callable[[int], Indices]) -> None:
        """Take the order of each epoch from `order`, which need not be secret, instead of the key.

        Args:
            order: a function from the number of an epoch to a permutation of range(N), int64 [N].
        """
        self._given = order
        self._epoch = -1

    def _deal(self, epoch: int) -> tuple[Callable[[Indices], Indices] | None, Indices]:
        if self._given is None:
            return self._permutation(epoch), self._even_bounds()
        order = self._given(epoch)
        # A record that is in it twice would be released
        # twice in an epoch that is accounted as one release.
        if not np.array_equal(np.sort(order), np.arange(self._sample_size)):
            raise PrivacyError(
                f"the order given for epoch {epoch} does not hold every example once, as the "
                "accounting of shuffled batches assumes. Give a permutation of "
                f"range({self._sample_size})."
            )
        return order.__getitem__, self._even_bounds()


class SequentialSampler(_Dealer):
    """Draws each epoch in the order of the data set, in batches of N / S examples, rounded up or down.

    Example:
        >>> SequentialSampler(10, 5, RootKey.from_seed(0)).draw(6)
        array([2, 3])
    """

    scheme: Final = "sequential"

    def _deal(self, epoch: int) -> tuple[KeyedPermutation | None, Indices]:
        return None, self._even_bounds()


def _once_an_epoch(terms: Terms, noise: float, steps: int) -> EpochwiseGaussian:
    return EpochwiseGaussian(noise, terms.steps_per_epoch, steps)


_NO_AMPLIFICATION: Final = (
    "an epoch releases each record once, so it is one Gaussian mechanism, as long as no record's "
    "presence moves another into another batch; no amplification is claimed, for shuffling none of "
    "the size of Poisson sampling's is known (Chua et al. 2024, arXiv:2403.17673)"
)
RANDOM_ALLOCATION: Final = Scheme(
    name="random-allocation",
    law="every {unit} enters one of the {steps_per_epoch} steps of each epoch, uniformly chosen, "
    "independently of all others and of all other epochs",
    theorem="amplification by random allocation (Feldman and Shenfeld 2025, arXiv:2502.08202)",
    adjacencies=(Adjacency.ADD_REMOVE, Adjacency.ZERO_OUT),
    sampler=lambda terms, size, key: RandomAllocationSampler(size, terms.steps_per_epoch, key),
    event=lambda terms, noise, steps: RandomAllocationGaussian(noise, terms.steps_per_epoch, steps),
    settle=by_epochs,
    places_kept="an epoch",
)
SHUFFLED: Final = Scheme(
    name="shuffled",
    law="every {unit} enters each epoch of {steps_per_epoch} steps once, in a random order of all; no "
    "amplification by sampling is claimed",
    theorem=_NO_AMPLIFICATION,
    adjacencies=PUBLIC_SIZE,
    sampler=lambda terms, size, key: ShuffledSampler(size, terms.steps_per_epoch, key),
    event=_once_an_epoch,
    settle=by_epochs,
    places_kept="an epoch",
)
SEQUENTIAL: Final = Scheme(
    name="sequential",
    law="every {unit} enters each epoch of {steps_per_epoch} steps once, in the order of the data; no "
    "amplification by sampling is claimed",
    theorem=_NO_AMPLIFICATION,
    adjacencies=PUBLIC_SIZE,
    sampler=lambda terms, size, key: SequentialSampler(size, terms.steps_per_epoch, key),
    event=_once_an_epoch,
    settle=by_epochs,
    places_kept="an epoch",
    separation=lambda terms: terms.steps_per_epoch,
)
