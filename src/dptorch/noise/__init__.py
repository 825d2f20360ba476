"""Noise mechanisms: they turn a clipped sum into a gradient that may be released."""

from typing import Final

from dptorch.errors import one_of
from dptorch.noise.discrete import DiscreteGaussianNoise
from dptorch.noise.gaussian import GaussianNoise

__all__ = ["MECHANISMS", "DiscreteGaussianNoise", "GaussianNoise", "get_mechanism"]

#: Mechanisms by the name that a plan gives them.
MECHANISMS: Final[dict[str, type[GaussianNoise] | type[DiscreteGaussianNoise]]] = {
    "gaussian": GaussianNoise,
    "discrete_gaussian": DiscreteGaussianNoise,
}


def get_mechanism(name: str) -> type[GaussianNoise] | type[DiscreteGaussianNoise]:
    """Return the noise mechanism called `name`.

    Raises:
        ConfigurationError: no mechanism has that name; all names are listed.

    Example:
        >>> get_mechanism("gaussian").__name__
        'GaussianNoise'
    """
    return MECHANISMS[one_of("mechanism", name, MECHANISMS)]
