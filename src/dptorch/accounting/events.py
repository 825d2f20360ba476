"""Accounting events: what a run released, as accountants read it.

A *history* is a sequence of events; it may mix events freely (schedules of noise, of rate, of
mechanism), and its order does not change what it costs.

Every event is a frozen dataclass. Those of noise that is correlated over steps are in
`correlated`. What it costs is not its business: `reduction` says which
dominating pairs stand for it, and an accountant that does not know those refuses it by name, so
adding an event cannot silently change a number. `noise_multiplier` is the noise's standard
deviation over C = max_grad_norm, the bound on one record's contribution to one sum.

    SampledDiscreteGaussian   Poisson sampling, integer sums and integer noise
    SampledGaussian           Poisson sampling; sample_rate 1 is the plain Gaussian mechanism
    TruncatedPoissonGaussian  the same, but batches above a capacity lose records
    RandomAllocationGaussian  each record in a random step of each epoch
    FixedSizeGaussian         batches of one size, drawn afresh at each step
    EpochwiseGaussian         each record once an epoch, in any order: shuffled, sequential
    CyclicGaussian            Poisson sampling from groups that take turns; noise of bands, or white
    SeparatedGaussian         a run whose noise has a banded inverse, on participations apart
    BufferedGaussian          a run whose noise is correlated by buffers, on participations apart
    CorrelatedGaussian        a whole run with noise correlated over steps (DP-FTRL, banded matrices)
    PureRelease               anything that is ε-DP by itself: Laplace noise, report-noisy-max
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from dptorch.accounting.arguments import noise_of, number, positive, positive_int, rate_of
from dptorch.errors import ConfigurationError, one_of

__all__ = [
    "EpochwiseGaussian",
    "Event",
    "FixedSizeGaussian",
    "History",
    "PureRelease",
    "RandomAllocationGaussian",
    "SampledDiscreteGaussian",
    "SampledGaussian",
    "TruncatedPoissonGaussian",
    "merge",
]


class Event(ABC):
    """`steps` releases of one mechanism.

    A subclass is a frozen dataclass (accountants cache by it) with `steps` among its fields, names
    itself in `kind`, and gets a case in `dptorch.accounting.pairs.reduction`.

    Attributes:
        steps: how many times the mechanism ran.
    """

    steps: int
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    @abstractmethod
    def kind(self) -> str:
        """Name of the mechanism in words, for messages."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` restores the event exactly.

        Example:
            >>> event = SampledGaussian(1.0, 0.01, 1000)
            >>> Event.from_dict(event.to_dict()) == event
            True
        """
        return {"event": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Event:
        """Restore what `to_dict` gave.

        Raises:
            ConfigurationError: no event has that name, or its fields are others.
        """
        # Those of `correlated` are among them because the package imports that module.
        kinds = {kind.__name__: kind for kind in Event.__subclasses__()}
        kind = kinds[one_of("event", values.get("event"), kinds)]
        given = {name: value for name, value in values.items() if name != "event"}
        wanted = [field.name for field in fields(kind)]
        # No default stands in for a field that is missing:
        # an older version may have meant another value.
        if sorted(given) != sorted(wanted):
            raise ConfigurationError(
                f"a {kind.__name__} with the fields {sorted(given)} was written by another version "
                f"of dptorch: this one expects {wanted}."
            )
        return kind(**given)


#: What a run released: events, in any order.
History = Sequence[Event]


@dataclass(frozen=True)
class SampledGaussian(Event):
    """`steps` releases of a Gaussian-noised sum over a Poisson sample (a step of DP-SGD).

    Each step draws every record independently with probability `sample_rate`, sums their
    contributions (norm at most C) and adds N(0, (noise_multiplier · C)²) to every coordinate.

    Attributes:
        noise_multiplier: standard deviation of the noise over C; 0 means no noise (ε = inf).
        sample_rate: probability of drawing a record, in (0, 1]; 1 is the plain Gaussian mechanism.
        steps: number of releases, empty batches included; 0 costs nothing.

    Raises:
        ConfigurationError: a value out of range, NaN, or `steps` that is not a whole number.

    Example:
        >>> SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000).steps
        1000
        >>> SampledGaussian(noise_multiplier=1.0, sample_rate=0.0, steps=10)
        Traceback (most recent call last):
        ...
        dptorch.errors.ConfigurationError: sample_rate=0.0 must be in (0, 1]. A run that draws no \
record has no steps: pass steps=0, or the rate that the sampler really uses.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        # Plain numbers, not numpy's: equal events have to
        # look equal where they are sorted, cached, written.
        object.__setattr__(self, "noise_multiplier", noise_of(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", rate_of(self.sample_rate))
        object.__setattr__(self, "steps", positive_int("steps", self.steps, least=0))

    @property
    def kind(self) -> str:
        return "Poisson-sampled Gaussian"


@dataclass(frozen=True)
class SampledDiscreteGaussian(Event):
    """`steps` releases of an integer sum over a Poisson sample with discrete Gaussian noise.

    As `SampledGaussian`, but contributions are integer vectors of norm at most D and every coordinate
    gets a draw of N_Z(0, (noise_multiplier · D)²). What is known of its cost, and why:
    `dptorch.accounting.pairs.discrete_gaussian`.

    Attributes:
        noise_multiplier: scale of the noise over D; 0 means no noise (ε = inf).
        sample_rate: probability of drawing a record, in (0, 1].
        steps: number of releases, empty batches included.

    Raises:
        ConfigurationError: a value out of range, NaN, or `steps` that is not a whole number.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", noise_of(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", rate_of(self.sample_rate))
        object.__setattr__(self, "steps", positive_int("steps", self.steps, least=0))

    @property
    def kind(self) -> str:
        return "Poisson-sampled discrete Gaussian"


@dataclass(frozen=True)
class TruncatedPoissonGaussian(Event):
    """Poisson sampling whose batches are cut to `capacity` records, for fixed physical shapes.

    Accountants "exact" and "pld" compose a dominating pair of it
    (`dptorch.accounting.pairs.truncated`). The others take it for plain Poisson sampling, which the run
    is with probability at least 1 - `overflow`, so that

        δ(ε) <= δ_Poisson(ε) + (1 + e^ε) · overflow

    (Chua et al. 2024, arXiv:2411.04205, Theorem 3.3; by total variation, so whichever records are
    cut). That is infinite in ε where the capacity is often exceeded.

    Attributes:
        noise_multiplier, sample_rate, steps: as of `SampledGaussian`.
        sample_size: number of records, or any public upper bound on it for both neighbours.
        capacity: largest batch that is not cut; `safe_capacity` finds one that costs next to nothing.

    Raises:
        ConfigurationError: a value out of range.

    Example:
        >>> event = TruncatedPoissonGaussian(1.0, 0.01, 1000, sample_size=60_000, capacity=800)
        >>> f"{event.overflow:.1e}"
        '2.4e-12'
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    sample_size: int
    capacity: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", noise_of(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", rate_of(self.sample_rate))
        for name, least in (("steps", 0), ("sample_size", 1), ("capacity", 1)):
            object.__setattr__(self, name, positive_int(name, getattr(self, name), least=least))

    @property
    def kind(self) -> str:
        return "truncated Poisson-sampled Gaussian"

    @property
    def overflow(self) -> float:
        """A bound on the probability that any step's sample exceeds the capacity."""
        # A union bound. The tail grows with the number of
        # records, so an upper bound of that is enough.
        return min(1.0, self.steps * _binomial_tail(self))

    @property
    def cut_probability(self) -> float:
        """A bound on the probability that the records besides one fill a step's batch."""
        from scipy.stats import binom

        return float(binom.sf(self.capacity - 1, self.sample_size - 1, self.sample_rate))

    @staticmethod
    def safe_capacity(
        sample_rate: float, sample_size: int, steps: int, *, overflow: float = 1e-12
    ) -> int:
        """The smallest capacity >= B + 8 sqrt(B), B the expected batch, with so little `overflow`.

        Example:
            >>> TruncatedPoissonGaussian.safe_capacity(0.01, 60_000, 1000)
            803
            >>> TruncatedPoissonGaussian.safe_capacity(1e-4, 100_000, 10_000, overflow=1e-15)
            50
        """
        expected = sample_rate * sample_size
        low = math.ceil(expected + 8 * math.sqrt(expected)) - 1

        def overflows(capacity: int) -> bool:
            event = TruncatedPoissonGaussian(1.0, sample_rate, steps, sample_size, capacity)
            return event.overflow > overflow

        if not overflows(low + 1):
            return min(low + 1, sample_size)
        # From here on `low` overflows and `high` does not: a batch of all records is never cut.
        high = sample_size
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if overflows(middle) else (low, middle)
        return high


@dataclass(frozen=True)
class RandomAllocationGaussian(Event):
    """Each record takes part in `selections` random steps of each epoch ("balls in bins").

    The steps are drawn uniformly and without replacement, for each record by itself, afresh every
    epoch (Chua et al. 2024, arXiv:2412.16802; Feldman and Shenfeld 2025, arXiv:2502.08202). Covered
    under add/remove and zero-out.

    Attributes:
        noise_multiplier: standard deviation of the noise over C.
        steps_per_epoch: steps that a record is allocated to.
        steps: steps taken; a part of an epoch costs what the whole one does.
        selections: steps of each epoch in which a record takes part, at most steps_per_epoch.

    Example:
        >>> RandomAllocationGaussian(1.0, steps_per_epoch=100, steps=950).epochs
        10
    """

    noise_multiplier: float
    steps_per_epoch: int
    steps: int
    selections: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", noise_of(self.noise_multiplier))
        for name, least in (("steps_per_epoch", 1), ("steps", 0), ("selections", 1)):
            object.__setattr__(self, name, positive_int(name, getattr(self, name), least=least))
        if self.selections > self.steps_per_epoch:
            raise ConfigurationError(
                f"selections={self.selections} exceeds steps_per_epoch={self.steps_per_epoch}: a "
                "record can take part in each step at most once."
            )

    @property
    def kind(self) -> str:
        return "randomly allocated Gaussian"

    @property
    def epochs(self) -> int:
        """Number of epochs that were begun."""
        return -(-self.steps // self.steps_per_epoch)


@dataclass(frozen=True)
class FixedSizeGaussian(Event):
    """Batches of exactly `batch_size` out of `sample_size` records, drawn afresh at each step.

    Covered under replace-one, and under zero-out at the same cost (a record that contributes
    nothing is a record). Under add/remove it is refused: the rate would tell the number of records.

    Attributes:
        noise_multiplier: standard deviation of the noise over C. A replaced record moves a sum by 2C.
        batch_size: records a step draws.
        sample_size: number of records, public.
        steps: number of releases.
        replacement: whether a step may draw a record more than once; each time counts (C each).

    Example:
        >>> FixedSizeGaussian(1.0, batch_size=100, sample_size=10, steps=5)
        Traceback (most recent call last):
        ...
        dptorch.errors.ConfigurationError: batch_size=100 exceeds sample_size=10, which only \
sampling with replacement can do.
    """

    noise_multiplier: float
    batch_size: int
    sample_size: int
    steps: int
    replacement: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", noise_of(self.noise_multiplier))
        for name, least in (("batch_size", 1), ("sample_size", 1), ("steps", 0)):
            object.__setattr__(self, name, positive_int(name, getattr(self, name), least=least))
        if self.batch_size > self.sample_size and not self.replacement:
            raise ConfigurationError(
                f"batch_size={self.batch_size} exceeds sample_size={self.sample_size}, which only "
                "sampling with replacement can do."
            )

    @property
    def kind(self) -> str:
        return f"fixed-size Gaussian {'with' if self.replacement else 'without'} replacement"


@dataclass(frozen=True)
class EpochwiseGaussian(Event):
    """Each record at most once an epoch, in a step that no other record's value moves.

    Shuffled and sequential loaders, and any other order that does not look at the data. An epoch
    releases each record once, so it is one Gaussian mechanism: no amplification is claimed, for
    shuffling none of this size is known.

    Attributes:
        noise_multiplier: standard deviation of the noise over C.
        steps_per_epoch: steps of one pass over the data.
        steps: steps taken; a part of an epoch costs what the whole one does.

    Example:
        >>> EpochwiseGaussian(1.0, steps_per_epoch=100, steps=201).epochs
        3
    """

    noise_multiplier: float
    steps_per_epoch: int
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", noise_of(self.noise_multiplier))
        for name, least in (("steps_per_epoch", 1), ("steps", 0)):
            object.__setattr__(self, name, positive_int(name, getattr(self, name), least=least))

    @property
    def kind(self) -> str:
        return "Gaussian once an epoch"

    @property
    def epochs(self) -> int:
        """Number of epochs that were begun."""
        return -(-self.steps // self.steps_per_epoch)

    def if_poisson(self) -> SampledGaussian:
        """The event that is often claimed for such a loader; for comparison, not for a statement.

        Example:
            >>> EpochwiseGaussian(1.0, steps_per_epoch=100, steps=250).if_poisson()
            SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=250)
        """
        return SampledGaussian(self.noise_multiplier, 1 / self.steps_per_epoch, self.steps)


@dataclass(frozen=True)
class PureRelease(Event):
    """`steps` releases, each (epsilon, 0)-differentially private by itself.

    The answers of `dptorch.prediction` under Laplace noise and report-noisy-max. Randomised response
    dominates every such mechanism (Kairouz, Oh, Viswanath 2015, arXiv:1311.0776, Theorem 3.4), so
    nothing more about it is needed. `epsilon` is that under add/remove and zero-out; replacing a record
    costs twice that.

    Attributes:
        epsilon: of one release, above 0.
        steps: number of releases.

    Raises:
        ConfigurationError: `epsilon` is not a finite number above 0.
    """

    epsilon: float
    steps: int

    def __post_init__(self) -> None:
        epsilon = number("epsilon", self.epsilon)
        positive("epsilon", epsilon)
        object.__setattr__(self, "epsilon", epsilon)
        object.__setattr__(self, "steps", positive_int("steps", self.steps, least=0))

    @property
    def kind(self) -> str:
        return "pure differentially private"


def merge(history: Iterable[Event]) -> list[Event]:
    """Return `history` with equal neighbours added up and empty events dropped, order kept.

    Example:
        >>> step = SampledGaussian(1.0, 0.01, 1)
        >>> [event.steps for event in merge([step, step, SampledGaussian(2.0, 0.01, 5), step])]
        [2, 5, 1]
        >>> half = EpochwiseGaussian(1.0, steps_per_epoch=10, steps=5)
        >>> [event.epochs for event in merge([half, half])]  # perhaps of two runs
        [1, 1]
    """
    merged: list[Event] = []
    for event in history:
        if event.steps == 0:
            continue
        if merged and _alike(merged[-1], event):
            merged[-1] = _with_steps(event, merged[-1].steps + event.steps)
        else:
            merged.append(event)
    return merged


def _binomial_tail(event: TruncatedPoissonGaussian) -> float:
    """The probability that one Poisson sample of the event is larger than its capacity."""
    from scipy.special import bdtrc

    if event.capacity >= event.sample_size:
        return 0.0
    return float(bdtrc(event.capacity, event.sample_size, event.sample_rate))


def _alike(left: Event, right: Event) -> bool:
    if hasattr(left, "separation"):  # one run, whose steps cost together more than apart
        return False
    # A part of an epoch costs the whole, and the next event need not go on with it.
    if left.steps % getattr(left, "steps_per_epoch", getattr(left, "bands", 1)):
        return False
    return type(left) is type(right) and _with_steps(left, 1) == _with_steps(right, 1)


def _with_steps(event: Event, steps: int) -> Event:
    changed: Event = replace(event, steps=steps)
    return changed
