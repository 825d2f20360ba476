"""Where answers are charged: in a ledger, or, without one, in this process alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from dptorch.accounting import Event, merge
from dptorch.ledger.queries import refuse_overspending
from dptorch.plan.prediction_plan import PredictionPlan

__all__ = ["Account", "MemoryAccount"]


class Account(Protocol):
    """What a predictor charges; `dptorch.ledger.queries.QueryLedger` is one.

    Attributes:
        spent: the part of the budget that is used up.
        history: all that was charged.
    """

    spent: float
    history: list[Event]

    @property
    def name(self) -> dict[str, str] | None:
        """Which budget on which data set; None without a ledger."""

    def open(self) -> None:
        """Reserve the budget."""

    def charge(self, events: Sequence[Event]) -> None:
        """Charge all of `events`, or raise and charge nothing."""

    def look(self) -> None:
        """Read what other processes have charged."""

    def close(self) -> None:
        """Give back what is left."""


class MemoryAccount:
    """The budget of one predictor object. It is forgotten with the process."""

    name = None

    def __init__(self, plan: PredictionPlan) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self.spent = 0.0
        self.history: list[Event] = []

    def open(self) -> None:
        """See `Account`."""

    def charge(self, events: Sequence[Event]) -> None:
        """See `Account`.

        Raises:
            BudgetExhausted: they do not fit.
        """
        with self._lock:
            refuse_overspending(self._plan, self.spent, events)
            self.history = merge([*self.history, *events])
            self.spent = sum(self._plan.share(event) for event in self.history)

    def look(self) -> None:
        """See `Account`."""

    def close(self) -> None:
        """See `Account`."""
