"""Poisson subsampling: every example enters every batch independently with the same probability."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dptorch.accounting.events import SampledGaussian
from dptorch.errors import ConfigurationError
from dptorch.randomness import RootKey
from dptorch.sampling.sampler import check_key, check_sample_size, stream
from dptorch.sampling.scheme import ANY_ADJACENCY, Scheme

__all__ = ["POISSON", "PoissonSampler", "poisson_indices"]


def poisson_indices(
    generator: np.random.Generator, sample_size: int, sample_rate: float
) -> NDArray[np.int64]:
    """Sorted indices of a Poisson sample, in time and memory proportional to the sample.

    `sample_size` coins with probability `sample_rate` are not tossed one by one: the gaps from one
    success to the next of independent coins are independent Geometric(`sample_rate`) variables, so
    drawing the gaps and adding them up gives the same law (that is what the geometric law is; to
    draw Binomial(N, q) and then a uniform subset of that size is the other way, arXiv:2406.17298
    Lemma 1). Unlike a subset drawn by shuffling, it needs no vector of `sample_size` at any rate.

    Args:
        generator: source of the gaps.
        sample_size: number N of examples, > 0.
        sample_rate: probability q of each, in (0, 1].

    Returns:
        int64 array, strictly increasing, within [0, N); its length is Binomial(N, q).

    Example:
        >>> chosen = poisson_indices(np.random.default_rng(0), 100_000_000, 1e-7)
        >>> chosen.dtype.name, bool((np.diff(chosen) > 0).all())
        ('int64', True)
    """
    if sample_rate == 1.0:
        return np.arange(sample_size, dtype=np.int64)
    mean = sample_size * sample_rate
    # Enough gaps to pass the end at once, except once in some 10**15 draws.
    want = int(mean + 8.0 * math.sqrt(mean) + 16.0)
    pieces: list[NDArray[np.int64]] = []
    last = -1
    while last < sample_size:
        gaps = generator.geometric(sample_rate, size=want)
        # From above, so that a tiny rate cannot overflow the sum. From below, because inversion of
        # an exponential that is exactly 0 (once in 2**53) gives a gap of 0: an example drawn twice.
        np.clip(gaps, 1, sample_size + 1, out=gaps)
        positions = np.cumsum(gaps, out=gaps)
        positions += last
        last = int(positions[-1])
        pieces.append(positions)
    drawn = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return drawn[: np.searchsorted(drawn, sample_size)]


class PoissonSampler:
    """Draws each logical batch by Poisson subsampling, as a pure function of (key, step).

    There is no state: any process that holds the key draws the same batch for a step, in any order,
    and a resumed run continues exactly. A batch may be empty; an empty batch is a step like any
    other.

    Args:
        sample_size: number of examples N.
        sample_rate: probability q that an example enters a batch, in (0, 1]. A parameter of the
            plan, not to be derived from N under add/remove adjacency.
        key: root key of the run.

    Guarantees:
        - Every index of [0, N) is in batch `step` with probability q, independently of all others
          and of all other steps (to the 53-bit precision of the gaps).
        - Indices within a batch are distinct.
        Held by `test_draws_have_the_poisson_law` and
        `test_indices_are_distinct_sorted_and_in_range`.

    Raises:
        ConfigurationError: `sample_size` is no positive integer or `sample_rate` is outside (0, 1].

    Example:
        >>> sampler = PoissonSampler(1000, 0.25, RootKey.from_seed(0))
        >>> batch = sampler.draw(7)
        >>> bool((batch == sampler.draw(7)).all())
        True
        >>> sampler.expected_batch_size
        250.0
    """

    scheme: Final = "poisson"

    def __init__(self, sample_size: int, sample_rate: float, key: RootKey) -> None:
        try:
            rate = float(sample_rate)
        except (TypeError, ValueError):
            raise ConfigurationError(
                f"sample_rate={sample_rate!r} must be a number in (0, 1]."
            ) from None
        if isinstance(sample_rate, bool) or not 0.0 < rate <= 1.0:
            raise ConfigurationError(
                f"sample_rate={sample_rate!r} must be in (0, 1]: the probability that one example "
                "enters one batch, for example expected batch size / number of examples."
            )
        self._sample_size = check_sample_size(sample_size)
        self._sample_rate = rate
        self._key = check_key(key)

    @property
    def sample_size(self) -> int:
        """Number of examples N."""
        return self._sample_size

    @property
    def sample_rate(self) -> float:
        """Probability q that one example enters one batch."""
        return self._sample_rate

    @property
    def expected_batch_size(self) -> float:
        """Mean q * N of the logical batch size."""
        return self._sample_size * self._sample_rate

    def draw(self, step: int) -> NDArray[np.int64]:
        """Sorted distinct int64 indices of logical batch `step`; possibly none."""
        generator = stream(self._key, step)
        return poisson_indices(generator, self._sample_size, self._sample_rate)

    def __repr__(self) -> str:
        return f"PoissonSampler(sample_size={self._sample_size}, sample_rate={self._sample_rate!r})"


POISSON: Final = Scheme(
    name="poisson",
    law="every {unit} enters every batch with probability {sample_rate:.6g}, independently of all "
    "others and of all other steps",
    theorem="amplification by Poisson sampling (Zhu, Dong, Wang 2022, arXiv:2106.08567, Theorem 11)",
    adjacencies=ANY_ADJACENCY,
    sampler=lambda terms, size, key: PoissonSampler(size, terms.sample_rate, key),
    event=lambda terms, noise, steps: SampledGaussian(noise, terms.sample_rate, steps),
)
