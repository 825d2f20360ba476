"""Gaussian noise that is correlated over steps: noise C⁻¹z of a banded Toeplitz matrix C.

A step's noise takes back a part of what earlier steps added, so that the parameters, which are sums
over steps, carry less of it (Choquette-Choo et al. 2023, arXiv:2306.08153). With coefficients
c_0 = 1, c_1, ..., c_{b-1} and white noise z_t,

    w_t = z_t - c_1 w_{t-1} - ... - c_{b-1} w_{t-b+1}        noise of step t: σ · scale · d_t · w_t

where d_t is the norm of column t of C: it makes all columns of the matrix that is used, C over d, of
norm 1, so that σ means what it means for independent noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dptorch.accounting.toeplitz import column_norms, inverse
from dptorch.noise.recursive import RecursiveNoise, Taps

__all__ = ["BandedNoise"]


class BandedNoise(RecursiveNoise):
    """Adds to a clipped sum noise that is correlated over the steps of a run.

    Args:
        noise_multiplier: standard deviation of z per unit of the sum's scale, for columns of norm 1.
        coefficients: c_0 > 0, c_1, ..., c_{b-1}. One alone is `GaussianNoise`, bit for bit.
        steps: number of steps of the run.
        secure_rng: as of `GaussianNoise`.

    Guarantees:
        - The noise of a run is C⁻¹z, z white: to the rounding of float32, of which step t has
          O(b). Held by `test_the_noise_of_a_run_is_that_of_the_dense_matrix` and
          `test_covariance_of_released_noise`.
        - z_t is a function of (key, t, context of t, position) alone. So is then the noise of a step,
          given the contexts of all steps before: restarts, threads and shards do not change it.
          Held by `test_shards_and_restarts_give_the_noise_of_the_whole`.
        - On the CPU it has the same bits with and without a compiler. Held by
          `test_the_compiled_pass_makes_the_bits_of_torch`.
        - Memory: b - 1 numbers for each coordinate, held by `test_memory_is_one_buffer_for_each_band`.
        - Of these a step reads and writes about √(2b) on average: for 8 bands 5.7, for 64 bands 13.5.
          Held by `test_what_a_step_reads_and_writes`.

    Raises:
        ConfigurationError: a number is out of range.

    Example:
        >>> import torch
        >>> from dptorch.clipping.sums import ClippedSum
        >>> from dptorch.randomness import RootKey
        >>> noise = BandedNoise(1.0, [1.0, 0.5], steps=2)
        >>> key, zeros = RootKey.from_seed(0), lambda: {"weight": torch.zeros(1000)}
        >>> one, two = (noise.privatize(ClippedSum(zeros(), 1.0), key, t).values for t in (0, 1))
        >>> bool(torch.corrcoef(torch.stack([one["weight"], two["weight"]]))[0, 1] < -0.3)
        True
    """

    def __init__(
        self,
        noise_multiplier: float,
        coefficients: Sequence[float],
        steps: int,
        *,
        secure_rng: bool = False,
    ) -> None:
        columns = column_norms(coefficients, steps)  # checks them
        c = np.asarray(coefficients, np.float64)[:steps]
        self._coefficients = tuple(float(value) for value in c / c[0])
        self._together = steps_together(len(self._coefficients) - 1)
        # Row t of C⁻¹ is its first column backwards: the variance of step t adds up squares to t.
        stddevs = columns * np.sqrt(np.cumsum(inverse(c / c[0], steps) ** 2))
        super().__init__(noise_multiplier, steps, stddevs, columns, secure_rng=secure_rng)

    @property
    def bands(self) -> int:
        """How many steps' sums the noise of one hides."""
        return len(self._coefficients)

    @property
    def rows(self) -> int:
        """How many numbers are kept of each coordinate."""
        return self.bands - 1

    def taps(self, step: int) -> Taps:
        """Row t mod (b - 1) is that of step t.

        The first of the steps that belong together reads all rows, for the others too: it leaves the
        sum of what step t is to take back in the row that is to be that of t, which none of them needs
        otherwise. They read that sum, and the rows that have come since.
        """
        own, rows = step % self._together, self.rows
        order = tuple((step + i) % rows for i in range(rows))  # from the oldest step on
        if own:
            since = order[rows - own :]
            return Taps((order[0], *since), ((-1.0, *self._coefficients[own:0:-1]),))
        sums = tuple(
            tuple(self._coefficients[rows + k - i] if i >= k else 0.0 for i in range(rows))
            for k in range(self._together)
        )
        return Taps(order, sums)

    def __repr__(self) -> str:
        return f"BandedNoise(noise_multiplier={self.noise_multiplier}, bands={self.bands})"


def steps_together(rows: int) -> int:
    """How many steps share one reading of all rows, so that a step reads and writes least of them.

    Example:
        >>> steps_together(1), steps_together(7), steps_together(63)
        (1, 3, 11)
    """

    def moved(steps: int) -> float:
        later = sum(own + 2 for own in range(1, steps))
        return (rows + steps + later) / steps

    return min(range(1, max(1, rows) + 1), key=moved)
