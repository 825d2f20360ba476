"""The noisy gradient: a clipped sum with noise, and the only gradient that an optimizer sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["NoisyGradient"]


@dataclass(frozen=True)
class NoisyGradient:
    """A clipped sum with noise added, divided by a public number: safe to release at the cost the
    accountant was told of.

    Attributes:
        values: parameter name -> tensor of the parameter's shape.
        stddev: parameter name -> standard deviation of the noise in each of its coordinates.
        max_norm: the clipping bound of the sum under the noise, divided like it.
    """

    values: Mapping[str, Tensor]
    stddev: Mapping[str, float]
    max_norm: float
