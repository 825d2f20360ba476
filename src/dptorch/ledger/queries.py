"""The ledger's entries of a predictor: each answer is written there before its noise is drawn.

Unlike a run, a predictor has no owner. Any number of processes may answer from one budget at once: each
charge reads, under the ledger's write lock, what all of them have charged before.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptorch.accounting import Event, merge
from dptorch.errors import BudgetExhausted, ConfigurationError, LedgerError
from dptorch.ledger.budget import admit
from dptorch.ledger.entry import Entry
from dptorch.ledger.reading import cap_in, committed_in, plan_hash
from dptorch.ledger.record import LedgerOfData
from dptorch.plan.prediction_plan import PredictionPlan

if TYPE_CHECKING:
    from dptorch.ledger.store import Transaction

__all__ = ["BUDGET_ROUNDING", "QueryLedger", "refuse_overspending"]

BUDGET_ROUNDING = 1e-9  # of the budget: shares are added up in floating point


@dataclass
class _Wish:
    """A charge that waits for the ledger.

    Attributes:
        events: all of which are charged, or none.
        done: whether it was decided.
        refused: why it was not granted.
    """

    events: Sequence[Event]
    done: bool = False
    refused: Exception | None = None


class QueryLedger:
    """What a predictor tells the ledger. Made by `DatasetLedger.answers`.

    `open` reserves the whole budget of the plan under the data set's cap; `charge` writes down answers.

    Args:
        ledger: the ledger of the data set.
        plan: of the predictor.
        key_provenance: where its randomness comes from.
        run: id of the budget. A budget that the ledger knows by this id is gone on with: after a
            restart, or beside other processes.

    Attributes:
        spent: the part of the budget that is used up, by all processes, when last looked at.
        answered: the number of releases that were charged, likewise.
        history: all that was charged, likewise.

    Guarantees:
        - When `charge(events)` returns, the answers are on disk and all charges of all processes
          together are within the plan's budget. When it raises, nothing may be answered.
          Held by `test_processes_share_one_budget_and_never_overspend` and
          `test_killed_predictors_never_answer_more_than_was_charged`.
        - What a plan spends is reserved under the data set's cap before the first answer.
          Held by `test_a_predictor_reserves_its_budget_under_the_cap`.
    """

    def __init__(
        self, ledger: LedgerOfData, plan: PredictionPlan, key_provenance: str, run: str
    ) -> None:
        self._ledger = ledger
        self._plan = plan
        self._key_provenance = key_provenance
        self.run = run
        self._lock = threading.RLock()
        self._waiting_lock = threading.Lock()
        self._waiting: list[_Wish] = []
        self._session: int | None = None
        self._head: tuple[int, str] | None = None
        self._read_to = 0
        self.spent = 0.0
        self.answered = 0
        self.history: list[Event] = []

    @property
    def name(self) -> dict[str, str]:
        """Which budget on which data set this is."""
        return {"run": self.run, "dataset": self._ledger.dataset}

    def open(self) -> None:
        """Reserve the budget, or find it reserved; does nothing if it is open.

        Raises:
            BudgetExhausted: the data set's cap does not leave enough.
            ConfigurationError: the cap, or another run on the data set, is for another unit.
            LedgerError: the ledger is broken, or knows the id with another plan or data set, or as
                closed.
        """
        if self._session is not None:
            return
        with self._lock, self._ledger.store.decide() as transaction:
            begun = next(iter(transaction.entries(run=self.run)), None)
            if begun is None:
                self._admit(transaction)
                begun = transaction.append(
                    "begin",
                    dataset=self._ledger.dataset,
                    run=self.run,
                    body={
                        "committed": [event.to_dict() for event in self._plan.whole()],
                        "sole": False,
                        "steps_done": 0,
                        "key": self._key_provenance,
                        "plan": json.loads(self._plan.to_json()),
                        "plan_hash": plan_hash(self._plan),
                    },
                )
            self._refuse_another(begun.dataset, begun.detail.get("plan_hash"))
            self._refuse_closed(transaction, begun.seq)
            self._read(transaction)
            self._session, self._head = begun.seq, (begun.seq, begun.hash)

    def charge(self, events: Sequence[Event]) -> None:
        """Write down that these answers are about to be given.

        Args:
            events: what they release; all or nothing is charged.

        Raises:
            BudgetExhausted: they do not fit; nothing was charged.
            LedgerError: they could not be written down, or the budget was closed.
        """
        wish = _Wish(events)
        with self._waiting_lock:
            self._waiting.append(wish)
        with self._lock:  # whoever holds it writes for all who wait: one commit for many answers
            if not wish.done:
                with self._waiting_lock:
                    wishes, self._waiting = self._waiting, []
                self._charge(wishes)
        if wish.refused is not None:
            raise wish.refused

    def _charge(self, wishes: Sequence[_Wish]) -> None:
        try:
            self.open()
            with self._ledger.store.write() as transaction:
                self._refuse_older_copy(transaction)
                assert self._session is not None
                self._refuse_closed(transaction, self._session)
                self._read(transaction)
                granted, last = self._append(transaction, wishes)
        except Exception as error:
            for wish in wishes:
                wish.done, wish.refused = True, error
            return
        for wish in wishes:
            wish.done = True
        if last is not None:  # on disk
            self._add(granted)
            self._read_to, self._head = last.seq, (last.seq, last.hash)

    def _append(
        self, transaction: Transaction, wishes: Sequence[_Wish]
    ) -> tuple[list[Event], Entry | None]:
        """Write down the wishes that fit, in order; refuse the others."""
        granted: list[Event] = []
        spent, first, last = self.spent, self.answered, None
        for wish in wishes:
            try:
                refuse_overspending(self._plan, spent, wish.events)
            except BudgetExhausted as refused:
                wish.refused = refused
                continue
            spent += sum(self._plan.share(event) for event in wish.events)
            granted += wish.events
        for event in merge(granted):
            last = transaction.append(
                "steps",
                dataset=self._ledger.dataset,
                run=self.run,
                session=self._session,
                first=first,
                steps=event.steps,
                body={"event": event.to_dict() | {"steps": 1}},
            )
            first += event.steps
        return granted, last

    def look(self) -> None:
        """Read what other processes have charged meanwhile."""
        with self._lock, self._ledger.store.read() as transaction:
            self._read(transaction)

    def close(self) -> None:
        """Give back what is left of the budget. No process can answer from it any more.

        Raises:
            LedgerError: the ledger does not know the budget, or could not be written.
        """
        self.open()
        with self._lock, self._ledger.store.decide() as transaction:
            self._read(transaction)
            transaction.append(
                "close",
                dataset=self._ledger.dataset,
                run=self.run,
                body={"sole": False, "committed": [event.to_dict() for event in self.history]},
            )
        self._session = None

    def _read(self, transaction: Transaction) -> None:
        found = []
        for entry in transaction.entries(run=self.run, after=self._read_to):
            if entry.kind == "steps":
                found.append(Event.from_dict(entry.detail["event"] | {"steps": entry.steps}))
            self._read_to = entry.seq
        self._add(found)

    def _add(self, events: Sequence[Event]) -> None:
        self.history = merge([*self.history, *events])
        self.answered += sum(event.steps for event in events)
        self.spent = sum(self._plan.share(event) for event in self.history)

    def _admit(self, transaction: Transaction) -> None:
        dataset, unit = self._ledger.dataset, self._plan.unit
        committed = committed_in(transaction, dataset)
        for entry in transaction.entries(dataset=dataset, kinds=["begin"]):
            other = entry.detail["plan"]["unit"]
            if other != unit and committed[str(entry.run)]:
                raise ConfigurationError(
                    f"the unit of these predictions is {unit!r}, and that of run {entry.run} on "
                    f"{dataset!r} is {other!r}. The costs of different units cannot be added up. "
                    f"Nothing was spent. Predict with unit={other!r}."
                )
        cap = cap_in(transaction, dataset)
        if cap is None:
            return
        if cap.unit != unit:
            raise ConfigurationError(
                f"the cap of {dataset!r} is for unit={cap.unit!r}, and these predictions are for "
                f"{unit!r}: their costs cannot be added up. Nothing was spent. Use the cap's unit."
            )
        admit(cap, committed, self.run, self._plan.whole(), may_be_sole=False)

    def _refuse_older_copy(self, transaction: Transaction) -> None:
        assert self._head is not None
        if not transaction.holds(*self._head):
            raise LedgerError(
                f"the ledger {self._ledger.store.location} lacks entry {self._head[0]}, which this "
                "predictor has written. It was restored from an older copy, or rewritten. Nothing "
                "was answered. Restore the newest copy, and run `dptorch ledger verify`."
            )

    def _refuse_another(self, dataset: str | None, hashed: str | None) -> None:
        if dataset != self._ledger.dataset:
            raise LedgerError(
                f"the budget {self.run} is on the data set {dataset!r}, not {self._ledger.dataset!r}."
            )
        if hashed != plan_hash(self._plan):
            raise LedgerError(
                f"the budget {self.run} is in the ledger with another plan. Nothing was spent. Go on "
                "with the plan that it was begun with (`dptorch ledger show --json` has it), or begin "
                "a budget of another name: the cap of the data set holds for both together."
            )

    def _refuse_closed(self, transaction: Transaction, session: int) -> None:
        if transaction.last_session(self.run) != session:
            raise LedgerError(
                f"the budget {self.run} was closed. Nothing was answered and nothing was spent. Begin "
                "a budget of another name."
            )


def refuse_overspending(plan: PredictionPlan, spent: float, events: Sequence[Event]) -> None:
    """Raise BudgetExhausted if `events` do not fit beside what is spent."""
    wanted = sum(plan.share(event) for event in events)
    if spent + wanted > 1 + BUDGET_ROUNDING:
        left = max(0, int((1 + BUDGET_ROUNDING - spent) / plan.share_of_one))
        raise BudgetExhausted(
            f"{max(event.steps for event in events)} more answers do not fit: the budget, epsilon="
            f"{plan.target_epsilon:g} at delta={plan.target_delta:g}, pays for {left} more. Nothing "
            "was answered and nothing was spent. Ask for fewer, serve a model that was trained with "
            "differential privacy, or begin a budget of another name."
        )
