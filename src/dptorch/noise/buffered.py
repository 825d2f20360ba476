"""Gaussian noise that is correlated over all steps of a long run by a few buffers of the model.

It is C⁻¹z: with ω and θ of C (`dptorch.accounting.buffered`) and white noise z_t

    w_t = z_t - Σ ω_i r_i        noise of step t: σ · scale · w_t        r_i becomes θ_i r_i + w_t

where r_i starts at 0 (Dvijotham et al. 2024, arXiv:2404.16706).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dptorch.accounting.buffered import Buffers
from dptorch.noise.recursive import RecursiveNoise, Taps

__all__ = ["BufferedNoise"]


class BufferedNoise(RecursiveNoise):
    """Adds to a clipped sum noise that is correlated over all steps of a run.

    Args:
        noise_multiplier: standard deviation of z per unit of the sum's scale.
        coefficients: ω of each buffer, and then θ of each.
        steps: number of steps of the run.
        secure_rng: as of `GaussianNoise`.

    Guarantees:
        - The noise of a run is C⁻¹z, z white. Held by
          `test_buffered_noise_is_that_of_the_dense_matrix` and
          `test_covariance_of_released_buffered_noise`.
        - z is a function of (key, step, context of the step, position) alone, so that restarts,
          threads and shards do not change the noise. Held by
          `test_shards_and_restarts_give_the_buffered_noise_of_the_whole`.
        - Memory: one number for each buffer and coordinate, whatever the steps are. Held by
          `test_memory_is_the_buffers`.

    Raises:
        ConfigurationError: a number is out of range.

    Example:
        >>> import torch
        >>> from dptorch.clipping.sums import ClippedSum
        >>> from dptorch.randomness import RootKey
        >>> noise = BufferedNoise(1.0, [0.5, 0.9], steps=2)
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
        buffers = Buffers.of(tuple(coefficients))
        # Row t of C⁻¹ is its first column backwards: the variance of step t adds up squares to t.
        stddevs = np.sqrt(np.cumsum(buffers.inverse(steps) ** 2))
        super().__init__(noise_multiplier, steps, stddevs, np.ones(steps), secure_rng=secure_rng)
        self._taps = Taps(tuple(range(len(buffers.scales))), (buffers.scales,), buffers.decays)

    @property
    def rows(self) -> int:
        """How many numbers are kept of each coordinate."""
        return len(self._taps.rows)

    def taps(self, step: int) -> Taps:
        """The same in each step."""
        return self._taps

    def __repr__(self) -> str:
        return f"BufferedNoise(noise_multiplier={self.noise_multiplier}, buffers={self.rows})"
