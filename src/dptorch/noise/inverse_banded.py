"""Gaussian noise that is correlated over steps by a matrix whose inverse is banded.

Noise C⁻¹z with C⁻¹[t, s] = u[t - s], and u of p numbers: of step t it is

    σ · scale · (z_t + u_1 z_{t-1} + ... + u_{p-1} z_{t-p+1})

Since z is read by position, that of earlier steps is read again where it is needed, and nothing of the
model's size is kept. (Square roots: Kalinin et al. 2025, arXiv:2505.12128; p = 2: arXiv:2601.22334.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dptorch.clipping.sums import ClippedSum
from dptorch.noise.gaussian import Draw, divided
from dptorch.noise.noisy_gradient import NoisyGradient
from dptorch.noise.released import CorrelatedNoise
from dptorch.noise.spans import Offsets
from dptorch.randomness import RootKey

__all__ = ["InverseBandedNoise"]


class InverseBandedNoise(CorrelatedNoise):
    """Adds to a clipped sum noise of its step and of the p - 1 steps before it.

    Args:
        noise_multiplier: standard deviation of z per unit of the sum's scale.
        coefficients: u_0 > 0, u_1, ..., u_{p-1}, taken over the first. One alone is `GaussianNoise`.
        steps: number of steps of the run.
        secure_rng: as of `GaussianNoise`.

    Guarantees:
        - The noise of a run is C⁻¹z, z white. Held by
          `test_the_noise_of_a_run_is_that_of_the_dense_inverse`.
        - z is a function of (key, step, context of the step, position) alone. Held by
          `test_shards_and_restarts_give_the_noise_of_the_whole`.
        - Nothing of the sum's size is kept. Held by `test_no_memory_is_kept`.

    Example:
        >>> noise = InverseBandedNoise(1.0, [1.0, -0.5], steps=2)
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
        super().__init__(noise_multiplier, steps, secure_rng=secure_rng)
        u = np.asarray(coefficients, np.float64)
        self._coefficients = [float(value) for value in u / u[0]]

    def privatize(
        self,
        clipped: ClippedSum,
        key: RootKey,
        step: int,
        *,
        context: int = 0,
        offsets: Offsets | None = None,
        divisor: float = 1.0,
    ) -> NoisyGradient:
        """Add the noise of `step` to the sum, and divide; arguments as of `GaussianNoise.privatize`.

        Raises:
            as `BandedNoise.privatize`.
        """
        stddevs, spans = self._gaussian.prepared(clipped, key, offsets, divisor)
        self._released.check(step)
        self._released.check_places(spans)
        contexts = [context, *(self._released.context(step - j) for j in range(1, self.bands))]
        draws = [
            Draw(step - j, of_step, u)
            for j, (of_step, u) in enumerate(zip(contexts, self._coefficients, strict=True))
            # A step that failed released no noise, so there is none to take back.
            if of_step is not None and u
        ]
        with torch.no_grad():
            self._gaussian.add(spans, key, draws[::-1], divisor)
        # Not before: where drawing fails, later steps may not take back what was never added.
        self._released.record(step, context)
        size = math.sqrt(sum(draw.factor**2 for draw in draws))
        return divided(
            clipped, clipped.values, {name: size * s for name, s in stddevs.items()}, divisor
        )

    @property
    def bands(self) -> int:
        """Of how many steps z is in the noise of one."""
        return len(self._coefficients)

    def __repr__(self) -> str:
        return f"InverseBandedNoise(noise_multiplier={self.noise_multiplier}, bands={self.bands})"
