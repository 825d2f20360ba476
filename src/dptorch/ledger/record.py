"""A run's own pages of the ledger: each step is written there before its noise becomes visible."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from dptorch import accounting
from dptorch.accounting import Adjacency, Event
from dptorch.errors import BudgetExhausted, ConfigurationError, LedgerError
from dptorch.ledger.budget import Cap, admit
from dptorch.ledger.counting import Attempts
from dptorch.ledger.entry import Entry, canonical
from dptorch.plan import PrivacyPlan

if TYPE_CHECKING:
    from dptorch.ledger.store import Store, Transaction

__all__ = [
    "RunRecord",
    "adjacencies_of",
    "cap_in",
    "close_dead",
    "committed_in",
    "plan_hash",
]


class DataSetPages(Protocol):
    """What a run's record needs of `DatasetLedger`: whose budget, where it is kept, how often."""

    @property
    def dataset(self) -> str: ...

    @property
    def store(self) -> Store: ...

    @property
    def steps_per_write(self) -> int: ...

    @property
    def cap(self) -> Cap | None: ...


class RunRecord:
    """What an engine tells the ledger. Made by `DatasetLedger.run`.

    `open` reserves the whole plan under the data set's cap; `count` writes down a step; `close`
    gives back what was reserved and not used.

    Args:
        ledger: the data set's pages.
        plan: of the run.
        key_provenance: where its randomness comes from.
        run: id of a run to go on with; by default a new one.
        begun: whether the ledger must know `run`. A checkpoint from before its first step may be
            older than its first entry.
        steps_done: how many steps the checkpoint holds that the run goes on from.
        own_loader_steps: how many of them took their batch from a loader of the user's own. If any
            did, each of them that the ledger does not know is taken for one.

    Attributes:
        run: the run's id, 16 hexadecimal digits.
        begun: whether the ledger knows it.
        attempts: how often each of its steps was released, in sessions that were killed too.

    Guarantees:
        - When `count(step, event)` returns, the step is on disk; when it raises, the step must not
          be released.
        - Over all sessions of a run, whenever and however they were killed, `attempts` has every
          step for which `count` returned.
        - Two processes never go on with one run: the later `open` shuts the earlier one out.

    Raises:
        LedgerError: the ledger does not know `run`, or knows it with another plan or data set.
    """

    def __init__(
        self,
        ledger: DataSetPages,
        plan: PrivacyPlan,
        key_provenance: str,
        *,
        run: str | None = None,
        begun: bool = True,
        steps_done: int = 0,
        own_loader_steps: int = 0,
    ) -> None:
        self._ledger = ledger
        self._plan = plan
        self._key_provenance = key_provenance
        self._next = steps_done
        self._session: int | None = None
        self._written_to = steps_done  # steps below are on disk, for this session
        self._reserved: Event = plan.event(1)  # what each of the remaining steps was reserved as
        self._sole = True  # whether the run may still become the data set's only one
        self.attempts = Attempts()
        self.run = run or secrets.token_hex(8)
        self.begun = False
        if run is not None:
            self._read_sessions(begun)
        # Steps of a checkpoint that the ledger does not know, because the run had none for a while:
        # written down when the run opens.
        (self._unknown_event,) = plan.history(1, own_loader_steps=min(own_loader_steps, 1))
        self._unknown = _intervals(s for s in range(steps_done) if not self.attempts.times(s))
        for first, steps in self._unknown:
            self.attempts.add(self._unknown_event, first, steps)

    def open(self) -> None:
        """Reserve what remains of the plan, before the first step; does nothing if it is open.

        Raises:
            BudgetExhausted: the data set's cap does not leave enough.
            ConfigurationError: the cap is for a neighbouring relation that does not cover the run.
        """
        if self._session is None:
            self._reserve(self._plan.event(1))

    def count(self, step: int, event: Event) -> None:
        """Write down that `step` is about to be released.

        Args:
            step: its index; steps come in order.
            event: what it releases; its `steps` is 1.

        Raises:
            BudgetExhausted: the step is past what was reserved.
            LedgerError: it could not be written down.
            ConfigurationError: the cap is for a neighbouring relation that does not cover it.
        """
        if step != self._next or step >= self._plan.steps:
            raise BudgetExhausted(
                f"step {step} was not reserved: the ledger expects step {self._next} of "
                f"{self._plan.steps}. It was not taken."
            )
        self.open()
        if event != self._reserved:
            self.close()  # gives back what was written ahead as the other event
            self._reserve(event)
        if step >= self._written_to:
            block = min(self._ledger.steps_per_write, self._plan.steps - step)
            assert self._session is not None
            with self._ledger.store.write() as transaction:
                self._refuse_if_superseded(transaction)
                self._append_steps(transaction, self._session, event, step, block)
            self._written_to = step + block
        self.attempts.add(event, step, 1)
        self._next = step + 1

    def close(self) -> None:
        """Give back what was reserved and not used. A later `count` reserves anew.

        Does nothing if the run is not open, or another process has gone on with it.
        """
        if self._session is None:
            return
        with self._ledger.store.write() as transaction:
            if transaction.last_session(self.run) == self._session:
                unused = (self._next, self._written_to - self._next)
                _close(transaction, self.run, unused)
        self._session = None
        self._written_to = self._next

    def epsilon_at_end(self) -> float:
        """ε of the run, at its plan's δ, when it has gone through the rest of its plan."""
        attempts = self.attempts.copy()
        attempts.add(self._plan.event(1), self._next, self._plan.steps - self._next)
        return accounting.get_accountant(self._plan.accountant).epsilon(
            attempts.events(), self._plan.target_delta, adjacency=self._plan.adjacency
        )

    @property
    def name(self) -> dict[str, str]:
        """Which run on which data set this is."""
        return {"run": self.run, "dataset": self._ledger.dataset}

    @property
    def adjacencies(self) -> tuple[Adjacency, ...]:
        """The neighbouring relations under which what was released is covered."""
        return adjacencies_of(self._plan, self.attempts)

    @property
    def repeated_steps(self) -> int:
        """Releases beyond one for each step done: what being killed has cost."""
        return self.attempts.total - self._next

    # -- inside ------------------------------------------------------------------------------------

    def _reserve(self, event: Event) -> None:
        """Commit to releasing each remaining step as `event`."""
        ledger = self._ledger
        whole_run = self.attempts.copy()
        whole_run.add(event, self._next, self._plan.steps - self._next)
        history = whole_run.events()
        may_be_sole = self._sole and not self._unknown
        # Before the lock is taken: what an accountant has computed once, it looks up.
        cap = ledger.cap
        if cap is not None:
            self._refuse_other_terms(cap, whole_run)
            admit(cap, {}, self.run, history, may_be_sole=may_be_sole)
        with ledger.store.write() as transaction:
            cap = cap_in(transaction, ledger.dataset)
            if cap is not None:
                self._refuse_other_terms(cap, whole_run)
            sole = cap is not None and admit(
                cap,
                committed_in(transaction, ledger.dataset),
                self.run,
                history,
                may_be_sole=may_be_sole,
            )
            known = transaction.last_session(self.run) is not None
            entry = transaction.append(
                "reserve" if known else "begin",
                dataset=ledger.dataset,
                run=self.run,
                body={
                    "committed": [e.to_dict() for e in history],
                    "sole": sole,
                    "steps_done": self._next,
                    "key": self._key_provenance,
                    "plan": json.loads(self._plan.to_json()),
                    "plan_hash": plan_hash(self._plan),
                },
            )
            for first, steps in self._unknown:
                self._append_steps(transaction, entry.seq, self._unknown_event, first, steps)
        self.begun, self._unknown = True, []
        self._session, self._written_to, self._reserved = entry.seq, self._next, event
        self._sole = sole or not self.attempts.total

    def _append_steps(
        self, transaction: Transaction, session: int, event: Event, first: int, steps: int
    ) -> None:
        transaction.append(
            "steps",
            dataset=self._ledger.dataset,
            run=self.run,
            session=session,
            first=first,
            steps=steps,
            body={"event": event.to_dict()},
        )

    def _refuse_other_terms(self, cap: Cap, whole_run: Attempts) -> None:
        _refuse_other_unit(cap.unit, self._plan.unit)
        able = adjacencies_of(self._plan, whole_run)
        if cap.adjacency not in able:
            allowed = adjacencies_of(self._plan, Attempts())
            what = (
                "a step on a batch of the user's own loader"
                if cap.adjacency in allowed
                else f"sampling={self._plan.sampling!r}"
            )
            raise ConfigurationError(
                f"the cap of {self._ledger.dataset!r} is for adjacency={cap.adjacency.value!r}, "
                f"under which {what} is not covered. Nothing was spent. Set the cap under "
                f"{' or '.join(repr(a.value) for a in able)} (`dptorch ledger cap ... --adjacency`), "
                "or take batches from engine.loader under sampling='poisson'."
            )

    def _refuse_if_superseded(self, transaction: Transaction) -> None:
        if transaction.last_session(self.run) != self._session:
            raise LedgerError(
                f"run {self.run} was closed or gone on with by another process; this one may not "
                "go on. The step was not taken and not counted."
            )

    def _read_sessions(self, must_be_known: bool) -> None:
        """What earlier sessions of the run have released."""
        with self._ledger.store.read() as transaction:
            entries = list(transaction.entries(run=self.run))
        sessions = [entry for entry in entries if entry.kind != "steps"]
        if not sessions and not must_be_known:
            return
        if not sessions:
            raise LedgerError(
                f"the ledger {self._ledger.store.location} does not know run {self.run}, so it cannot "
                "say which steps were lost. Give the ledger that the run was begun with."
            )
        begun = sessions[0]
        if begun.dataset != self._ledger.dataset:
            raise LedgerError(
                f"run {self.run} is on the data set {begun.dataset!r}, not {self._ledger.dataset!r}: "
                "a run's guarantee is for one data set."
            )
        if begun.detail["plan_hash"] != plan_hash(self._plan):
            raise LedgerError(
                f"run {self.run} is in the ledger with another plan. Go on with the plan that it was "
                "begun with, or begin a new run."
            )
        self.begun = True
        self.attempts = Attempts.of(entries)
        self._sole = sessions[-1].detail["sole"] or not self.attempts.total


def _intervals(steps: Iterable[int]) -> list[tuple[int, int]]:
    """(first, how many) of each stretch of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for step in steps:
        if found and step == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((step, 1))
    return found


def adjacencies_of(plan: PrivacyPlan, attempts: Attempts) -> tuple[Adjacency, ...]:
    """The neighbouring relations that cover a run: those of its plan's sampling scheme.

    Not add/remove, where a step took its batch from a loader of the user's own: a record that is
    added may move other records into other batches.
    """
    planned = {plan.event(1)}
    if attempts.released <= planned:
        return plan.scheme.adjacencies
    return tuple(a for a in plan.scheme.adjacencies if a is not Adjacency.ADD_REMOVE)


def plan_hash(plan: PrivacyPlan) -> str:
    """SHA-256 of the plan's JSON. A plan holds public constants only."""
    return hashlib.sha256(canonical(json.loads(plan.to_json())).encode()).hexdigest()


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


def close_dead(store: Store, run: str) -> Entry:
    """Close a run whose process is gone; if it is not, its next step is refused.

    Raises:
        LedgerError: the ledger does not know the run.
    """
    with store.write() as transaction:
        return _close(transaction, run, unused=(0, 0))


def _close(transaction: Transaction, run: str, unused: tuple[int, int]) -> Entry:
    entries = list(transaction.entries(run=run))
    session = next((e for e in reversed(entries) if e.kind != "steps"), None)
    if session is None:
        raise LedgerError(f"the ledger does not know run {run!r}. See `dptorch ledger show`.")
    if session.kind == "close":
        return session
    attempts = Attempts.of(entries)
    body: dict[str, Any] = {}
    first, steps = unused
    if steps:
        body["event"] = entries[-1].detail["event"]
        attempts.take_back(Event.from_dict(body["event"]), first, steps)
    body["sole"] = session.detail["sole"] and attempts.total > 0
    body["committed"] = (
        session.detail["committed"]
        if body["sole"]
        else [event.to_dict() for event in attempts.events()]
    )
    return transaction.append(
        "close",
        dataset=session.dataset,
        run=run,
        first=first if steps else None,
        steps=steps or None,
        body=body,
    )


def _refuse_other_unit(cap: str, plan: str) -> None:
    if cap != plan:
        raise BudgetExhausted(
            f"the data set's cap is for the unit {cap!r} and this run's plan for {plan!r}: their "
            "costs cannot be added up. Nothing was spent. Use the cap's unit, or set another cap."
        )
