"""The ledger's entries of one run: each step is written there before its noise becomes visible.

A run has one owner. Its entries "begin", "reserve" and "close" are the lease: whoever wrote the last
of them owns the run, in whichever process. The transaction that counts a step reads it, so that a
process which lost the run is refused before it draws noise.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from dptorch import accounting
from dptorch.accounting import Adjacency, Event
from dptorch.errors import BudgetExhausted, ConfigurationError, LedgerError, PrivacyError, warn
from dptorch.ledger.budget import Cap, admit
from dptorch.ledger.counting import Attempts
from dptorch.ledger.entry import Entry
from dptorch.ledger.reading import adjacencies_of, cap_in, committed_in, plan_hash
from dptorch.plan import PrivacyPlan

if TYPE_CHECKING:
    from dptorch.ledger.store import Store, Transaction

__all__ = ["RunLedger", "close_dead", "committed_in"]


class LedgerOfData(Protocol):
    """What a run needs of `DatasetLedger`: the data set, the store, steps in one write, whether the
    number of runs is secret, whether that of records is published."""

    @property
    def dataset(self) -> str: ...

    @property
    def store(self) -> Store: ...

    @property
    def steps_per_write(self) -> int: ...

    @property
    def number_is_secret(self) -> bool: ...

    @property
    def size_is_public(self) -> bool: ...


@dataclass(frozen=True)
class _Reservation:
    """What a run may commit to, as one transaction sees it.

    Attributes:
        known: whether the ledger has the run.
        in_ledger: what the ledger has counted of it, and up to which entry that was read.
        unknown: steps of its checkpoint that the ledger does not have, as intervals.
        attempts: both together.
        history: its whole history once its plan is done.
        sole: whether it was admitted as the only run of the data set.
    """

    known: bool
    in_ledger: tuple[Attempts, int]
    unknown: list[tuple[int, int]]
    attempts: Attempts
    history: list[Event]
    sole: bool


class RunLedger:
    """What an engine tells the ledger of its run. Made by `DatasetLedger.run`.

    `open` reserves the whole plan under the data set's cap; `count` writes down a step; `close`
    gives back what was reserved and not used.

    Args:
        ledger: the ledger of the data set.
        plan: of the run.
        key_provenance: where its randomness comes from.
        run: id of a run to go on with; by default a new one.
        begun: whether the ledger must know `run`. A checkpoint from before its first step may be
            older than its first entry.
        steps_done: how many steps the checkpoint holds that the run goes on from.
        own_loader_steps: how many of them took their batch from a loader of the user's own. If any
            did, each of them that the ledger does not know is taken for one.
        head: what `head` was when the checkpoint was written.

    Attributes:
        run: the run's id, 16 hexadecimal digits.
        begun: whether the ledger knows it.
        attempts: how often each of its steps was released, in sessions that were killed too.
        head: (seq, hash) of the last entry that was written for the run here, or before its
            checkpoint was; None if there was none. A ledger without it is an older copy.

    Guarantees:
        - When `count(step, event)` returns, the step is on disk; when it raises, the step must not
          be released (`tests/engine/test_ledger.py`,
          `test_every_step_is_on_disk_before_its_noise_is_drawn`).
        - Over all sessions of a run, whenever and however they were killed, paused or resumed, the
          ledger has every step for which `count` returned
          (`test_200_kills_lose_no_step`, `test_200_schedules_count_every_step`).
        - One process owns the run at a time. The first `open` or `count` of a resumed run takes it
          over. Whoever had it before is refused from then on, also after `close`
          (`test_32_processes_that_resume_one_checkpoint`).

    Raises:
        LedgerError: the ledger does not know `run`, knows it with another plan or data set, or is
            an older copy than the one that it was kept in.
    """

    def __init__(
        self,
        ledger: LedgerOfData,
        plan: PrivacyPlan,
        key_provenance: str,
        *,
        run: str | None = None,
        begun: bool = True,
        steps_done: int = 0,
        own_loader_steps: int = 0,
        head: Sequence[Any] | None = None,
    ) -> None:
        self._ledger = ledger
        self._plan = plan
        self._key_provenance = key_provenance
        self._steps_loaded = self._next = steps_done
        self._open = False
        self._written_to = steps_done  # steps below are on disk, for this session
        self._reserved: Event = plan.event(1)  # what each of the remaining steps was reserved as
        (self._unknown_event,) = plan.history(1, own_loader_steps=min(own_loader_steps, 1))
        self._lease: int | None = None  # seq of the entry by which the run is owned
        self._may_take_over = run is not None
        self._in_ledger = (Attempts(), 0)
        self.run = run or secrets.token_hex(8)
        self.begun = False
        self.head: tuple[int, str] | None = None if head is None else (int(head[0]), str(head[1]))
        if run is not None:
            with ledger.store.read() as transaction:
                self._refuse_other_run(transaction, begun)
                self._in_ledger = self._read(transaction)
        self.attempts, _ = self._with_unknown(self._in_ledger[0])

    def __reduce__(self) -> NoReturn:
        raise PrivacyError(
            "a RunLedger is not copied or pickled: of two that have one block of steps on disk, each "
            "would take the steps, and they would count once. Resume the run from a checkpoint."
        )

    def open(self) -> None:
        """Reserve what remains of the plan, before the first step; does nothing if it is open.

        Raises:
            BudgetExhausted: the data set's cap does not leave enough.
            ConfigurationError: the cap is for a neighbouring relation that does not cover the run, or
                another run on the data set has another unit.
            LedgerError: another process owns the run, or the ledger is broken.
        """
        if not self._open:
            self._reserve(self._plan.event(1))

    def count(self, step: int, event: Event) -> None:
        """Write down that `step` is about to be released.

        Args:
            step: its index; steps come in order.
            event: what it releases; its `steps` is 1.

        Raises:
            BudgetExhausted: the step is past what was reserved.
            LedgerError: it could not be written down, or another process owns the run.
            ConfigurationError: the cap is for a neighbouring relation that does not cover it.
        """
        if step != self._next or step >= self._plan.steps:
            raise BudgetExhausted(
                f"step {step} was not reserved: the ledger expects step {self._next} of "
                f"{self._plan.steps}. It was not taken."
            )
        self.open()
        if event != self._reserved:
            self._reserve(event)
        if step < self._written_to:  # in a block that is on disk
            with self._ledger.store.read() as transaction:
                self._refuse_unless_owned(transaction)
        else:
            block = min(self._ledger.steps_per_write, self._plan.steps - step)
            with self._ledger.store.write() as transaction:
                self._refuse_unless_owned(transaction)
                entry = self._append_steps(transaction, self._lease, event, step, block)
            self._written_to = step + block
            self.head = (entry.seq, entry.hash)
        self.attempts.add(event, step, 1)
        self._next = step + 1

    def close(self) -> None:
        """Give back what was reserved and not used. A later `count` reserves anew.

        Does nothing if the run is not open, or if another process has gone on with it. That process
        then owns it, and a later `count` here is refused.

        Raises:
            LedgerError: it could not be written, or the ledger is broken. The reservation stays.
        """
        if not self._open:
            return
        with self._ledger.store.decide() as transaction:
            if self._owns(transaction):
                entry = _close(transaction, self.run, self._unused)
                self._lease, self.head = entry.seq, (entry.seq, entry.hash)
        self._open = False
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
        return self._adjacencies(self.attempts)

    @property
    def repeated_steps(self) -> int:
        """Releases beyond one for each step done: what being killed has cost."""
        return self.attempts.total - self._next

    def _adjacencies(self, attempts: Attempts) -> tuple[Adjacency, ...]:
        return adjacencies_of(self._plan, attempts, size_is_public=self._ledger.size_is_public)

    # -- reserving ---------------------------------------------------------------------------------

    def _reserve(self, event: Event) -> None:
        """Commit to releasing each remaining step as `event`, and own the run from then on."""
        store = self._ledger.store
        with (
            store.read() as transaction
        ):  # before the lock: an accountant looks up what it computed
            store.verify(transaction)
            self._admitted(transaction, event)
        with store.decide() as transaction:
            found = self._admitted(transaction, event)
            if self._open:  # give back what was written ahead as another event
                _close(transaction, self.run, self._unused)
            entry = transaction.append(
                "reserve" if found.known else "begin",
                dataset=self._ledger.dataset,
                run=self.run,
                body={
                    "committed": [e.to_dict() for e in found.history],
                    "sole": found.sole,
                    "steps_done": self._next,
                    "key": self._key_provenance,
                    "plan": json.loads(self._plan.to_json()),
                    "plan_hash": plan_hash(self._plan),
                    **({"number_is_secret": True} if self._ledger.number_is_secret else {}),
                    **({"size_is_public": True} if self._ledger.size_is_public else {}),
                },
            )
            lease = entry.seq
            for first, steps in found.unknown:
                entry = self._append_steps(transaction, lease, self._unknown_event, first, steps)
        news = found.attempts.total - self.attempts.total
        self._lease, self.head = lease, (entry.seq, entry.hash)
        self._open, self._written_to, self._reserved = True, self._next, event
        self._may_take_over, self.begun = False, True
        self._in_ledger, self.attempts = found.in_ledger, found.attempts
        if news > 0:
            warn(
                f"{news} steps of run {self.run} were released by another process since its "
                "checkpoint was loaded here. They count, and that process is refused from now on: at "
                f"the end of its plan the run will have spent epsilon={self.epsilon_at_end():.4g}."
            )

    def _admitted(self, transaction: Transaction, event: Event) -> _Reservation:
        """What the run commits to by releasing each remaining step as `event`.

        Raises:
            LedgerError, BudgetExhausted, ConfigurationError: it may not.
        """
        self._refuse_unless_owned(transaction)
        last = transaction.last_session(self.run)
        session = None if last is None else transaction.entry(last)
        in_ledger = self._read(transaction)
        counted = in_ledger[0].copy()
        first, steps = self._unused
        if steps:
            counted.take_back(self._reserved, first, steps)
        attempts, unknown = self._with_unknown(counted)
        whole_run = attempts.copy()
        whole_run.add(event, self._next, self._plan.steps - self._next)
        history = whole_run.events()
        committed = committed_in(transaction, self._ledger.dataset)
        self._refuse_other_units(transaction, committed)
        cap = cap_in(transaction, self._ledger.dataset)
        sole = False
        if cap is not None:
            self._refuse_other_terms(cap, whole_run)
            may_be_sole = session is None or session.detail["sole"] or not counted.total
            # To take steps as something else from now on is a choice made after looking.
            as_planned = len(whole_run.released) <= 1 and not unknown
            sole = admit(cap, committed, self.run, history, may_be_sole=may_be_sole and as_planned)
        return _Reservation(session is not None, in_ledger, unknown, attempts, history, sole)

    def _read(self, transaction: Transaction) -> tuple[Attempts, int]:
        """What the ledger has counted of the run, and up to which entry."""
        counted, read_to = self._in_ledger
        counted = counted.copy()
        counted.add_entries(transaction.entries(run=self.run, after=read_to))
        return counted, transaction.head[0]

    def _with_unknown(self, counted: Attempts) -> tuple[Attempts, list[tuple[int, int]]]:
        """`counted` and the steps of the checkpoint that it lacks; those steps alone.

        There are some where the run had no ledger for a while. They are written down when the run
        opens.
        """
        attempts = counted.copy()
        unknown = _intervals(s for s in range(self._steps_loaded) if not counted.times(s))
        for first, steps in unknown:
            attempts.add(self._unknown_event, first, steps)
        return attempts, unknown

    @property
    def _unused(self) -> tuple[int, int]:
        """(first, how many) of the steps that are on disk and were not taken."""
        return self._next, self._written_to - self._next

    def _append_steps(
        self, transaction: Transaction, lease: int | None, event: Event, first: int, steps: int
    ) -> Entry:
        assert lease is not None
        return transaction.append(
            "steps",
            dataset=self._ledger.dataset,
            run=self.run,
            session=lease,
            first=first,
            steps=steps,
            body={"event": event.to_dict()},
        )

    # -- refusals ----------------------------------------------------------------------------------

    def _owns(self, transaction: Transaction) -> bool:
        held = self.head is None or transaction.holds(*self.head)
        return held and transaction.last_session(self.run) == self._lease

    def _refuse_unless_owned(self, transaction: Transaction) -> None:
        """Raise LedgerError if another process owns the run, or the ledger is an older copy."""
        if self.head is not None and not transaction.holds(*self.head):
            raise LedgerError(
                f"the ledger {self._ledger.store.location} lacks entry {self.head[0]}, which run "
                f"{self.run} has written. It was restored from an older copy, or rewritten. Steps "
                "that were released are missing in it. The step was not taken and not counted. "
                "Restore the newest copy, and run `dptorch ledger verify`."
            )
        if not self._may_take_over and not self._owns(transaction):
            raise LedgerError(
                f"run {self.run} was closed or gone on with by another process. This one may not "
                "go on. The step was not taken and not counted. To go on here, load the newest "
                "checkpoint into a new engine."
            )

    def _refuse_other_units(
        self, transaction: Transaction, committed: Mapping[str, Sequence[Event]]
    ) -> None:
        """Raise ConfigurationError if a run on the data set protects another unit."""
        for begun in transaction.entries(dataset=self._ledger.dataset, kinds=["begin"]):
            unit = begun.detail["plan"]["unit"]
            if unit != self._plan.unit and committed[str(begun.run)]:
                raise ConfigurationError(
                    f"this run's unit is {self._plan.unit!r}, and that of run {begun.run} on "
                    f"{self._ledger.dataset!r} is {unit!r}. The costs of different units cannot be "
                    f"added up. Nothing was spent. Make the engine with unit={unit!r}."
                )

    def _refuse_other_terms(self, cap: Cap, whole_run: Attempts) -> None:
        _refuse_other_unit(cap.unit, self._plan.unit)
        able = self._adjacencies(whole_run)
        if cap.adjacency not in able:
            allowed = self._adjacencies(Attempts())
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

    def _refuse_other_run(self, transaction: Transaction, must_be_known: bool) -> None:
        """Raise LedgerError unless the ledger knows the run as this one."""
        self._refuse_unless_owned(transaction)
        begun = next(iter(transaction.entries(run=self.run, kinds=["begin"])), None)
        if begun is None:
            if must_be_known:
                raise LedgerError(
                    f"the ledger {self._ledger.store.location} does not know run {self.run}, so it "
                    "cannot say which steps were lost. Give the ledger that the run was begun with."
                )
            return
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


def _intervals(steps: Iterable[int]) -> list[tuple[int, int]]:
    """(first, how many) of each stretch of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for step in steps:
        if found and step == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((step, 1))
    return found


def close_dead(store: Store, run: str) -> Entry:
    """Close a run whose process is gone; if it is not, its next step is refused.

    Raises:
        LedgerError: the ledger does not know the run, or is broken.
    """
    with store.decide() as transaction:
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
