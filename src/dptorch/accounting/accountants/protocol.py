"""The `Accountant` protocol, and the base class that checks, reduces a history and adds overflow."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from dptorch.accounting.accountants.coverage import PAIRS, accountants_covering
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.events import Event, History
from dptorch.accounting.pairs.reduction import ReducedHistory, can_reduce, reduce_history
from dptorch.accounting.pairs.sampled import Pair
from dptorch.errors import ConfigurationError, PrivacyError

__all__ = ["Accountant", "PairAccountant", "check_delta", "check_epsilon"]

Compositions = Sequence[tuple[Pair, ...]]


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
        """Whether this accountant knows what `event` costs, under some adjacency."""

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


class PairAccountant(ABC):
    """An `Accountant` that composes dominating pairs; subclasses are frozen dataclasses.

    A subclass answers for each set of compositions. Which pairs it can compose stands under its name in
    `dptorch.accounting.accountants.coverage`. Checking, covering, the edges (nothing released, no
    noise) and the overflow of truncated sampling are here.
    """

    name: str

    @abstractmethod
    def _epsilon(self, compositions: Compositions, delta: float) -> float:
        """Return the largest ε over `compositions`, each of which is sorted and not empty."""

    @abstractmethod
    def _delta(self, compositions: Compositions, epsilon: float) -> float:
        """Return the largest δ over `compositions`, each of which is sorted and not empty."""

    def covers(self, event: Event) -> bool:
        """Whether `event` reduces to a pair that this accountant composes."""
        return can_reduce(event, PAIRS[self.name])

    def epsilon(
        self,
        history: History,
        delta: float,
        *,
        adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    ) -> float:
        """Return the ε of `history` at `delta`; see `Accountant.epsilon`."""
        delta = check_delta(delta)
        run = self._reduce(history, adjacency)
        if run.noiseless:
            return math.inf
        if not run.compositions:
            return 0.0
        return _with_overflow(lambda rest: self._epsilon(run.compositions, rest), delta, run)

    def delta(
        self,
        history: History,
        epsilon: float,
        *,
        adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    ) -> float:
        """Return the δ of `history` at `epsilon`; see `Accountant.delta`."""
        epsilon = check_epsilon(epsilon)
        run = self._reduce(history, adjacency)
        if run.noiseless:
            return 1.0
        if not run.compositions:
            return 0.0
        extra = _overflow_delta(run, epsilon)
        return min(1.0, self._delta(run.compositions, epsilon) + extra) if extra < 1 else 1.0

    def _reduce(self, history: History, adjacency: Adjacency | str) -> ReducedHistory:
        relation = Adjacency.of(adjacency)
        for event in history:
            if not isinstance(event, Event):
                raise ConfigurationError(
                    f"history holds {event!r}, which is not an accounting event. Use one of "
                    "dptorch.accounting.events, such as "
                    "SampledGaussian(noise_multiplier, sample_rate, steps)."
                )
            if not self.covers(event):
                raise _refusal(self.name, event)
        return reduce_history(history, relation, PAIRS[self.name])


def _refusal(name: str, event: Event) -> PrivacyError:
    able = accountants_covering(event)
    way_out = (
        f"These do: {', '.join(able)}."
        if able
        else "No accountant does, so no ε can be stated for it: use a mechanism that one covers "
        "(Poisson sampling), or account for it without amplification (sample_rate=1)."
    )
    return PrivacyError(f"accountant {name!r} does not cover the event {event.kind!r}. {way_out}")


def _overflow_delta(run: ReducedHistory, epsilon: float) -> float:
    if run.overflow == 0:
        return 0.0
    exponent = math.log(run.overflow) + epsilon + math.log1p(math.exp(-epsilon))
    return math.exp(min(exponent, 0.0))


def _with_overflow(cost: Callable[[float], float], delta: float, run: ReducedHistory) -> float:
    """Return the ε with δ(ε) + (1 + e^ε) · overflow <= delta, by fixed-point iteration of `cost`."""
    if run.overflow == 0:
        return cost(delta)
    epsilon = 0.0
    for _ in range(50):
        # A hair more than the last value, so that the iteration ends on the safe side.
        epsilon = epsilon * (1 + 1e-9) + 1e-12
        rest = delta - _overflow_delta(run, epsilon)
        if rest <= 0:
            return math.inf
        found = cost(rest)
        if found <= epsilon or math.isinf(found):
            return max(found, epsilon)
        epsilon = found
    return math.inf


def check_delta(delta: float) -> float:
    """Return `delta` if it lies in (0, 1).

    Example:
        >>> check_delta(1.5)
        Traceback (most recent call last):
        ...
        dptorch.errors.ConfigurationError: delta=1.5 must lie strictly between 0 and 1. A common \
choice is below 1 / (number of records), such as 1e-5.
    """
    if not _is_number(delta) or not 0 < delta < 1:
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
    if not _is_number(epsilon) or not 0 <= epsilon < math.inf:
        raise ConfigurationError(f"{name}={epsilon!r} must be finite and at least 0, such as 3.0.")
    return float(epsilon)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
