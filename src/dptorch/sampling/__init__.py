"""Which examples enter which step, and how they reach the training loop."""

from dptorch.sampling.loader import PhysicalBatch, PrivateLoader
from dptorch.sampling.poisson import PoissonSampler
from dptorch.sampling.sampler import Sampler

__all__ = ["PhysicalBatch", "PoissonSampler", "PrivateLoader", "Sampler"]
