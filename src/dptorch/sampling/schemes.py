"""The sampling schemes by name."""

from __future__ import annotations

from typing import Final

from dptorch.errors import ConfigurationError, one_of
from dptorch.sampling.cyclic import CYCLIC_POISSON
from dptorch.sampling.epochs import RANDOM_ALLOCATION, SEQUENTIAL, SHUFFLED
from dptorch.sampling.fixed_size import FIXED_SIZE, FIXED_SIZE_WITH_REPLACEMENT
from dptorch.sampling.poisson import POISSON
from dptorch.sampling.scheme import Scheme
from dptorch.sampling.truncated import TRUNCATED_POISSON

__all__ = ["NOT_COVERED", "OWN_LOADER", "SCHEMES", "get_scheme"]

#: Stands in place of a scheme's name for steps whose batch the engine did not draw.
OWN_LOADER: Final = "the user's own loader"

#: Sampling schemes by name.
SCHEMES: Final[dict[str, Scheme]] = {
    each.name: each
    for each in (
        POISSON,
        CYCLIC_POISSON,
        TRUNCATED_POISSON,
        RANDOM_ALLOCATION,
        SHUFFLED,
        SEQUENTIAL,
        FIXED_SIZE,
        FIXED_SIZE_WITH_REPLACEMENT,
    )
}
#: What is said of a sampler that no theorem known here covers.
NOT_COVERED: Final = (
    "No accountant covers a sampler that is not among these. Either let the engine draw, with one of "
    "them; or take batches from a loader of your own, and the privacy statement then claims no "
    "amplification: it states the epsilon of steps in each of which any record may take part."
)


def get_scheme(name: str) -> Scheme:
    """Return the scheme called `name`.

    Raises:
        ConfigurationError: there is none; names the nearest, and the two honest choices.
    """
    try:
        return SCHEMES[one_of("sampling", name, SCHEMES)]
    except ConfigurationError as error:
        raise ConfigurationError(f"{error} {NOT_COVERED}") from None
