"""Cyclic Poisson sampling: groups take turns, and each is drawn from by Poisson sampling.

For noise that is correlated over b steps: a record that takes part in a step cannot take part in any
of the next b - 1 (Choquette-Choo et al. 2023, arXiv:2306.08153, Section 4).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dptorch.accounting.correlated import CyclicGaussian
from dptorch.errors import ConfigurationError
from dptorch.randomness import RootKey
from dptorch.sampling.permutation import KeyedPermutation
from dptorch.sampling.poisson import PoissonSampler, poisson_indices
from dptorch.sampling.sampler import check_key, check_sample_size, stream
from dptorch.sampling.scheme import ANY_ADJACENCY, Scheme, Terms

__all__ = ["CYCLIC_POISSON", "CyclicPoissonSampler", "most_bands"]

_DEFAULT_BANDS: Final = 8


class CyclicPoissonSampler:
    """Draws each logical batch from one of `bands` groups, as a pure function of (key, step).

    Every example is in one group for the whole run, chosen uniformly and independently of all others:
    so removing one leaves the law of the others' groups as it was. (Their numbers are then
    multinomial, and given these every arrangement is as likely, which is how they are drawn.) Step t
    draws from group t mod `bands`, each example of it with probability `bands` * `sample_rate`.

    Args:
        sample_size: number of examples N, at most 2**40.
        sample_rate: mean share q of the examples that a step draws; ``bands * sample_rate <= 1``.
        bands: number of groups. One is Poisson sampling, draw by draw.
        key: root key of the run.

    Guarantees:
        - An example that is drawn is not drawn again in the next ``bands - 1`` steps.
        - The draws of an example, in the turns of its group, are independent coins.
        Held by `test_cyclic_sampling_keeps_participations_apart` and
        `test_cyclic_sampling_has_the_law_of_its_event`.

    Raises:
        ConfigurationError: a number is out of range.

    Example:
        >>> sampler = CyclicPoissonSampler(1000, 0.1, 5, RootKey.from_seed(0))
        >>> one, other = sampler.draw(2), sampler.draw(3)
        >>> len(np.intersect1d(one, other)), bool((sampler.draw(2) == one).all())
        (0, True)
    """

    scheme: Final = "cyclic-poisson"

    def __init__(self, sample_size: int, sample_rate: float, bands: int, key: RootKey) -> None:
        self._poisson = PoissonSampler(sample_size, sample_rate, key)
        self._sample_size = check_sample_size(sample_size, below=(1 << 40) + 1)
        self._rate = _rate_of_group(sample_rate, bands)
        self._bands = bands
        self._key = check_key(key)
        # For the whole run: a record that changed its group could take part again too soon.
        shares = np.full(bands, 1 / bands)
        sizes = stream(key, bands, 0).multinomial(
            self._sample_size, shares
        )  # two counters: no step
        self._bounds: NDArray[np.int64] = np.concatenate([[0], np.cumsum(sizes)])
        self._order = KeyedPermutation(self._sample_size, key.derive("groups", bands))

    @property
    def sample_size(self) -> int:
        """Number of examples N."""
        return self._sample_size

    def draw(self, step: int) -> NDArray[np.int64]:
        """Sorted distinct int64 indices of logical batch `step`; possibly none."""
        if self._bands == 1:
            return self._poisson.draw(step)
        group = step % self._bands
        first, size = int(self._bounds[group]), int(np.diff(self._bounds)[group])
        if not size:
            return np.empty(0, np.int64)
        places = first + poisson_indices(stream(self._key, step), size, self._rate)
        return np.sort(self._order(places))

    def __repr__(self) -> str:
        return (
            f"CyclicPoissonSampler(sample_size={self._sample_size}, "
            f"sample_rate={self._rate / self._bands!r}, bands={self._bands})"
        )


def most_bands(sample_rate: float) -> int:
    """The most groups that can take turns: in each turn a record is drawn with probability <= 1.

    Example:
        >>> most_bands(0.1), most_bands(0.3)
        (10, 3)
    """
    # The quotient may round to just below a whole number;
    # `_rate_of_group` cuts what this allows too much.
    return max(1, math.floor(1 / sample_rate + 1e-9))


def _rate_of_group(sample_rate: float, bands: int) -> float:
    """The probability with which a record is drawn when it is its group's turn."""
    if isinstance(bands, bool) or not isinstance(bands, int | np.integer) or bands < 1:
        raise ConfigurationError(f"bands={bands!r} must be a whole number, at least 1.")
    if bands > most_bands(sample_rate):
        raise ConfigurationError(
            f"bands={bands} at sample_rate={sample_rate:.6g}: a record's group has its turn every "
            f"{bands} steps, and would have to be drawn with probability {bands * sample_rate:.3g} "
            f"then. Use at most {most_bands(sample_rate)} bands, or a smaller batch."
        )
    return min(1.0, bands * sample_rate)


def _settle(terms: Terms) -> Terms:
    bands = min(_DEFAULT_BANDS, most_bands(terms.sample_rate)) if not terms.bands else terms.bands
    _rate_of_group(terms.sample_rate, bands)
    return replace(terms, bands=bands)


def _event(terms: Terms, noise_multiplier: float, steps: int) -> CyclicGaussian:
    bands = terms.bands or 1
    rate = _rate_of_group(terms.sample_rate, bands)
    return CyclicGaussian(noise_multiplier, rate, bands, steps)


CYCLIC_POISSON: Final = Scheme(
    name="cyclic-poisson",
    law="every {unit} belongs to one of {bands} groups, drawn uniformly for the whole run and "
    "independently of all others. Step t draws from group t mod {bands} alone, every {unit} of it with "
    "probability {bands} * {sample_rate:.6g}, independently of all others and of all other steps: no "
    "{unit} takes part twice in {bands} steps in a row",
    theorem="amplification by cyclic Poisson sampling, under noise of at most as many bands as there "
    "are groups (Choquette-Choo et al. 2023, arXiv:2306.08153, Theorem 4)",
    adjacencies=ANY_ADJACENCY,
    sampler=lambda terms, size, key: CyclicPoissonSampler(
        size, terms.sample_rate, terms.bands or 1, key
    ),
    event=_event,
    settle=_settle,
    places_kept="the run",
)
