"""What every accountant answers, and the checks that all of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.events import Event, History, SampledGaussian, group
from dptorch.errors import ConfigurationError, PrivacyError

__all__ = ["Accountant", "check_delta", "check_epsilon", "covered", "without_noise"]


@runtime_checkable
class Accountant(Protocol):
    """Turns a history of releases into (ε, δ).

    Attributes:
        name: the name it is asked for by.
        is_upper_bound: whether a theorem makes every returned ε at least the true one. Where it
            is False the number is for planning, not for a statement.
    """

    @property
    def name(self) -> str: ...

    @property
    def is_upper_bound(self) -> bool: ...

    def covers(self, event: Event) -> bool:
        """Whether this accountant knows what `event` costs."""

    def epsilon(
        self,
        history: History,
        delta: float,
        *,
        adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    ) -> float:
        """The smallest ε >= 0 for which it can say that `history` is (ε, `delta`)-DP.

        Returns:
            0.0 for an empty history, `math.inf` where no finite ε is known (no noise).

        Raises:
            ConfigurationError: `delta` outside (0, 1).
            PrivacyError: an event it does not cover; the message names the accountants that do.
        """

    def delta(
        self,
        history: History,
        epsilon: float,
        *,
        adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    ) -> float:
        """The smallest δ in [0, 1] for which it can say that `history` is (`epsilon`, δ)-DP."""


def covered(accountant: Accountant, history: History) -> list[SampledGaussian]:
    """Return `history` as grouped sampled Gaussians, or refuse what `accountant` does not cover.

    Raises:
        PrivacyError: naming the event's kind and every accountant that covers it.
        ConfigurationError: something in `history` is no event at all.
    """
    from dptorch.accounting.accountants import registry

    gaussians = []
    for event in history:
        if not isinstance(event, Event):
            raise ConfigurationError(
                f"history holds {event!r}, which is not an accounting event. "
                "Use dptorch.accounting.SampledGaussian(noise_multiplier, sample_rate, steps)."
            )
        if not isinstance(event, SampledGaussian) or not accountant.covers(event):
            able = [name for name in registry.names() if registry.get(name).covers(event)]
            way_out = (
                f"These do: {', '.join(able)}."
                if able
                else "No accountant does, so no ε can be stated for it: use a mechanism that one "
                "covers (Poisson sampling), or account for it without amplification (sample_rate=1)."
            )
            raise PrivacyError(
                f"accountant {accountant.name!r} does not cover the event {event.kind!r}. {way_out}"
            )
        gaussians.append(event)
    return group(gaussians)


def check_delta(delta: float) -> float:
    """Return `delta` if it lies in (0, 1).

    Example:
        >>> check_delta(1.5)
        Traceback (most recent call last):
        ...
        dptorch.errors.ConfigurationError: delta=1.5 must lie strictly between 0 and 1. A common \
choice is below 1 / (number of records), such as 1e-5.
    """
    if isinstance(delta, (bool, str)) or not 0 < delta < 1:
        raise ConfigurationError(
            f"delta={delta!r} must lie strictly between 0 and 1. "
            "A common choice is below 1 / (number of records), such as 1e-5."
        )
    return float(delta)


def check_epsilon(epsilon: float, *, name: str = "epsilon") -> float:
    """Return `epsilon` if it is finite and not negative.

    Example:
        >>> check_epsilon(float("nan"))
        Traceback (most recent call last):
        ...
        dptorch.errors.ConfigurationError: epsilon=nan must be finite and at least 0, such as 3.0.
    """
    if isinstance(epsilon, (bool, str)) or not (epsilon >= 0 and math.isfinite(epsilon)):
        raise ConfigurationError(f"{name}={epsilon!r} must be finite and at least 0, such as 3.0.")
    return float(epsilon)


def without_noise(events: Sequence[SampledGaussian]) -> bool:
    """Whether some step released its sum as it is: then no finite ε is claimed, δ is 1."""
    return any(event.noise_multiplier == 0 for event in events)
