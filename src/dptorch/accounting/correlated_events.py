"""Events of runs whose noise is correlated over steps: C⁻¹z, z white."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dptorch.accounting.arguments import noise_of, number, positive_int, rate_of
from dptorch.accounting.events import Event
from dptorch.errors import ConfigurationError

__all__ = ["CorrelatedGaussian", "CyclicGaussian"]


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
