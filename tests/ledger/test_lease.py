"""One run has one owner; and what is counted is decided on a ledger that is whole."""

from __future__ import annotations

import copy
import pickle
import random
import sqlite3
import warnings
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dptorch
from dptorch.accounting import SampledGaussian
from dptorch.errors import (
    BudgetExhausted,
    ConfigurationError,
    LedgerError,
    PrivacyError,
    PrivacyWarning,
)
from dptorch.ledger import Cap, Total, datasets, open_ledger
from dptorch.ledger.budget import adaptive_epsilon
from dptorch.ledger.counting import Attempts
from dptorch.ledger.record import RunLedger
from dptorch.ledger.store import Store, Transaction
from tests.ledger.processes import shared, spawn, wait
from tests.ledger.setup import EDITS, execute, plan, take

OS = "operating system"
PLAN = plan(10)
STEP = PLAN.event(1)
# 32 writers in a row, on a machine that has other things to do.
PATIENCE_S = 3600.0


def begin(location: str, steps: int, **settings: Any) -> RunLedger:
    run = open_ledger(location, timeout_s=PATIENCE_S, **settings).dataset("a").run(PLAN, OS)
    for step in range(steps):
        run.count(step, STEP)
    return run


def resume(location: str, run: RunLedger, steps_done: int) -> RunLedger:
    patients = open_ledger(location, timeout_s=PATIENCE_S).dataset("a")
    return patients.run(PLAN, OS, run=run.run, steps_done=steps_done, head=run.head)


def with_steps_after_a_checkpoint(location: str) -> tuple[RunLedger, RunLedger]:
    """A run of eight steps, and another process's of its checkpoint of two, which has not begun."""
    first = begin(location, 2)
    second = resume(location, first, 2)
    for step in range(2, 8):
        first.count(step, STEP)
    return first, second


def test_a_paused_run_that_another_process_resumed_is_refused(location: str) -> None:
    first = begin(location, 3)
    first.close()
    second = resume(location, first, 3)
    second.count(3, STEP)
    for _ in range(2):  # also after it has closed again
        with pytest.raises(LedgerError, match="another process"):
            first.count(3, STEP)
        first.close()
    second.close()
    with pytest.raises(LedgerError, match="another process"):
        first.open()
    second.count(4, STEP)
    (run,) = open_ledger(location).runs()
    assert run.history == [SampledGaussian(2.0, 0.1, 5)]


def test_a_paused_run_that_nobody_resumed_goes_on(location: str) -> None:
    run = begin(location, 3)
    for step in range(3, 6):
        run.close()
        run.count(step, STEP)
    assert open_ledger(location).runs()[0].history == [SampledGaussian(2.0, 0.1, 6)]


def test_steps_taken_after_a_checkpoint_was_loaded_are_counted(location: str) -> None:
    first, second = with_steps_after_a_checkpoint(location)
    with pytest.warns(PrivacyWarning, match=r"6 steps of run .* by another process"):
        second.open()
    assert second.repeated_steps == 6
    with pytest.raises(LedgerError, match="another process"):
        first.count(8, STEP)
    for step in range(2, 10):
        second.count(step, STEP)
    (run,) = open_ledger(location).runs()
    assert run.history == second.attempts.events()
    assert (run.steps, run.repeated) == (10, 6)
    assert adaptive_epsilon(run.committed, 1e-5) == adaptive_epsilon(run.history, 1e-5)


def test_without_reading_anew_they_would_not_be_counted(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin counts by what the ledger had when the checkpoint was loaded."""
    _, second = with_steps_after_a_checkpoint(location)
    monkeypatch.setattr(RunLedger, "_read", lambda self, transaction: self._in_ledger)
    for step in range(2, 10):
        second.count(step, STEP)
    (run,) = open_ledger(location).runs()
    assert (second.repeated_steps, run.repeated) == (0, 6)
    committed, spent = (adaptive_epsilon(e, 1e-5) for e in (run.committed, run.history))
    assert committed < spent


def test_a_run_that_does_not_fit_any_more_when_it_is_taken_over_is_refused(location: str) -> None:
    patients = open_ledger(location).dataset("a")
    patients.set_cap(Cap(adaptive_epsilon(PLAN.history(10), 1e-5) * 1.05, 1e-5))
    first = begin(location, 1)
    second = resume(location, first, 1)
    for step in range(1, 9):
        first.count(step, STEP)
    with pytest.raises(BudgetExhausted, match="Nothing was spent"):
        second.open()
    first.count(9, STEP)  # it still owns the run
    assert open_ledger(location).runs()[0].repeated == 0


def test_two_runs_from_one_checkpoint_of_before_the_first_step(location: str) -> None:
    patients = open_ledger(location).dataset("a")
    original = patients.run(PLAN, OS)
    copied = patients.run(PLAN, OS, run=original.run, begun=False)
    copied.count(0, STEP)
    with pytest.raises(LedgerError, match="another process"):
        original.count(0, STEP)


def test_a_run_closed_from_outside_stops_at_its_next_step(location: str) -> None:
    run = begin(location, 3, steps_per_write=8)
    open_ledger(location).close_run(run.run)
    with pytest.raises(LedgerError, match="closed or gone on"):
        run.count(3, STEP)
    assert open_ledger(location).runs()[0].steps == 8  # its block counts in full


def test_a_run_closed_from_outside_would_go_on(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin: within a block that is on disk, nobody looks."""
    run = begin(location, 3, steps_per_write=8)
    open_ledger(location).close_run(run.run)
    monkeypatch.setattr(RunLedger, "_refuse_unless_owned", lambda self, transaction: None)
    for step in range(3, 8):
        run.count(step, STEP)
    assert not open_ledger(location).runs()[0].open


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, pickle.dumps])
def test_the_ledger_of_a_run_is_not_copied(
    location: str, make_copy: Callable[[RunLedger], Any]
) -> None:
    with pytest.raises(PrivacyError, match="not copied or pickled"):
        make_copy(begin(location, 1))


def test_a_copy_would_count_once_what_two_release(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin."""
    monkeypatch.delattr(RunLedger, "__reduce__")
    run = begin(location, 1, steps_per_write=8)
    for each in (run, copy.copy(run)):
        for step in range(1, 8):
            each.count(step, STEP)
    assert open_ledger(location).runs()[0].repeated == 0


def test_a_change_of_event_gives_back_and_reserves_in_one_transaction(location: str) -> None:
    run = begin(location, 2, steps_per_write=5)
    dear = SampledGaussian(2.0, 1.0, 1)
    run.count(2, dear)
    run.count(3, STEP)
    kinds = [entry.kind for entry in open_ledger(location).entries(run=run.run)]
    assert kinds == ["begin", "steps", "close", "reserve", "steps", "close", "reserve", "steps"]
    run.close()
    history = open_ledger(location).runs()[0].history
    assert sorted(history, key=str) == sorted([SampledGaussian(2.0, 0.1, 3), dear], key=str)


# -- 32 real processes -----------------------------------------------------------------------------

RESUMED = 32


def resumed_at_once(
    location: str, *, all_open_first: bool = False, with_lease: bool = True
) -> tuple[np.ndarray, np.ndarray, Total]:
    """32 processes resume one checkpoint: how often each step was released and counted; the total.

    Args:
        all_open_first: nobody counts a step before each of them has opened the run or was refused.
        with_lease: otherwise nobody is refused.
    """
    patients = open_ledger(location).dataset("a")
    patients.set_cap(Cap(adaptive_epsilon(PLAN.history(10), 1e-5) * 2, 1e-5))
    first = begin(location, 2)
    table = shared((RESUMED, PLAN.steps))
    all_open = get_context("fork").Barrier(RESUMED)

    def work(row: np.ndarray, chance: random.Random) -> None:
        warnings.simplefilter("ignore", PrivacyWarning)
        if not with_lease:
            RunLedger._refuse_unless_owned = lambda self, transaction: None  # type: ignore[method-assign]
        try:
            try:
                run = resume(location, first, 2)
                if all_open_first:
                    run.open()
            finally:
                if all_open_first:
                    all_open.wait()
            for step in range(2, PLAN.steps):
                run.count(step, STEP)
                row[step] += 1
                if chance.random() < 0.3:
                    run.close()
        except (LedgerError, BudgetExhausted):
            return

    patients.store.close()
    children = [
        spawn(lambda row=row, seed=seed: work(row, random.Random(seed)))  # type: ignore[misc]
        for seed, row in enumerate(table)
    ]
    assert [wait(child) for child in children] == [0] * RESUMED
    (run,) = patients.runs()
    attempts = Attempts.of(patients.ledger.entries(run=run.run))
    counted = np.array([attempts.times(step) for step in range(PLAN.steps)])
    released = table.sum(0)
    released[:2] += 1
    assert patients.ledger.verify().problems == []
    return released, counted, patients.total()


def cap_holds(total: Total) -> bool:
    """What was spent is at most what the cap counts, and that at most the cap."""
    assert total.cap is not None
    return total.adaptive <= total.committed <= total.cap.epsilon


@pytest.mark.slow
def test_32_processes_that_resume_one_checkpoint(location: str, small_process: Executor) -> None:
    released, counted, total = small_process.submit(resumed_at_once, location).result()
    assert (released <= counted).all()
    assert cap_holds(total)


@pytest.mark.slow
def test_32_processes_without_a_lease_are_caught(tmp_path: Path, small_process: Executor) -> None:
    """The broken twin: each of them goes on with the run that all of them have opened."""
    path, how = str(tmp_path / "ledger.db"), {"all_open_first": True, "with_lease": False}
    _, _, total = small_process.submit(resumed_at_once, path, **how).result()
    assert not cap_holds(total)


@pytest.mark.slow
def test_32_processes_that_have_all_opened_one_run(tmp_path: Path, small_process: Executor) -> None:
    path = str(tmp_path / "ledger.db")
    released, counted, total = small_process.submit(
        resumed_at_once, path, all_open_first=True
    ).result()
    assert (released <= counted).all()
    assert cap_holds(total)


# -- the ledger must be whole ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("edit", [name for name in EDITS if name != "backdated"])
def test_nothing_is_admitted_or_given_back_on_a_broken_ledger(location: str, edit: str) -> None:
    run = begin(location, 5)
    execute(location, *EDITS[edit].split("; "))
    patients = open_ledger(location).dataset("a")
    for refused in (
        patients.run(PLAN, OS).open,
        lambda: patients.set_cap(Cap(50.0, 1e-5)),
        lambda: patients.ledger.close_run(run.run),
    ):
        with pytest.raises(LedgerError, match=r"is broken.*Nothing was spent"):
            refused()


def test_rows_deleted_after_the_first_check_are_found_by_the_next(location: str) -> None:
    patients = open_ledger(location).dataset("a")
    take(patients, 5)
    patients.run(PLAN, OS).open()  # has checked all there is
    execute(location, "DELETE FROM dptorch_ledger_entries WHERE seq = 4")
    with pytest.raises(LedgerError, match="1 entries are missing"):
        patients.run(PLAN, OS).open()


def test_without_the_check_a_run_is_admitted_on_a_broken_ledger(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin."""
    take(open_ledger(location).dataset("a"), 5)
    execute(location, EDITS["deleted"])
    monkeypatch.setattr(Store, "verify", lambda self, transaction: None)
    admitted = open_ledger(location).dataset("a").run(PLAN, OS)
    admitted.open()
    assert admitted.run in {entry.run for entry in open_ledger(location).entries()}


def test_a_later_check_reads_only_what_is_new(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dptorch.ledger import chain

    patients = open_ledger(location).dataset("a")
    take(patients, 10)
    seen: list[int] = []
    seal = chain.seal
    monkeypatch.setattr(chain, "seal", lambda e, key: seen.append(e.seq) or seal(e, key))
    patients.run(PLAN, OS).open()
    again = len(seen)
    patients.run(PLAN, OS).open()
    assert again <= 13
    assert len(seen) - again <= 1


def old_copy(location: str, folder: Path) -> Path:
    """The file of a ledger as it is now, in one piece."""
    old = folder / "copy.db"
    with closing(sqlite3.connect(location)) as source, closing(sqlite3.connect(old)) as target:
        source.backup(target)
    return old


def put_back(copy_of_ledger: Path, location: str) -> None:
    """Under open connections, which would go on with the file that is gone."""
    for suffix in ("-wal", "-shm"):
        Path(location + suffix).unlink(missing_ok=True)
    copy_of_ledger.rename(location)


def on_an_older_copy(folder: Path) -> tuple[str, RunLedger]:
    """A ledger whose file is a copy of before the last three steps of a run of six."""
    location = str(folder / "ledger.db")
    run = begin(location, 3)
    old = old_copy(location, folder)
    for step in range(3, 6):
        run.count(step, STEP)
    put_back(old, location)
    return location, run


def test_an_older_copy_of_the_ledger_is_refused(tmp_path: Path) -> None:
    location, run = on_an_older_copy(tmp_path)
    with pytest.raises(LedgerError, match="older copy"):
        run.count(6, STEP)  # the run that is alive
    with pytest.raises(LedgerError, match="older copy"):
        resume(location, run, 6)  # and from a checkpoint that is newer than the copy
    # What cannot be known: a checkpoint that is as old as the copy.
    early = open_ledger(location).dataset("a")
    early.run(PLAN, OS, run=run.run, steps_done=3).open()


def test_an_older_copy_would_lose_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: no process knows what it has written."""
    location, run = on_an_older_copy(tmp_path)
    monkeypatch.setattr(Transaction, "holds", lambda self, seq, hash: True)
    run.count(6, STEP)
    assert open_ledger(location).runs()[0].steps == 4  # of seven


def test_a_ledger_that_is_gone_is_refused(tmp_path: Path) -> None:
    location = str(tmp_path / "ledger.db")
    run = begin(location, 3)
    Path(location).unlink()
    with pytest.raises(LedgerError, match=r"is gone.*Nothing was released"):
        run.count(3, STEP)
    assert not Path(location).exists()


# -- units -----------------------------------------------------------------------------------------


def of_users() -> dptorch.PrivacyPlan:
    return dptorch.make_plan(
        batch_size=4,
        sample_size=16,
        steps=5,
        noise_multiplier=2.0,
        target_delta=1e-5,
        unit="user",
        max_examples_per_user=4,
    )


@pytest.mark.parametrize("unit", ["example", "user"])
def test_runs_and_cap_have_one_unit_in_either_order(location: str, unit: str) -> None:
    mine, theirs = (PLAN, of_users()) if unit == "example" else (of_users(), PLAN)
    patients = open_ledger(location).dataset("a")
    take(patients, 2, mine)
    with pytest.raises(ConfigurationError, match=f"its unit is {unit!r}"):
        patients.set_cap(Cap(50.0, 1e-5, unit=theirs.unit))
    assert patients.cap is None
    with pytest.raises(ConfigurationError, match=rf"is {unit!r}.*Nothing was spent"):
        take(patients, 2, theirs)  # without a cap, too
    patients.set_cap(Cap(50.0, 1e-5, unit=unit))
    take(patients, 2, mine)
    assert len(patients.runs()) == 2
    unused = open_ledger(location).dataset("b")
    take(unused, 0, mine)  # nothing was released
    take(unused, 2, theirs)


def test_units_would_be_mixed(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: neither a run nor a cap looks at the units of others."""
    monkeypatch.setattr(RunLedger, "_refuse_other_units", lambda *given: None)
    monkeypatch.setattr(datasets, "_refuse_other_units", lambda *given: None)
    patients = open_ledger(location).dataset("a")
    take(patients, 2)
    take(patients, 2, of_users())
    patients.set_cap(Cap(50.0, 1e-5, unit="user"))
    with pytest.raises(LedgerError, match="protect different units"):
        patients.total()
