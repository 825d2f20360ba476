"""Noise for clipped sums: the step after which a gradient may leave."""

from typing import Final

from dptorch.noise.discrete import DiscreteGaussianNoise
from dptorch.noise.gaussian import GaussianNoise

__all__ = ["MECHANISMS", "DiscreteGaussianNoise", "GaussianNoise"]

MECHANISMS: Final[dict[str, type[GaussianNoise] | type[DiscreteGaussianNoise]]] = {
    "gaussian": GaussianNoise,
    "discrete_gaussian": DiscreteGaussianNoise,
}
