"""Noise mechanisms: they turn a clipped sum into a gradient that may be released."""

from typing import Final, TypeAlias

from dptorch.errors import one_of
from dptorch.noise.banded import BandedNoise
from dptorch.noise.discrete import DiscreteGaussianNoise
from dptorch.noise.gaussian import GaussianNoise

__all__ = [
    "MECHANISMS",
    "BandedNoise",
    "DiscreteGaussianNoise",
    "GaussianNoise",
    "Mechanism",
    "get_mechanism",
]

#: What turns a clipped sum into a noisy gradient.
Mechanism: TypeAlias = type[GaussianNoise] | type[DiscreteGaussianNoise] | type[BandedNoise]

#: Mechanisms by the name that a plan gives them.
MECHANISMS: Final[dict[str, Mechanism]] = {
    "gaussian": GaussianNoise,
    "discrete_gaussian": DiscreteGaussianNoise,
    "banded": BandedNoise,
}


def get_mechanism(name: str) -> Mechanism:
    """Return the noise mechanism called `name`.

    Raises:
        ConfigurationError: no mechanism has that name; all names are listed.

    Example:
        >>> get_mechanism("gaussian").__name__
        'GaussianNoise'
    """
    return MECHANISMS[one_of("mechanism", name, MECHANISMS)]
