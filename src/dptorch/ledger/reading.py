"""What entries say: the cap of a data set, what its runs commit to, what covers a run."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from dptorch.accounting import Adjacency, Event
from dptorch.ledger.budget import Cap
from dptorch.ledger.counting import Attempts
from dptorch.ledger.entry import canonical
from dptorch.plan import PrivacyPlan
from dptorch.plan.prediction_plan import PredictionPlan

if TYPE_CHECKING:
    from dptorch.ledger.store import Transaction

__all__ = ["Plan", "adjacencies_of", "cap_in", "committed_in", "plan_hash", "read_plan"]

Plan = PrivacyPlan | PredictionPlan


def adjacencies_of(
    plan: Plan, attempts: Attempts, *, size_is_public: bool = False
) -> tuple[Adjacency, ...]:
    """The neighbouring relations that cover a run: those of its plan's sampling scheme.

    Not add/remove, where a step took its batch from a loader of the user's own: a record that is
    added may move other records into other batches. Nor where the run publishes how many records
    there are, as statistics do.
    """
    if isinstance(plan, PredictionPlan):
        return tuple(Adjacency)  # its events hold under all three
    planned = {plan.event(1)}
    if attempts.released <= planned and not size_is_public:
        return plan.scheme.adjacencies
    return tuple(a for a in plan.scheme.adjacencies if a is not Adjacency.ADD_REMOVE)


def plan_hash(plan: Plan) -> str:
    """SHA-256 of the plan's JSON. A plan holds public constants only."""
    return hashlib.sha256(canonical(json.loads(plan.to_json())).encode()).hexdigest()


def read_plan(detail: dict[str, Any]) -> Plan:
    """The plan that a run began with."""
    text = json.dumps(detail)
    return (PredictionPlan if "predictions" in detail else PrivacyPlan).from_json(text)


def cap_in(transaction: Transaction, dataset: str) -> Cap | None:
    """The cap of a data set, if it has one."""
    found = None
    for entry in transaction.entries(dataset=dataset, kinds=["cap"]):
        found = entry.detail["cap"]
    return None if found is None else Cap(**found)


def committed_in(transaction: Transaction, dataset: str) -> dict[str, list[Event]]:
    """What each run on a data set counts for under its cap."""
    committed = {}
    for entry in transaction.entries(dataset=dataset, kinds=["begin", "reserve", "close"]):
        events = [Event.from_dict(event) for event in entry.detail["committed"]]
        committed[str(entry.run)] = events
    return committed
