"""Runs whose noise is correlated over steps, C⁻¹z for white z: their events, any C's sensitivity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dptorch.accounting.arguments import noise_of, number, positive_int, rate_of
from dptorch.accounting.events import Event
from dptorch.accounting.toeplitz import column_norms, inverse, toeplitz_sensitivity
from dptorch.errors import ConfigurationError

if TYPE_CHECKING:
    from dptorch.accounting.buffered import Buffers

__all__ = [
    "BufferedGaussian",
    "CorrelatedGaussian",
    "CyclicGaussian",
    "SeparatedGaussian",
    "strategy_sensitivity",
]


@dataclass(frozen=True)
class CyclicGaussian(Event):
    """Poisson sampling from `bands` groups in turn, under noise C⁻¹z of a C with as many bands.

    Each record belongs to one group, and step t draws each record of group t mod `bands` with
    probability `sample_rate`. So a record's columns of C never overlap, and a run is as private as
    ceil(steps / bands) sampled Gaussian mechanisms (Choquette-Choo et al. 2023, arXiv:2306.08153,
    Theorem 4), whichever group it is in: the rows that hold one of its columns are, up to what earlier
    releases tell, a vector that is drawn or not, under white noise. Independent noise is one band.

    Attributes:
        noise_multiplier: standard deviation of z over C_clip and over the largest norm of a column.
        sample_rate: probability of drawing a record when it is its group's turn, in (0, 1].
        bands: number of groups.
        steps: steps taken; a part of a turn costs what the whole one does.

    Example:
        >>> CyclicGaussian(1.0, 0.08, bands=8, steps=100).turns
        13
    """

    noise_multiplier: float
    sample_rate: float
    bands: int
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", noise_of(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", rate_of(self.sample_rate))
        for name, least in (("bands", 1), ("steps", 0)):
            object.__setattr__(self, name, positive_int(name, getattr(self, name), least=least))

    @property
    def kind(self) -> str:
        return "cyclically Poisson-sampled Gaussian"

    @property
    def turns(self) -> int:
        """Number of turns, of each group once, that were begun."""
        return -(-self.steps // self.bands)


@dataclass(frozen=True)
class CorrelatedGaussian(Event):
    """Whole runs of a matrix mechanism: noise C⁻¹z, correlated over a run's steps, z white.

    With strategy matrix C, all of a run's releases are a function of Cx + z, a Gaussian mechanism
    whose sensitivity is C's over all ways a record may take part (Denisov et al. 2022,
    arXiv:2202.08312; banded C: Choquette-Choo et al. 2023, arXiv:2306.08153). No amplification by
    sampling is claimed.

    Attributes:
        noise_multiplier: standard deviation of z over C_clip, the bound on one contribution.
        sensitivity: the strategy's, in units of C_clip, under add/remove; `strategy_sensitivity`
            computes it.
        steps: number of whole runs, not of a run's steps: a run is one release.
    """

    noise_multiplier: float
    sensitivity: float
    steps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", noise_of(self.noise_multiplier))
        sensitivity = number("sensitivity", self.sensitivity)
        if not 0 < sensitivity < math.inf:
            raise ConfigurationError(
                f"sensitivity={self.sensitivity!r} must be finite and above 0."
            )
        object.__setattr__(self, "sensitivity", sensitivity)
        object.__setattr__(self, "steps", positive_int("steps", self.steps, least=0))

    @property
    def kind(self) -> str:
        return "Gaussian with correlated noise"


@dataclass(frozen=True)
class SeparatedGaussian(Event):
    """One run under noise C⁻¹z of a banded C⁻¹, in which a record takes part every `separation` steps.

    All of a run is Cx + z, a Gaussian mechanism with C's sensitivity over the steps in which one record
    can take part (adaptively: Denisov et al. 2022, arXiv:2202.08312; participations apart:
    Choquette-Choo et al. 2023, arXiv:2306.08153). No amplification by sampling is claimed.

    Attributes:
        noise_multiplier: standard deviation of z over C_clip.
        coefficients: of C⁻¹, the first 1.
        separation: fewest steps from one participation of a record to its next.
        steps: steps taken of the run.

    Example:
        >>> event = SeparatedGaussian(2.0, (1.0, -0.5), separation=10, steps=30)
        >>> round(event.sensitivity, 4)
        2.0013
    """

    noise_multiplier: float
    coefficients: tuple[float, ...]
    separation: int
    steps: int

    def __post_init__(self) -> None:
        _check_apart(self)
        column_norms(self.coefficients, 1)  # checks them

    @property
    def kind(self) -> str:
        return "Gaussian with correlated noise, on participations apart"

    def strategy(self, steps: int) -> NDArray[np.float64]:
        """The first column of C, [steps]."""
        return inverse(self.coefficients, steps)

    @property
    def sensitivity(self) -> float:
        """That of C over the steps taken, in units of C_clip."""
        return toeplitz_sensitivity(
            self.strategy(self.steps),
            steps=self.steps,
            # How often a record takes part is not promised: only the separation limits it.
            participations=self.steps,
            min_separation=self.separation,
        )


@dataclass(frozen=True)
class BufferedGaussian(Event):
    """One run under noise C⁻¹z of a buffered C, in which a record takes part every `separation` steps.

    As `SeparatedGaussian`: one Gaussian mechanism of C's sensitivity. C's coefficients do not increase,
    so that steps 0, b, 2b, ... are the worst (Kalinin and Lampert 2024, arXiv:2405.13763, Theorem 2).

    Attributes:
        noise_multiplier: standard deviation of z over C_clip.
        coefficients: of the buffers, as `Buffers.of` takes them.
        separation: fewest steps from one participation of a record to its next.
        steps: steps taken of the run.

    Example:
        >>> round(BufferedGaussian(2.0, (0.5, 0.5), separation=10, steps=30).sensitivity, 4)
        2.0013
    """

    noise_multiplier: float
    coefficients: tuple[float, ...]
    separation: int
    steps: int

    def __post_init__(self) -> None:
        _check_apart(self)
        _ = self._buffers  # checks them

    @property
    def kind(self) -> str:
        return "Gaussian with noise correlated by buffers, on participations apart"

    def strategy(self, steps: int) -> NDArray[np.float64]:
        """The first column of C, [steps]."""
        return self._buffers.strategy(steps)

    @property
    def sensitivity(self) -> float:
        """That of C over the steps taken, in units of C_clip."""
        from dptorch.accounting.buffered import sensitivity_of

        return sensitivity_of(self._buffers, self.steps, self.separation)

    @property
    def _buffers(self) -> Buffers:
        from dptorch.accounting.buffered import Buffers

        return Buffers.of(self.coefficients)


def strategy_sensitivity(strategy: ArrayLike, *, participations: int, min_separation: int) -> float:
    """The sensitivity of C x to one record's gradients, in units of the clipping bound.

    Args:
        strategy: C, [T, T] lower triangular; step t's noise is that of C⁻¹ z.
        participations: most steps that a record takes part in.
        min_separation: fewest steps from one participation to the next; 1 allows each step.

    Returns:
        For a C with at most `min_separation` bands (no column overlaps another that the same record
        takes part in) the exact value, the root of the largest sum of squared column norms over
        allowed steps (Choquette-Choo et al. 2023, arXiv:2306.08153, Theorem 2). Otherwise the
        triangle inequality's bound, the largest sum of norms.

    Raises:
        ConfigurationError: C is no finite lower triangular matrix, or a count is not positive.

    Example:
        >>> strategy_sensitivity(np.eye(10), participations=4, min_separation=2)
        2.0
    """
    matrix = np.asarray(strategy, float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ConfigurationError(
            f"strategy has the shape {matrix.shape}, expected a square matrix [T, T]."
        )
    if not np.isfinite(matrix).all() or np.triu(matrix, 1).any():
        raise ConfigurationError("strategy must be finite and lower triangular: noise is causal.")
    positive_int("participations", participations)
    positive_int("min_separation", min_separation)
    squares = (matrix**2).sum(axis=0)
    # Exactly 0, not nearly: columns that share a row are
    # not orthogonal, so their squares do not add up.
    apart = not np.tril(matrix, -min_separation).any()
    if apart:
        # Columns without a common row are orthogonal whichever way the gradients point.
        return math.sqrt(_largest_sum(squares, participations, min_separation))
    return _largest_sum(np.sqrt(squares), participations, min_separation)


def _largest_sum(values: Any, picks: int, separation: int) -> float:
    """The largest sum of at most `picks` of the values [T] >= 0, `separation` apart."""
    count = values.size
    # Not the largest first: it may keep out two others that are more together.
    best = np.zeros(count + 1)  # over the first i values
    for _ in range(min(picks, -(-count // separation))):
        following = np.zeros(count + 1)
        for i, value in enumerate(values, start=1):
            following[i] = max(following[i - 1], best[max(0, i - separation)] + value)
        best = following
    return float(best[-1])


def _check_apart(event: SeparatedGaussian | BufferedGaussian) -> None:
    """Check the fields that two events have, and give them their types."""
    object.__setattr__(event, "noise_multiplier", noise_of(event.noise_multiplier))
    object.__setattr__(event, "coefficients", tuple(float(u) for u in event.coefficients))
    for name, least in (("separation", 1), ("steps", 0)):
        object.__setattr__(event, name, positive_int(name, getattr(event, name), least=least))
