"""Clipped sums: the type that clipping returns and that noise is added to.

An unclipped sum cannot be noised, and what is not noised (`dptorch.noise.noisy_gradient`) cannot be
stepped with: each stage accepts only the type that the stage before it returns. The types carry the
bound that the next stage relies on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

__all__ = ["ClippedSum", "RoundedSum"]


@dataclass(frozen=True)
class ClippedSum:
    """A sum over examples in which every example's contribution has a bounded L2 norm.

    Attributes:
        values: parameter name -> float32 or float64 tensor of the parameter's shape.
        max_norm: bound on the joint L2 norm, over all tensors, of one example's contribution.
        scales: parameter name -> the scale of its noise, where parameters differ in it (groups with
            bounds of their own): an example's contribution g must satisfy
            ``sum_n |g_n|**2 / scales[n]**2 <= 1``. Noise of standard deviation
            ``noise_multiplier * scales[n]`` then costs what the Gaussian mechanism of that noise
            multiplier costs: dividing by the scales turns it into noise of one standard deviation
            on a sum of sensitivity 1. None: `max_norm` for every parameter.
    """

    values: Mapping[str, Tensor]
    max_norm: float
    scales: Mapping[str, float] | None = None

    def scale(self, name: str) -> float:
        """Standard deviation of the noise of parameter `name` per unit of noise multiplier."""
        return float(self.max_norm if self.scales is None else self.scales[name])


@dataclass(frozen=True)
class RoundedSum(ClippedSum):
    """A clipped sum of integer vectors, for discrete noise; made by `dptorch.clipping.rounding`.

    One unit of parameter n stands for ``scale(n) / UNITS``. In units, one example's contribution is an
    integer vector, over all parameters together, of norm at most UNITS: exactly, no rounding apart.

    Attributes:
        values: parameter name -> int64 tensor of the parameter's shape.
    """

    UNITS: ClassVar[int] = 2**24
