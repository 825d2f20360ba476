"""The typed way of a private value: clipped sum -> noisy gradient -> optimizer.

Each stage accepts only the type the stage before it returns, so an unclipped sum cannot be noised
and an un-noised gradient cannot be stepped. The types carry the bound that the next stage relies on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["ClippedSum", "NoisyGradient"]


@dataclass(frozen=True)
class ClippedSum:
    """A sum over examples in which every example's contribution has a bounded L2 norm.

    Attributes:
        values: parameter name -> float32 or float64 tensor of the parameter's shape.
        max_norm: bound on the joint L2 norm, over all tensors, of one example's contribution.
    """

    values: Mapping[str, Tensor]
    max_norm: float


@dataclass(frozen=True)
class NoisyGradient:
    """A clipped sum with noise added: safe to release at the cost the accountant was told of.

    Attributes:
        values: parameter name -> tensor of the parameter's shape.
        stddev: standard deviation of the noise in each coordinate.
        max_norm: the clipping bound of the sum under the noise.
    """

    values: Mapping[str, Tensor]
    stddev: float
    max_norm: float
