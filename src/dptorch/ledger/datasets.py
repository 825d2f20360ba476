"""The ledger, and its view of one data set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dptorch.accounting import Adjacency, Event
from dptorch.errors import ConfigurationError, LedgerError
from dptorch.ledger import chain
from dptorch.ledger.budget import Cap, adaptive_epsilon, planned_epsilon
from dptorch.ledger.chain import Verification
from dptorch.ledger.counting import Attempts, once
from dptorch.ledger.dataset_id import named
from dptorch.ledger.entry import Entry
from dptorch.ledger.queries import QueryLedger
from dptorch.ledger.reading import Plan, adjacencies_of, cap_in, committed_in, read_plan
from dptorch.ledger.record import RunLedger, close_dead
from dptorch.plan import PrivacyPlan
from dptorch.plan.prediction_plan import PredictionPlan
from dptorch.randomness import KeySource
from dptorch.risk import rounded_up

if TYPE_CHECKING:
    from dptorch.ledger.store import Store

__all__ = ["DatasetLedger", "Ledger", "RunSummary", "Total", "of_one_data_set"]


@dataclass(frozen=True)
class RunSummary:
    """What the ledger knows of one run.

    Attributes:
        run, dataset: whose.
        begun: UTC, ISO 8601.
        open: whether it may still take steps of what it has reserved.
        plan: what it committed to.
        key_provenance: where its randomness came from.
        steps: steps released at least once.
        repeated: further releases of them, after the run was killed.
        history: all releases, for an accountant.
        reserved: its history as it would be at the end of its plan, when last it reserved it.
        committed: what counts under the cap: what it reserved, or, once closed, spent.
        adjacencies: the neighbouring relations under which its history is covered.
        as_planned: whether no step was released again, and all of `reserved` are of one kind, so that
            none was chosen after looking at those before.
        number_is_secret: see `DatasetLedger`.
    """

    run: str
    dataset: str
    begun: str
    open: bool
    plan: Plan
    key_provenance: str
    steps: int
    repeated: int
    history: list[Event]
    reserved: list[Event]
    committed: list[Event]
    adjacencies: tuple[Adjacency, ...]
    as_planned: bool
    number_is_secret: bool = False


@dataclass(frozen=True)
class Total:
    """What all runs on a data set cost together; see `dptorch.ledger.budget` for the two numbers.

    Attributes:
        dataset: fingerprint.
        delta, adjacency: what the numbers are for.
        runs: how many there are.
        steps: releases of all of them, repeated ones included.
        planned: ε, if no run's settings depended on what others had shown.
        adaptive: ε, however they were chosen; of a single run no more than its whole plan costs.
        committed: the same, of what is spent or reserved.
        cap: of the data set.
        left: ε that its cap leaves for further runs, whose settings may depend on what these have
            shown; None without one.
        notes: what the numbers leave out.
        number_is_secret: whether some of the runs are among several whose number may not be published.
    """

    dataset: str
    delta: float
    adjacency: Adjacency
    runs: int
    steps: int
    planned: float
    adaptive: float
    committed: float
    cap: Cap | None
    left: float | None
    notes: list[str] = field(default_factory=list)
    number_is_secret: bool = False


class Ledger:
    """A durable, hash-chained list of everything released. Made by `dptorch.ledger.open_ledger`."""

    def __init__(self, store: Store, *, key: bytes | None, steps_per_write: int) -> None:
        self.store = store
        self._key = key
        self.steps_per_write = steps_per_write

    @property
    def location(self) -> str:
        """Path or URL, without a password."""
        return self.store.location

    def dataset(self, name: str) -> DatasetLedger:
        """The ledger of one data set.

        Args:
            name: its fingerprint: a public name, or what `fingerprint.beside` returns.
        """
        return DatasetLedger(self, named(name))

    def datasets(self) -> list[str]:
        """Every data set that has an entry, in the order of their first."""
        with self.store.read() as transaction:
            found = transaction.entries(kinds=["cap", "begin"])
            return list(dict.fromkeys(str(entry.dataset) for entry in found))

    def entries(self, *, dataset: str | None = None, run: str | None = None) -> list[Entry]:
        """The entries, oldest first."""
        with self.store.read() as transaction:
            return list(transaction.entries(dataset=dataset, run=run))

    def runs(self, *, dataset: str | None = None) -> list[RunSummary]:
        """Every run, in the order in which they began."""
        return _summaries(self.entries(dataset=dataset))

    def head(self) -> str:
        """Hash of the last entry. Kept elsewhere, it pins everything before it."""
        with self.store.read() as transaction:
            return transaction.head[1]

    def close_run(self, run: str) -> Entry:
        """Give back what a run has reserved and not used; if it is alive, its next step is refused.

        Raises:
            LedgerError: there is no such run.
        """
        return close_dead(self.store, str(run))

    def verify(self, pinned_head: str | None = None) -> Verification:
        """Recompute every hash; see `dptorch.ledger.chain.verify`.

        Args:
            pinned_head: a head kept from earlier; some entry must have it.
        """
        with self.store.read() as transaction:
            found, _ = chain.verify(
                transaction.entries(), transaction.head, self._key, pinned_head=pinned_head
            )
        return found


class DatasetLedger:
    """What the ledger says about one data set; give it to `PrivacyEngine(ledger=...)`.

    Attributes:
        number_is_secret: whether runs that begin are among several of which the best is published,
            at a cost that counts on nobody being told how many there were.
        size_is_public: whether runs that begin publish how many records there are, as statistics do.
            Add/remove does not cover them.
    """

    def __init__(self, ledger: Ledger, dataset: str) -> None:
        self.number_is_secret = False
        self.size_is_public = False
        self.ledger = ledger
        self.dataset = dataset
        self.store = ledger.store
        self.steps_per_write = ledger.steps_per_write

    def run(
        self,
        plan: PrivacyPlan,
        key_provenance: str,
        *,
        run: str | None = None,
        begun: bool = True,
        steps_done: int = 0,
        own_loader_steps: int = 0,
        head: Sequence[Any] | None = None,
    ) -> RunLedger:
        """The ledger of one run; see `RunLedger`. Nothing is written yet."""
        return RunLedger(
            self,
            plan,
            key_provenance,
            run=run,
            begun=begun,
            steps_done=steps_done,
            own_loader_steps=own_loader_steps,
            head=head,
        )

    def answers(self, plan: PredictionPlan, key_provenance: str, run: str) -> QueryLedger:
        """The ledger of a predictor's answers; see `QueryLedger`. Nothing is written yet."""
        return QueryLedger(self, plan, key_provenance, run)

    @property
    def cap(self) -> Cap | None:
        """The budget that all runs share, if one was set."""
        with self.store.read() as transaction:
            return cap_in(transaction, self.dataset)

    def set_cap(self, cap: Cap | None) -> None:
        """Set, change or (None) lift the budget of the data set. The change is an entry too.

        Raises:
            ConfigurationError: what is spent or reserved is above it already, or a run has another
                unit, or is not covered under its adjacency.
            LedgerError: the ledger is broken, or cannot be written.
        """
        if not isinstance(cap, Cap | None):
            raise ConfigurationError(
                f"cap={cap!r}: expected Cap(epsilon, delta), or None to lift it."
            )
        with self.store.decide() as transaction:
            if cap is not None:
                runs_so_far = _summaries(transaction.entries(dataset=self.dataset))
                _refuse_other_units(runs_so_far, cap)
                _refuse_uncovered(runs_so_far, cap.adjacency)
                committed = committed_in(transaction, self.dataset)
                events = [event for history in committed.values() for event in history]
                already = min(
                    adaptive_epsilon(events, cap.delta, cap.adjacency),
                    _of_single_run(runs_so_far, cap.delta, cap.adjacency),
                )
                if already > cap.epsilon * (1 + 1e-9):
                    raise ConfigurationError(
                        f"a cap of epsilon={cap.epsilon:g} comes too late: runs on {self.dataset!r} "
                        f"have spent or reserved {rounded_up(already)} at delta={cap.delta:g}. Set it "
                        "no lower than that (nothing more will then fit), or close runs that are dead."
                    )
            body = None if cap is None else {**asdict(cap), "adjacency": cap.adjacency.value}
            transaction.append("cap", dataset=self.dataset, body={"cap": body})

    def runs(self) -> list[RunSummary]:
        """Every run on the data set."""
        return self.ledger.runs(dataset=self.dataset)

    def total(self, delta: float | None = None, adjacency: Adjacency | str | None = None) -> Total:
        """What all runs cost together.

        Args:
            delta: by default the cap's, or else the largest of the runs' own.
            adjacency: by default the cap's, or else the strictest of the runs' own that covers all of
                them.

        Raises:
            LedgerError: there is no run, or the runs protect different units.
            ConfigurationError: a run is not covered under that adjacency.
        """
        runs, cap = self.runs(), self.cap
        datasets = self.ledger.datasets()
        if self.dataset not in datasets:
            known = ", ".join(datasets) or "none"
            raise LedgerError(
                f"the ledger {self.store.location} has no run on {self.dataset!r}. It knows: {known}."
            )
        units = {run.plan.unit for run in runs} | ({cap.unit} if cap else set())
        if len(units) > 1:
            raise LedgerError(
                f"the runs on {self.dataset!r} protect different units ({', '.join(sorted(units))}). "
                "Their costs cannot be added up."
            )
        if delta is None:
            delta = cap.delta if cap else max((r.plan.target_delta for r in runs), default=1e-5)
        if adjacency is None:
            adjacency = cap.adjacency if cap else _strictest(runs)
        adjacency = Adjacency.of(adjacency)
        _refuse_uncovered(runs, adjacency)
        spent = [event for run in runs for event in run.history]
        committed = [event for run in runs for event in run.committed]
        single = _of_single_run(runs, delta, adjacency)
        counted = adaptive_epsilon(committed, delta, adjacency)
        return Total(
            dataset=self.dataset,
            delta=delta,
            adjacency=adjacency,
            runs=len(runs),
            steps=sum(run.steps + run.repeated for run in runs),
            planned=planned_epsilon(spent, delta, adjacency),
            adaptive=min(single, adaptive_epsilon(spent, delta, adjacency)),
            committed=min(single, counted),
            cap=cap,
            left=None if cap is None else max(0.0, cap.epsilon - counted),
            notes=_notes(runs),
            number_is_secret=any(run.number_is_secret for run in runs),
        )


def of_one_data_set(ledger: object) -> DatasetLedger:
    """Return `ledger`, if it is the ledger of a data set.

    Raises:
        ConfigurationError: it is something else, such as a path, or the ledger of all data sets.
    """
    if not isinstance(ledger, DatasetLedger):
        raise ConfigurationError(
            f"ledger={ledger!r}: expected the ledger of one data set, as in "
            "ledger=open_ledger('ledger.db').dataset('patients-2026')."
        )
    return ledger


def _of_single_run(runs: Iterable[RunSummary], delta: float, adjacency: Adjacency) -> float:
    """ε of the whole plan of the only run on a data set, in the planned count: its settings cannot have
    depended on anything. Not of what it has spent, because when it stopped was its choice. Infinite if
    there are several runs, or it did not keep to its plan."""
    counting = [run for run in runs if run.committed]
    if len(counting) != 1 or not counting[0].as_planned:
        return math.inf
    return planned_epsilon(counting[0].reserved, delta, adjacency)


def _summaries(entries: Iterable[Entry]) -> list[RunSummary]:
    of_runs: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.run is not None:
            of_runs.setdefault(entry.run, []).append(entry)
    try:
        return [_summary(of_run) for of_run in of_runs.values()]
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise LedgerError(
            f"the ledger has an entry that cannot be read ({error!r}): it was edited. Run `dptorch "
            "ledger verify`, and restore the newest copy that is whole."
        ) from None


def _summary(entries: list[Entry]) -> RunSummary:
    sessions = [entry for entry in entries if entry.kind != "steps"]
    begun, last = sessions[0], sessions[-1]
    reserved = next(entry for entry in reversed(sessions) if entry.kind != "close")
    at_its_end = _events(reserved.detail["committed"])
    attempts = Attempts.of(entries)
    plan = read_plan(begun.detail["plan"])
    return RunSummary(
        run=str(begun.run),
        dataset=str(begun.dataset),
        begun=begun.time,
        open=last.kind != "close" and attempts.distinct < plan.steps,
        plan=plan,
        key_provenance=begun.detail["key"],
        steps=attempts.distinct,
        repeated=attempts.total - attempts.distinct,
        history=attempts.events(),
        reserved=at_its_end,
        committed=_events(last.detail["committed"]),
        adjacencies=adjacencies_of(
            plan, attempts, size_is_public=begun.detail.get("size_is_public", False)
        ),
        as_planned=attempts.total == attempts.distinct
        and (bool(reserved.detail.get("sole")) or len({once(event) for event in at_its_end}) < 2),
        number_is_secret=begun.detail.get("number_is_secret", False),
    )


def _events(values: list[dict[str, Any]]) -> list[Event]:
    return [Event.from_dict(event) for event in values]


def _refuse_other_units(runs: list[RunSummary], cap: Cap) -> None:
    for run in runs:
        if (run.history or run.committed) and run.plan.unit != cap.unit:
            raise ConfigurationError(
                f"a cap for unit={cap.unit!r} cannot count run {run.run} on {run.dataset!r}: its "
                f"unit is {run.plan.unit!r}. The costs of different units cannot be added up. "
                f"Set the cap for unit={run.plan.unit!r} (`dptorch ledger cap ... --unit`), if all "
                "runs on the data set have that unit."
            )


def _refuse_uncovered(runs: list[RunSummary], adjacency: Adjacency) -> None:
    for run in runs:
        if (run.history or run.committed) and adjacency not in run.adjacencies:
            able = " or ".join(repr(each.value) for each in run.adjacencies)
            raise ConfigurationError(
                f"adjacency={adjacency.value!r} does not cover run {run.run} on {run.dataset!r} "
                "(its sampling, steps on batches of the user's own loader, or statistics, which say "
                f"how many records there are). It is covered under {able}. Ask for that, and give the "
                "data set's cap, if it has one, that adjacency (`dptorch ledger cap ... --adjacency`)."
            )


def _strictest(runs: list[RunSummary]) -> Adjacency:
    stated = {run.plan.adjacency for run in runs}
    strictest = Adjacency.ZERO_OUT  # costs as add/remove does, and covers every scheme
    if Adjacency.REPLACE_ONE in stated:
        strictest = Adjacency.REPLACE_ONE
    elif len(stated) == 1:
        (strictest,) = stated
    covered = all(strictest in run.adjacencies for run in runs)
    return strictest if covered else Adjacency.ZERO_OUT


def _notes(runs: list[RunSummary]) -> list[str]:
    notes = []
    seeded = sum(not KeySource(run.key_provenance).is_private for run in runs)
    if seeded:
        notes.append(
            f"{seeded} of the runs took their noise from a user's seed: whoever knows it can remove "
            "the noise, and for them nothing here holds"
        )
    alive = [run.run for run in runs if run.open]
    if alive:
        notes.append(f"still open, with part of the budget reserved: {', '.join(alive)}")
    return notes
