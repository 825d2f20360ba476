"""Accountants with the methods of Opacus's own, over `dptorch.accounting`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from dptorch import accounting
from dptorch.accounting import Adjacency, EpochwiseGaussian, Event, SampledGaussian
from dptorch.compat.arguments import known_arguments
from dptorch.compat.opacus.scheduled_run import ScheduledRun
from dptorch.errors import ConfigurationError, PrivacyError

__all__ = [
    "GaussianAccountant",
    "IAccountant",
    "PRVAccountant",
    "RDPAccountant",
]

Entry = tuple[float, float, int]


class _History(list[Entry]):
    """The entries of an accountant. An appended one is counted by it; other changes are refused."""

    def __init__(self, entries: Iterable[Entry], accountant: IAccountant) -> None:
        super().__init__(entries)
        self._accountant = accountant

    def append(self, entry: Entry) -> None:
        """Count (noise multiplier, sample rate, steps)."""
        self._accountant.events.append(SampledGaussian(*entry))
        super().append(entry)

    def _refuse(self, *args: Any) -> Any:
        raise PrivacyError(
            "an accountant's history can be appended to, by step(...) or history.append(...), and "
            "replaced as a whole by history = [...]. What was released cannot be taken back."
        )

    extend = insert = pop = remove = clear = __setitem__ = __delitem__ = __iadd__ = _refuse


class IAccountant:
    """What was released, and what it costs. Subclasses name who is asked.

    A subclass of your own overrides `get_epsilon`. Noise for a target epsilon, and the privacy
    statement, are then by "pld", a certified upper bound.

    Attributes:
        name: of the accountant in `dptorch.accounting`.
        events: what was stepped by hand or loaded.
        runs: the engines' runs, which count for themselves.
        elsewhere: what runs that are not here have released, by their identity: a checkpoint tells of
            the other runs of its engine.
    """

    name: ClassVar[str] = "pld"
    _mechanism: ClassVar[str]

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.runs: list[ScheduledRun] = []
        self.elsewhere: dict[str, list[Event]] = {}

    def history_by_run(self) -> dict[str, list[Event]]:
        """What each run has released, by its identity."""
        return self.elsewhere | {run.identity: run.history() for run in self.runs}

    def all_events(self) -> list[Event]:
        """All that was released."""
        of_runs = self.history_by_run().values()
        events = [*self.events, *(event for events in of_runs for event in events)]
        # Only these add up: the steps of an epoch that another engine begins anew do not.
        sampled = [event for event in events if isinstance(event, SampledGaussian)]
        others = [event for event in events if not isinstance(event, SampledGaussian)]
        return [*accounting.merge(sampled), *others]

    def take_over(self, earlier: IAccountant) -> None:
        """Count what `earlier` counts too."""
        self.events += earlier.events
        self.runs += [run for run in earlier.runs if run not in self.runs]
        self.elsewhere |= earlier.elsewhere

    @property
    def history(self) -> list[Entry]:
        """(noise multiplier, sample rate, steps) of all releases.

        Assign a list to begin with another history.

        Raises:
            PrivacyError: on assignment, if steps of models that were made private are counted here.
        """
        return _History((_entry(event) for event in self.all_events()), self)

    @history.setter
    def history(self, entries: Iterable[Entry]) -> None:
        if steps := sum(run.steps_done for run in self.runs):
            raise PrivacyError(
                f"history cannot be replaced: {steps} steps of models made private here belong to it. "
                "Use a new PrivacyEngine for other data."
            )
        self.events = [SampledGaussian(*entry) for entry in entries]

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

    def state_dict(self, destination: Any = None) -> Any:
        """Return the history and the name, written into `destination` where one is given."""
        state = {} if destination is None else destination
        state["history"] = list(self.history)
        state["mechanism"] = self.mechanism()
        return state

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


def _entry(event: Event) -> Entry:
    match event:
        case SampledGaussian():
            return event.noise_multiplier, event.sample_rate, event.steps
        case EpochwiseGaussian():
            return event.noise_multiplier, 1.0, event.epochs
    return math.nan, math.nan, event.steps
