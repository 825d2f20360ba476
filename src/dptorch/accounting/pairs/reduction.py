"""Reduce a history of events to the dominating pairs that accountants compose.

One case per event class; a history's cost is the largest over its directions, each composed alone.

| event | add/remove, zero-out | replace-one |
|---|---|---|
| SampledGaussian, CyclicGaussian | `remove` and `add` | `replace` |
| TruncatedPoissonGaussian | `truncated`, or as SampledGaussian and a chance of overflow | likewise |
| SampledDiscreteGaussian | Rényi divergences only | the same, without sampling only |
| EpochwiseGaussian | a Gaussian | a Gaussian, sensitivity doubled |
| CorrelatedGaussian, SeparatedGaussian, BufferedGaussian | the same | the same |
| RandomAllocationGaussian | `allocation` | refused |
| FixedSizeGaussian | zero-out: as replace-one; add/remove refused | `fixed_size` |
| PureRelease | `pure` | `pure`, ε doubled |
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.correlated import (
    BufferedGaussian,
    CorrelatedGaussian,
    CyclicGaussian,
    SeparatedGaussian,
)
from dptorch.accounting.events import (
    EpochwiseGaussian,
    Event,
    FixedSizeGaussian,
    PureRelease,
    RandomAllocationGaussian,
    SampledDiscreteGaussian,
    SampledGaussian,
    TruncatedPoissonGaussian,
)
from dptorch.accounting.pairs.discrete_gaussian import DiscretePair
from dptorch.accounting.pairs.fixed_size import FixedSizePair, WithReplacementPair
from dptorch.accounting.pairs.pure import PurePair
from dptorch.accounting.pairs.random_allocation import AllocationPair
from dptorch.accounting.pairs.sampled import Direction, Pair, SampledPair
from dptorch.accounting.pairs.truncated import TruncatedPair
from dptorch.errors import PrivacyError

__all__ = ["ReducedHistory", "can_reduce", "directions", "pair_of", "reduce_history"]


# Less noise counts as none. One step in which a record takes part costs an ε above 5,000 with it, and
# the numbers that the accountants compute with overflow a little further down.
_LEAST_NOISE = 0.01
# Below this noise a lognormal sum spans too many orders of magnitude to be composed.
_LEAST_ALLOCATION_NOISE = 0.4

_PAIRS: dict[type[Event], type] = {
    SampledGaussian: SampledPair,
    SampledDiscreteGaussian: DiscretePair,
    TruncatedPoissonGaussian: SampledPair,
    EpochwiseGaussian: SampledPair,
    CyclicGaussian: SampledPair,
    CorrelatedGaussian: SampledPair,
    SeparatedGaussian: SampledPair,
    BufferedGaussian: SampledPair,
    FixedSizeGaussian: FixedSizePair,
    RandomAllocationGaussian: AllocationPair,
    PureRelease: PurePair,
}


@dataclass(frozen=True)
class ReducedHistory:
    """A history as accountants compose it.

    Attributes:
        compositions: the dominating pairs of each direction; empty where nothing was released.
        noiseless: whether some step released its sum with no noise to speak of: ε = inf, δ = 1.
        overflow: probability that what ran was not what `compositions` stand for; costs
            (1 + e^ε) · overflow of δ.
    """

    compositions: tuple[tuple[Pair, ...], ...]
    noiseless: bool = False
    overflow: float = 0.0


def directions(adjacency: Adjacency) -> tuple[Direction, ...]:
    """The directions to compose, each alone; the cost is the largest over them.

    Example:
        >>> directions(Adjacency.ADD_REMOVE), directions(Adjacency.REPLACE_ONE)
        (('remove', 'add'), ('replace',))
    """
    return ("replace",) if adjacency is Adjacency.REPLACE_ONE else ("remove", "add")


def reduce_history(
    history: Iterable[Event], adjacency: Adjacency, pairs: Collection[type] = ()
) -> ReducedHistory:
    """Reduce `history`, equal pairs added up and sorted, so that equal costs look equal.

    Args:
        history: what ran.
        adjacency: the neighbouring relation.
        pairs: classes that the accountant composes besides `SampledPair`. Without `TruncatedPair`,
            truncated sampling becomes Poisson sampling and an overflow.

    Raises:
        PrivacyError: an event that no theorem here covers under `adjacency`.

    Example:
        >>> step = SampledGaussian(2.0, 0.1, 5)
        >>> found = reduce_history([step, EpochwiseGaussian(1.0, 10, 30), step], Adjacency.ADD_REMOVE)
        >>> [(pair.sample_rate, pair.steps) for pair in found.compositions[0]]
        [(1.0, 3), (0.1, 10)]
    """
    events = [event for event in history if event.steps]
    if any(getattr(event, "noise_multiplier", math.inf) < _LEAST_NOISE for event in events):
        return ReducedHistory((), noiseless=True)
    compositions = []
    for direction in directions(adjacency) if events else ():
        steps: dict[Pair, int] = {}
        for event in events:
            if isinstance(event, TruncatedPoissonGaussian) and TruncatedPair in pairs:
                pair = truncated_pair(event, direction)
            else:
                pair = pair_of(event, direction, adjacency)
            one = replace(pair, steps=1)  # type: ignore[type-var]
            steps[one] = steps.get(one, 0) + pair.steps
        grouped = (replace(one, steps=n) for one, n in steps.items())  # type: ignore[type-var]
        compositions.append(tuple(sorted(grouped, key=repr)))
    overflow = 0.0
    if TruncatedPair not in pairs:
        overflow = sum(e.overflow for e in events if isinstance(e, TruncatedPoissonGaussian))
    return ReducedHistory(tuple(compositions), overflow=overflow)


def truncated_pair(event: TruncatedPoissonGaussian, direction: Direction) -> Pair:
    """Return the pair of `event`, whose batches may be cut."""
    noise, rate, cut = event.noise_multiplier, event.sample_rate, event.cut_probability
    if cut == 0:
        return SampledPair(direction, noise, rate, event.steps)
    return TruncatedPair(direction, noise, rate, cut, event.steps)


def can_reduce(event: Event, pairs: tuple[type, ...]) -> bool:
    """Whether `event` reduces to one of the classes `pairs`, under some adjacency.

    Example:
        >>> can_reduce(EpochwiseGaussian(1.0, 10, 30), (SampledPair,))
        True
    """
    if isinstance(event, FixedSizeGaussian) and event.replacement:
        return WithReplacementPair in pairs
    return _PAIRS.get(type(event)) in pairs


def pair_of(event: Event, direction: Direction, adjacency: Adjacency) -> Pair:
    """The dominating pair of `event` (with noise) in one direction of `adjacency`.

    Raises:
        PrivacyError: there is none here.
    """
    match event:
        case SampledGaussian() | TruncatedPoissonGaussian():
            return SampledPair(direction, event.noise_multiplier, event.sample_rate, event.steps)
        case SampledDiscreteGaussian() if direction != "replace" or event.sample_rate == 1:
            # Known by its divergences alone: accountants that need more do not list it.
            noise, rate = event.noise_multiplier, event.sample_rate
            return DiscretePair(direction, noise, rate, event.steps)  # type: ignore[return-value]
        case CyclicGaussian():
            return SampledPair(direction, event.noise_multiplier, event.sample_rate, event.turns)
        case EpochwiseGaussian():
            return SampledPair(direction, event.noise_multiplier, 1.0, event.epochs)
        case PureRelease():
            # Known by its divergences alone: accountants that need more do not list it.
            twice = 2 if direction == "replace" else 1  # one record out, another in
            return PurePair(twice * event.epsilon, event.steps)  # type: ignore[return-value]
        case CorrelatedGaussian():
            noise = event.noise_multiplier / event.sensitivity
            return SampledPair(direction, noise, 1.0, event.steps)
        case SeparatedGaussian() | BufferedGaussian():
            noise = event.noise_multiplier / event.sensitivity
            return SampledPair(direction, noise, 1.0, 1)
        case RandomAllocationGaussian() if direction != "replace":
            block = event.steps_per_epoch // event.selections
            releases = event.epochs * event.selections
            if event.noise_multiplier < _LEAST_ALLOCATION_NOISE:
                # Knowing the step only adds: H is jointly convex in the position.
                return SampledPair(direction, event.noise_multiplier, 1.0, releases)
            return AllocationPair(direction, event.noise_multiplier, block, releases)
        case RandomAllocationGaussian():
            raise PrivacyError(
                f"the event {event.kind!r} is not covered under replace-one adjacency: no bound is "
                "known here. State adjacency='zero-out' or 'add-remove', or sample by Poisson."
            )
        case FixedSizeGaussian() if adjacency is not Adjacency.ADD_REMOVE:
            sizes = (event.batch_size, event.sample_size)
            if event.replacement:
                return WithReplacementPair(event.noise_multiplier, *sizes, event.steps)
            return FixedSizePair(event.noise_multiplier, sizes[0] / sizes[1], event.steps)
        case FixedSizeGaussian():
            raise PrivacyError(
                f"the event {event.kind!r} is not covered under add-remove adjacency: its sampling "
                "rate depends on the number of records, which add-remove protects. State "
                "adjacency='zero-out' or 'replace-one', or sample by Poisson."
            )
    raise PrivacyError(
        f"the event {event.kind!r} is not covered: no dominating pair is known for it. Use a "
        "mechanism that is covered (Poisson sampling), or account for it without amplification "
        "(sample_rate=1)."
    )
