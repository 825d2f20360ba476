"""Which dominating pairs each accountant can compose, by the accountant's name."""

from __future__ import annotations

from collections.abc import Mapping

from dptorch.accounting.events import Event
from dptorch.accounting.pairs.discrete_gaussian import DiscretePair
from dptorch.accounting.pairs.fixed_size import FixedSizePair, WithReplacementPair
from dptorch.accounting.pairs.pure import PurePair
from dptorch.accounting.pairs.random_allocation import AllocationPair
from dptorch.accounting.pairs.reduction import can_reduce
from dptorch.accounting.pairs.sampled import SampledPair
from dptorch.accounting.pairs.truncated import TruncatedPair

__all__ = ["PAIRS", "accountants_covering"]

#: In the order in which accountants are listed to users.
PAIRS: Mapping[str, tuple[type, ...]] = {
    "exact": (SampledPair, TruncatedPair, FixedSizePair),
    "pld": (SampledPair, TruncatedPair, FixedSizePair, WithReplacementPair, AllocationPair),
    "rdp": (SampledPair, FixedSizePair, DiscretePair, PurePair),
    "prv": (SampledPair,),
    "gdp": (SampledPair,),
}


def accountants_covering(event: Event) -> list[str]:
    """Return the names of the accountants that know what `event` costs.

    Example:
        >>> from dptorch.accounting import SampledGaussian
        >>> accountants_covering(SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=10))
        ['exact', 'pld', 'rdp', 'prv', 'gdp']
    """
    return [name for name, pairs in PAIRS.items() if can_reduce(event, pairs)]
