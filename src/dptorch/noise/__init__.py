"""Noise mechanisms: they turn a clipped sum into a gradient that may be released."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from dptorch.errors import one_of
from dptorch.noise.gaussian import GaussianNoise

if TYPE_CHECKING:
    from dptorch.noise.banded import BandedNoise
    from dptorch.noise.buffered import BufferedNoise
    from dptorch.noise.discrete import DiscreteGaussianNoise
    from dptorch.noise.inverse_banded import InverseBandedNoise

__all__ = [
    "MECHANISMS",
    "BandedNoise",
    "BufferedNoise",
    "DiscreteGaussianNoise",
    "GaussianNoise",
    "InverseBandedNoise",
    "get_mechanism",
]

#: The class of each mechanism, by the name that a plan gives it. Few runs need more than one of them.
MECHANISMS: Final[dict[str, str]] = {
    "gaussian": "gaussian.GaussianNoise",
    "discrete_gaussian": "discrete.DiscreteGaussianNoise",
    "banded": "banded.BandedNoise",
    "inverse-banded": "inverse_banded.InverseBandedNoise",
    "buffered-toeplitz": "buffered.BufferedNoise",
}


def get_mechanism(name: str) -> type[Any]:
    """Return the noise mechanism called `name`, a class with the `privatize` of `GaussianNoise`.

    Raises:
        ConfigurationError: no mechanism has that name; all names are listed.

    Example:
        >>> get_mechanism("gaussian").__name__
        'GaussianNoise'
    """
    return _load(MECHANISMS[one_of("mechanism", name, MECHANISMS)])


def _load(where: str) -> type[Any]:
    module, _, name = where.partition(".")
    found: type[Any] = getattr(import_module(f"dptorch.noise.{module}"), name)
    return found


def __getattr__(name: str) -> Any:
    for where in MECHANISMS.values():
        if where.endswith(f".{name}"):
            return _load(where)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
