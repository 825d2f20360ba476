"""Noise for clipped sums: the step after which a gradient may leave."""

from dptorch.noise.gaussian import GaussianNoise

__all__ = ["GaussianNoise"]
