"""Which examples enter which step, and how they reach the training loop."""

from dptorch.sampling.cyclic import CyclicPoissonSampler, most_bands
from dptorch.sampling.epochs import RandomAllocationSampler, SequentialSampler, ShuffledSampler
from dptorch.sampling.fixed_size import FixedSizeSampler
from dptorch.sampling.loader import PrivateLoader, dataset_size
from dptorch.sampling.parts import PhysicalBatch
from dptorch.sampling.poisson import PoissonSampler
from dptorch.sampling.sampler import Sampler
from dptorch.sampling.scheme import Scheme, Terms
from dptorch.sampling.schemes import NOT_COVERED, SCHEMES, get_scheme
from dptorch.sampling.truncated import TruncatedPoissonSampler
from dptorch.sampling.users import Users, UserSampler

__all__ = [
    "NOT_COVERED",
    "SCHEMES",
    "CyclicPoissonSampler",
    "FixedSizeSampler",
    "PhysicalBatch",
    "PoissonSampler",
    "PrivateLoader",
    "RandomAllocationSampler",
    "Sampler",
    "Scheme",
    "SequentialSampler",
    "ShuffledSampler",
    "Terms",
    "TruncatedPoissonSampler",
    "UserSampler",
    "Users",
    "dataset_size",
    "get_scheme",
    "most_bands",
]
