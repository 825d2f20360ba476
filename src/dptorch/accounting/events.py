"""What a run released, in the words accountants understand.

A *history* is a sequence of events; it may mix events freely (schedules of noise, of rate, of
mechanism), and its order does not change what it costs.

New mechanisms (truncated Poisson, random allocation, correlated noise) become new frozen
dataclasses that satisfy `Event`; an accountant that does not know a class refuses it by name
(`dptorch.accounting.accountants.protocol.covered`), so adding one cannot silently change a number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from dptorch.errors import ConfigurationError

__all__ = ["Event", "History", "SampledGaussian", "group", "merge", "positive_int"]


@runtime_checkable
class Event(Hashable, Protocol):
    """`steps` equal releases of one mechanism. Hashable: accountants cache by event."""

    @property
    def steps(self) -> int:
        """How many times the mechanism ran."""

    @property
    def kind(self) -> str:
        """What a person would call the mechanism; used in messages."""


History = Sequence[Event]


@dataclass(frozen=True)
class SampledGaussian:
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
        sigma = _number("noise_multiplier", self.noise_multiplier)
        rate = _number("sample_rate", self.sample_rate)
        if not (sigma >= 0 and math.isfinite(sigma)):
            raise ConfigurationError(
                f"noise_multiplier={self.noise_multiplier!r} must be finite and at least 0. "
                "It is the noise's standard deviation divided by max_grad_norm."
            )
        if not 0 < rate <= 1:
            raise ConfigurationError(
                f"sample_rate={self.sample_rate!r} must be in (0, 1]. A run that draws no record "
                "has no steps: pass steps=0, or the rate that the sampler really uses."
            )
        object.__setattr__(self, "noise_multiplier", sigma)
        object.__setattr__(self, "sample_rate", rate)
        object.__setattr__(self, "steps", positive_int("steps", self.steps, least=0))

    @property
    def kind(self) -> str:
        return "Poisson-sampled Gaussian"


def merge(history: Iterable[Event]) -> list[Event]:
    """Return `history` with equal neighbours added up and empty events dropped, order kept.

    Example:
        >>> step = SampledGaussian(1.0, 0.01, 1)
        >>> [event.steps for event in merge([step, step, SampledGaussian(2.0, 0.01, 5), step])]
        [2, 5, 1]
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


def group(events: Iterable[SampledGaussian]) -> list[SampledGaussian]:
    """Add up all equal events, wherever they stand; the result is sorted, so equal costs look equal.

    Example:
        >>> step = SampledGaussian(1.0, 0.01, 1)
        >>> [event.steps for event in group([step, SampledGaussian(2.0, 0.01, 5), step])]
        [2, 5]
    """
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        if event.steps:
            key = (event.noise_multiplier, event.sample_rate)
            steps[key] = steps.get(key, 0) + event.steps
    return [SampledGaussian(*key, count) for key, count in sorted(steps.items())]


def positive_int(name: str, value: object, *, least: int = 1) -> int:
    """Return `value` as an int of at least `least`.

    Raises:
        ConfigurationError: it is a bool, not a whole number, or too small.

    Example:
        >>> positive_int("steps", 3)
        3
        >>> positive_int("steps", 2.5)
        Traceback (most recent call last):
        ...
        dptorch.errors.ConfigurationError: steps=2.5 must be a whole number, at least 1 (an int).
    """
    problem = f"{name}={value!r} must be a whole number, at least {least} (an int)."
    if isinstance(value, bool):
        raise ConfigurationError(problem)
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigurationError(problem) from None
    if number < least:
        raise ConfigurationError(problem)
    return number


def _number(name: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number) or isinstance(value, (bool, str)):
        raise ConfigurationError(f"{name}={value!r} is not a number. Pass a float.")
    return number


def _alike(left: Event, right: Event) -> bool:
    return type(left) is type(right) and _with_steps(left, 1) == _with_steps(right, 1)


def _with_steps(event: Event, steps: int) -> Event:
    changed: Event = replace(event, steps=steps)  # type: ignore[type-var]
    return changed
