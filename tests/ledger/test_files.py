"""Names, links, copies and logs of a ledger's file: nobody's entries are lost to the others."""

from __future__ import annotations

import os
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from dptorch.errors import BudgetExhausted, LedgerError, PrivacyWarning
from dptorch.ledger import Cap, DatasetLedger, RunLedger, open_ledger
from dptorch.ledger.budget import adaptive_epsilon
from tests.ledger.processes import shared, spawn, wait
from tests.ledger.setup import OS, do_not_look, plan

PLAN = plan(6)
STEP = PLAN.event(1)
ONE_RUN = Cap(adaptive_epsilon(PLAN.history(6), 1e-5) * 1.05, 1e-5)  # not two


def begun(path: Path) -> tuple[DatasetLedger, RunLedger]:
    """A run that has taken one step, with the connection open, under a cap for one run."""
    patients = open_ledger(path).dataset("a")
    patients.set_cap(ONE_RUN)
    run = patients.run(PLAN, OS)
    run.count(0, STEP)
    return patients, run


def go_on(run: RunLedger, first: int) -> int:
    """How many of the steps from `first` on are admitted."""
    warnings.simplefilter("ignore", PrivacyWarning)
    for step in range(first, PLAN.steps):
        try:
            run.count(step, STEP)
        except (LedgerError, BudgetExhausted):
            return step - first
    return PLAN.steps - first


def under_another_name(path: Path) -> Path:
    other = path.with_name("other.db")
    os.link(path, other)
    return other


def moved(path: Path) -> Path:
    """To where the old name leads by a symbolic link."""
    other = path.with_name("other.db")
    path.rename(other)
    path.symlink_to(other)
    return other


def without_its_log(path: Path) -> Path:
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink()
    return path


def spent_by_two_processes(tmp_path: Path, happens: Callable[[Path], Path]) -> int:
    """Steps that two processes were admitted to: one goes on while something happens to the file, and
    another one comes after it and is still there."""
    path, row = tmp_path / "ledger.db", shared((1,))
    (told, tell), (heard, hear) = os.pipe(), os.pipe()

    def child() -> None:
        other = Path(os.read(told, 4096).decode())
        try:
            row[0] = go_on(open_ledger(other).dataset("a").run(PLAN, OS), 0)
        except LedgerError:
            row[0] = 0
        os.write(hear, b"1")
        os.read(told, 1)

    pid = spawn(child)
    # What the ledger has by now is in its file, so that there is a ledger to find without the log.
    open_ledger(path).store.close()
    _, run = begun(path)
    os.write(tell, str(happens(path)).encode())
    os.read(heard, 1)
    mine = 1 + go_on(run, 1)
    os.write(tell, b"1")
    assert wait(pid) == 0
    for end in (told, tell, heard, hear):
        os.close(end)
    return mine + int(row[0])


HAPPENS = [under_another_name, moved, without_its_log]


@pytest.mark.parametrize("happens", HAPPENS)
def test_of_two_processes_on_one_file_each_sees_what_the_other_has_reserved(
    tmp_path: Path, happens: Callable[[Path], Path]
) -> None:
    assert spent_by_two_processes(tmp_path, happens) <= PLAN.steps


@pytest.mark.slow
@pytest.mark.parametrize("happens", HAPPENS)
def test_not_looking_at_the_file_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, happens: Callable[[Path], Path]
) -> None:
    do_not_look(monkeypatch)
    assert spent_by_two_processes(tmp_path, happens) == 2 * PLAN.steps


def test_a_file_with_two_names_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    _, run = begun(tmp_path / "ledger.db")
    other = under_another_name(tmp_path / "ledger.db")
    for refused in (lambda: run.count(1, STEP), lambda: open_ledger(other)):
        with pytest.raises(LedgerError, match=r"2 names \(hard links\).*nothing was spent"):
            refused()
    other.unlink()
    run.count(1, STEP)


def test_a_symbolic_link_is_the_same_ledger(tmp_path: Path) -> None:
    begun(tmp_path / "ledger.db")
    (tmp_path / "link.db").symlink_to(tmp_path / "ledger.db")
    with pytest.raises(BudgetExhausted, match="Nothing was spent"):
        open_ledger(tmp_path / "link.db").dataset("a").run(PLAN, OS).open()


def test_a_ledger_that_is_moved_goes_on_where_the_old_name_leads(tmp_path: Path) -> None:
    patients, run = begun(tmp_path / "ledger.db")
    other = moved(tmp_path / "ledger.db")
    assert go_on(run, 1) == PLAN.steps - 1
    assert [r.steps for r in patients.runs()] == [PLAN.steps]
    assert [r.steps for r in open_ledger(other).runs()] == [PLAN.steps]


def copy_without_its_log(tmp_path: Path) -> DatasetLedger:
    """Of a ledger with a run that goes on: what somebody has who copies the file alone."""
    begun(tmp_path / "ledger.db")
    assert Path(tmp_path / "ledger.db-wal").stat().st_size > 0
    (tmp_path / "other").mkdir()
    return open_ledger(shutil.copy(tmp_path / "ledger.db", tmp_path / "other")).dataset("a")


def test_a_copy_without_its_log_has_what_was_reserved(tmp_path: Path) -> None:
    copy = copy_without_its_log(tmp_path)
    assert copy.ledger.verify().problems == []
    with pytest.raises(BudgetExhausted, match="Nothing was spent"):
        copy.run(PLAN, OS).open()


def test_a_copy_without_its_log_would_be_a_new_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin: everything is in the log."""
    do_not_look(monkeypatch)
    copy = copy_without_its_log(tmp_path)
    assert go_on(copy.run(PLAN, OS), 0) == PLAN.steps
    assert len(copy.runs()) == 1


def test_vacuum_changes_nothing(tmp_path: Path) -> None:
    patients, run = begun(tmp_path / "ledger.db")
    patients.store.close()
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as other:
        other.execute("VACUUM")
    assert go_on(run, 1) == PLAN.steps - 1
    assert patients.ledger.verify().problems == []
