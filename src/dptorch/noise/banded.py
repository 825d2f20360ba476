"""Gaussian noise that is correlated over steps: noise C⁻¹z of a banded Toeplitz matrix C.

A step's noise takes back a part of what earlier steps added, so that the parameters, which are sums
over steps, carry less of it (Choquette-Choo et al. 2023, arXiv:2306.08153). With coefficients
c_0 = 1, c_1, ..., c_{b-1} and white noise z_t,

    w_t = z_t - c_1 w_{t-1} - ... - c_{b-1} w_{t-b+1}        noise of step t: σ · scale · d_t · w_t

where d_t is the norm of column t of C: it makes all columns of the matrix that is used, C over d, of
norm 1, so that σ means what it means for independent noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dptorch.accounting.toeplitz import column_norms, inverse
from dptorch.clipping.sums import ClippedSum
from dptorch.noise.gaussian import GaussianNoise, Span, divided
from dptorch.noise.noisy_gradient import NoisyGradient
from dptorch.noise.released import Released
from dptorch.randomness import RootKey

__all__ = ["BandedNoise"]

# Numbers that are worked on at once, so that they stay in the processor's cache.
_CHUNK: Final = 2**16


class BandedNoise:
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
          given the contexts of all steps before: restarts do not change it, and threads and shards by
          no more than a rounding.
          Held by `test_shards_and_restarts_give_the_noise_of_the_whole`.
        - Memory: b - 1 numbers for each coordinate, held by `test_memory_is_one_buffer_for_each_band`.

    Raises:
        ConfigurationError: a number is out of range.

    Example:
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
        self._gaussian = GaussianNoise(noise_multiplier, secure_rng=secure_rng)
        self._white = GaussianNoise(1.0, secure_rng=secure_rng)
        self._columns = column_norms(coefficients, steps)  # checks them
        c = np.asarray(coefficients, np.float64)[:steps]
        self._coefficients = [float(value) for value in c / c[0]]
        rows = np.sqrt(np.cumsum(inverse(c / c[0], steps) ** 2))
        self._stddev = self._columns * rows  # of each step's noise, for z of variance 1
        self._released = Released(steps)
        # parameter -> [b - 1, coordinates]; step t is row t mod (b - 1)
        self._buffers: dict[str, Tensor] = {}
        self._filled = 0

    @property
    def bands(self) -> int:
        """How many steps' sums the noise of one hides."""
        return len(self._coefficients)

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of z per unit of scale, for columns of norm 1."""
        return self._gaussian.noise_multiplier

    def privatize(
        self,
        clipped: ClippedSum,
        key: RootKey,
        step: int,
        *,
        context: int = 0,
        offsets: Mapping[str, int] | None = None,
        divisor: float = 1.0,
    ) -> NoisyGradient:
        """Add the noise of `step` to the sum, and divide; arguments as of `GaussianNoise.privatize`.

        Steps come in order. One that was left out, because it failed, has no noise that later steps
        take back.

        Raises:
            as `GaussianNoise.privatize`, and
            PrivacyError: the step was taken already, is past the run, or the run went on from a state
                that was made on another device.
        """
        stddevs, spans = self._gaussian.prepared(clipped, key, offsets, divisor)
        self._released.check(step)
        if self.bands == 1 or not self.noise_multiplier:
            self._released.record(step, context)
            return self._gaussian.privatize(
                clipped, key, step, context=context, offsets=offsets, divisor=divisor
            )
        with torch.no_grad():
            self._go_to(step, clipped.values, spans, key)
            self._draw(step, context, clipped.values, spans, key)
            for span, name in _named(spans, clipped.values):
                scale = span.stddev * float(self._columns[step])
                row = self._buffers[name][self._row(step)]
                for part in _parts(row.numel()):
                    released = span.flat[part].add_(row[part], alpha=scale)
                    if divisor != 1.0:
                        released.div_(divisor)
                span.write_back()
        self._released.record(step, context)
        self._filled = step + 1
        noise = {name: float(self._stddev[step]) * stddev for name, stddev in stddevs.items()}
        return divided(clipped, clipped.values, noise, divisor)

    # -- state -------------------------------------------------------------------------------------

    def state(self, steps_done: int) -> dict[str, Any]:
        """All that `restore` needs: what z was drawn for at each step. The buffers follow from it."""
        return self._released.state(steps_done)

    def restore(self, state: Mapping[str, Any] | None, steps_done: int) -> None:
        """Go on after `steps_done` steps; raises PrivacyError where the state is not theirs."""
        self._released.restore(state, steps_done)
        self._buffers, self._filled = {}, 0

    # -- the recursion -----------------------------------------------------------------------------

    def _row(self, step: int) -> int:
        return step % (self.bands - 1)

    def _go_to(
        self, step: int, values: Mapping[str, Tensor], spans: list[Span], key: RootKey
    ) -> None:
        """Bring the buffers to where `step` can be drawn: after a restart all earlier steps again."""
        self._released.check_places(spans)
        if not self._buffers:
            for span, name in _named(spans, values):
                self._buffers[name] = span.flat.new_zeros(self.bands - 1, span.flat.numel())
        while self._filled < step:
            at = self._filled
            context = self._released.context(at)
            if context is None:  # it failed: whatever it left in its row goes
                for buffer in self._buffers.values():
                    buffer[self._row(at)].zero_()
            else:
                self._draw(at, context, values, spans, key)
            self._filled += 1

    def _draw(
        self,
        step: int,
        context: int,
        values: Mapping[str, Tensor],
        spans: list[Span],
        key: RootKey,
    ) -> None:
        """Write w of `step` into its row, over that of `step` - b + 1, which it takes back last."""
        rows: list[Span] = []
        for span, name in _named(spans, values):
            buffer = self._buffers[name]
            row = buffer[self._row(step)]
            others = [(-self._coefficients[j], step - j) for j in range(1, self.bands - 1)]
            for part in _parts(row.numel()):
                mine = row[part].mul_(-self._coefficients[-1])
                for c, earlier in others:
                    mine.add_(buffer[self._row(earlier), part], alpha=c)
            rows.append(Span(span.start, row, row, 1.0))
        self._white.add(rows, key, (step, context), 1.0)

    def __repr__(self) -> str:
        return f"BandedNoise(noise_multiplier={self.noise_multiplier}, bands={self.bands})"


def _named(spans: list[Span], values: Mapping[str, Tensor]) -> list[tuple[Span, str]]:
    names = {id(value): name for name, value in values.items()}
    return [(span, names[id(span.owner)]) for span in spans]


def _parts(count: int) -> Iterator[slice]:
    return (slice(at, at + _CHUNK) for at in range(0, count, _CHUNK))
