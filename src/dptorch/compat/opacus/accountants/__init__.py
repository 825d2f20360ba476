"""Accountants with the methods of Opacus' own, over `dptorch.accounting`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from dptorch import accounting
from dptorch.accounting import Adjacency, EpochwiseGaussian, Event, SampledGaussian
from dptorch.compat.arguments import known_arguments
from dptorch.compat.opacus.scheduled_run import ScheduledRun
from dptorch.errors import ConfigurationError, one_of

__all__ = [
    "GaussianAccountant",
    "IAccountant",
    "PRVAccountant",
    "RDPAccountant",
    "create_accountant",
]


class IAccountant:
    """What was released, and what it costs. Subclasses name who is asked.

    Attributes:
        name: of the accountant in `dptorch.accounting`.
        events: what was stepped by hand or loaded.
        runs: the engines' runs, which count for themselves.
    """

    name: ClassVar[str]
    _mechanism: ClassVar[str]

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.runs: list[ScheduledRun] = []

    def all_events(self) -> list[Event]:
        """All that was released."""
        events = [*self.events, *(event for run in self.runs for event in run.history())]
        # Only these add up: the steps of an epoch that another engine begins anew do not.
        sampled = [event for event in events if isinstance(event, SampledGaussian)]
        others = [event for event in events if not isinstance(event, SampledGaussian)]
        return [*accounting.merge(sampled), *others]

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """(noise multiplier, sample rate, steps) of all releases."""
        return [_entry(event) for event in self.all_events()]

    @known_arguments
    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Count one release that no engine made."""
        self.events.append(SampledGaussian(noise_multiplier, sample_rate, 1))

    @known_arguments
    def get_epsilon(
        self,
        delta: float,
        *,
        poisson: bool = True,
        eps_error: float | None = None,
        delta_error: float | None = None,
        alphas: Any = None,
    ) -> float:
        """ε of all releases at `delta`; 0 before the first.

        Args:
            delta: δ.
            poisson: accepted: every release is counted as it was drawn.
            eps_error, delta_error, alphas: accepted: the accountants have errors and orders of
                their own.
        """
        return accounting.get_accountant(self.name).epsilon(
            self.all_events(), delta, adjacency=Adjacency.ZERO_OUT
        )

    def __len__(self) -> int:
        return len(self.history)

    @classmethod
    def mechanism(cls) -> str:
        """The name by which `create_accountant` knows it."""
        return cls._mechanism

    def state_dict(self) -> dict[str, Any]:
        """The history and the name."""
        return {"history": self.history, "mechanism": self.mechanism()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a history. (A run's own comes with its checkpoint.)

        Raises:
            ConfigurationError: it is not one, or another mechanism's.
        """
        if not {"history", "mechanism"} <= set(state_dict):
            raise ConfigurationError(
                f"this is not the state of an accountant: it has {sorted(state_dict)} instead of "
                "history and mechanism. Pass what state_dict() returned."
            )
        if state_dict["mechanism"] != self.mechanism():
            raise ConfigurationError(
                f"the state is of mechanism {state_dict['mechanism']!r}, this accountant's is "
                f"{self.mechanism()!r}. Use create_accountant({state_dict['mechanism']!r})."
            )
        self.events = [SampledGaussian(*entry) for entry in state_dict["history"]]


class PRVAccountant(IAccountant):
    """Numerical composition of privacy losses: `dptorch`'s "pld", a certified upper bound.

    Example:
        >>> accountant = PRVAccountant()
        >>> for _ in range(10):
        ...     accountant.step(noise_multiplier=1.0, sample_rate=0.01)
        >>> accountant.history
        [(1.0, 0.01, 10)]
    """

    name = "pld"
    _mechanism = "prv"


class RDPAccountant(IAccountant):
    """Rényi divergences: looser."""

    name = "rdp"
    _mechanism = "rdp"

    def get_privacy_spent(self, *, delta: float, alphas: Any = None) -> tuple[float, float]:
        """(ε, the Rényi order that gave it); `alphas` is accepted, the orders are dptorch's."""
        from dptorch.accounting.accountants.rdp import RDPAccountant as Renyi

        events = self.all_events()
        return self.get_epsilon(delta), Renyi().best_order(
            events, delta, adjacency=Adjacency.ZERO_OUT
        )


class GaussianAccountant(IAccountant):
    """The central limit theorem's ε, which is no bound; every answer warns so."""

    name = "gdp"
    _mechanism = "gdp"


_KINDS = {kind.mechanism(): kind for kind in (PRVAccountant, RDPAccountant, GaussianAccountant)}


def create_accountant(mechanism: str) -> IAccountant:
    """The accountant called "prv", "rdp" or "gdp"."""
    return _KINDS[one_of("accountant", mechanism, _KINDS)]()


def _entry(event: Event) -> tuple[float, float, int]:
    match event:
        case SampledGaussian():
            return event.noise_multiplier, event.sample_rate, event.steps
        case EpochwiseGaussian():
            return event.noise_multiplier, 1.0, event.epochs
    return math.nan, math.nan, event.steps
