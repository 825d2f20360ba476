"""What can go wrong with a ledger: each says what happened, and nothing is lost or spent."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
import torch.nn.functional as F

import dptorch
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import ConfigurationError, DataError, LedgerError, PrivacyWarning
from dptorch.ledger import Cap, connection, open_ledger, store
from tests.engine.setup import SIZE, make_data, make_model, parameters
from tests.ledger.conftest import new_database
from tests.ledger.processes import spawn, wait
from tests.ledger.setup import do_not_look


def engine_on(path: Any, model: torch.nn.Module, **settings: Any) -> PrivacyEngine:
    return dptorch.PrivacyEngine(
        model,
        sample_rate=1.0,
        sample_size=SIZE,
        steps=6,
        noise_multiplier=2.0,
        target_delta=1e-3,
        accountant="exact",
        ledger=open_ledger(path, timeout_s=0.2).dataset("data"),
        **settings,
    )


def one_step(engine: PrivacyEngine, optimizer: torch.optim.Optimizer) -> None:
    x, y = make_data().tensors
    F.cross_entropy(engine.model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def refused_unspent(path: Path, engine: PrivacyEngine, optimizer: Any, match: str) -> None:
    """A step raises, and model, count and ledger are as before."""
    before, done = parameters(engine.model), engine.steps_done
    with pytest.raises(LedgerError, match=match) as refused:
        one_step(engine, optimizer)
    assert "Nothing was released, and nothing was spent" in str(refused.value)
    assert torch.equal(parameters(engine.model), before)
    assert engine.steps_done == done
    assert all(p.grad is None for p in engine.model.parameters())
    optimizer.zero_grad()


@pytest.fixture
def running(tmp_path: Path) -> tuple[Path, PrivacyEngine, torch.optim.Optimizer]:
    """A run that has taken one step."""
    path = tmp_path / "ledger.db"
    model = make_model()
    engine = engine_on(path, model)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.warns(PrivacyWarning, match="loader"):
        one_step(engine, optimizer)
    return path, engine, optimizer


def steps_in(path: Path) -> int:
    return open_ledger(path).runs()[0].steps


def test_a_locked_ledger(running: Any) -> None:
    path, engine, optimizer = running
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    refused_unspent(path, engine, optimizer, match="held it for 0.2 s")
    other.execute("ROLLBACK")
    one_step(engine, optimizer)  # the same step, now counted once
    assert steps_in(path) == engine.steps_done == 2


def long_plan(steps: int = 1000) -> dptorch.PrivacyPlan:
    return dptorch.make_plan(
        sample_rate=1.0, sample_size=9, steps=steps, noise_multiplier=9.0, target_delta=1e-3
    )


def count_until_refused(run: Any, plan: dptorch.PrivacyPlan) -> tuple[int, str]:
    """(how many steps were counted, what the error said)."""
    for step in range(plan.steps):
        try:
            run.count(step, plan.event(1))
        except LedgerError as error:
            return step, str(error)
    return plan.steps, ""


def test_a_full_disk(tmp_path: Path) -> None:
    """SQLite's own limit on a file, which it reports as it reports a full disk."""
    path, plan = tmp_path / "ledger.db", long_plan()
    ledger = open_ledger(path)
    run = ledger.dataset("data").run(plan, "operating system")
    with ledger.store._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 5}")
    counted, said = count_until_refused(run, plan)
    assert 1 < counted < 200
    assert "full" in said
    assert "Free some space" in said
    assert "Nothing was released, and nothing was spent" in said
    with ledger.store._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=100000")
    run.count(counted, plan.event(1))  # there is room again: the same step, once
    assert steps_in(path) == counted + 1
    assert ledger.verify().problems == []


def test_a_disk_that_refuses_to_grow_a_file(tmp_path: Path) -> None:
    """The operating system's limit (as of a quota): writes fail in the middle."""
    path, plan = tmp_path / "ledger.db", long_plan()

    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        run = open_ledger(path).dataset("data").run(plan, "operating system")
        run.open()
        size = max(p.stat().st_size for p in tmp_path.iterdir()) + 200_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        counted, said = count_until_refused(run, plan)
        os.write(write, f"{counted} {said}".encode())

    read, write = os.pipe()
    assert wait(spawn(child)) == 0
    counted, said = os.read(read, 4096).decode().split(" ", 1)
    assert 1 < int(counted) < plan.steps
    assert "Nothing was released" in said
    assert steps_in(path) == int(counted)
    assert open_ledger(path).verify().problems == []


@pytest.fixture
def folder_for_all() -> Iterator[Path]:
    """A folder that another user may look into (pytest's are for their owner)."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_read_only_ledger(folder_for_all: Path) -> None:
    """A file and a folder that this user may not write."""
    path, plan = folder_for_all / "ledger.db", long_plan()
    ledger = open_ledger(path)
    ledger.dataset("data").run(plan, "operating system").count(0, plan.event(1))
    ledger.store.close()

    def child() -> None:
        if os.geteuid() == 0:  # root may write anything
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        said = ""
        try:
            open_ledger(path).dataset("data").run(plan, "operating system").open()
        except LedgerError as error:
            said = str(error)
        os.write(write, said.encode() or b"nothing")

    read, write = os.pipe()
    path.chmod(0o444)
    folder_for_all.chmod(0o555)
    assert wait(spawn(child)) == 0
    folder_for_all.chmod(0o755)
    path.chmod(0o644)
    said = os.read(read, 4096).decode()
    assert "could not be" in said
    assert "permissions" in said or "may write" in said
    assert steps_in(path) == 1


@pytest.mark.slow
def test_a_ledger_from_a_newer_version(location: str) -> None:
    open_ledger(location).store.close()
    engine = store.Store(location)
    with engine._engine.begin() as connection:
        connection.execute(sa.text("UPDATE dptorch_ledger_head SET format = 2"))
    with pytest.raises(LedgerError, match=r"newer dptorch.*Upgrade"):
        open_ledger(location)


def test_a_file_that_is_no_ledger(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are notes, and not a database. " * 50)
    with pytest.raises(DataError, match="something else"):
        open_ledger(text)
    assert text.read_text().startswith("these are notes")
    with pytest.raises(DataError, match="no ledger at"):
        open_ledger(tmp_path / "missing.db", create=False)
    assert not (tmp_path / "missing.db").exists()
    with pytest.raises(DataError, match="not a folder"):
        open_ledger(tmp_path / "missing" / "ledger.db")
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (x)")
    with pytest.raises(DataError, match="holds no dptorch ledger"):
        open_ledger(other, create=False)


def test_a_damaged_ledger(running: Any) -> None:
    path, engine, _ = running
    engine.release_budget()
    engine._run._ledger.store.close()
    damaged = bytearray(path.read_bytes())
    damaged[4096:] = b"\xff" * (len(damaged) - 4096)
    path.write_bytes(bytes(damaged))
    with pytest.raises(LedgerError, match="damaged"):
        open_ledger(path).verify()


@pytest.mark.parametrize("url", ["mysql://host/db", "postgresql:/host", "http://x", "redis://x"])
def test_a_url_that_is_not_understood(url: str) -> None:
    with pytest.raises((ConfigurationError, DataError), match=r"postgresql://|not a folder"):
        open_ledger(url)


def test_a_server_that_does_not_answer_and_passwords_in_messages() -> None:
    with pytest.raises(LedgerError, match="could not be opened") as refused:
        open_ledger("postgresql://me:geheim@127.0.0.1:9/ledger", timeout_s=2)
    assert "geheim" not in str(refused.value)
    assert "postgresql://me@127.0.0.1:9/ledger" in str(refused.value)


@pytest.mark.postgres
@pytest.mark.parametrize("name", ["fsync", "full_page_writes", "synchronous_commit"])
def test_a_server_that_may_forget_what_it_has_confirmed_is_refused(
    postgres: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    location = new_database(postgres)
    monkeypatch.setitem(store._DURABLE, name, "as here never")
    with pytest.raises(LedgerError, match=f"runs with {name}=on"):
        open_ledger(location)
    monkeypatch.undo()
    open_ledger(location)


def test_a_clock_that_goes_backwards_is_recorded_and_breaks_nothing(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger(location)
    plan = dptorch.make_plan(
        sample_rate=1.0, sample_size=9, steps=5, noise_multiplier=1.0, target_delta=1e-3
    )
    run = ledger.dataset("data").run(plan, "operating system")
    run.count(0, plan.event(1))
    past = datetime(2001, 1, 1, tzinfo=timezone.utc)
    monkeypatch.setattr(store, "_utc_now", lambda: past.isoformat(timespec="microseconds"))
    run.count(1, plan.event(1))
    monkeypatch.undo()
    run.count(2, plan.event(1))
    found = ledger.verify()
    assert found.problems == []
    assert len(found.clock_went_back) == 1
    late = ledger.entries()[found.clock_went_back[0] - 1]
    assert late.detail["clock_behind"] == past.isoformat(timespec="microseconds")
    assert ledger.runs()[0].steps == 3


def test_a_fork_may_not_use_the_parents_ledger(running: Any) -> None:
    path, engine, _ = running

    def child() -> None:
        with pytest.raises(LedgerError, match="fork"):
            engine._run._run_ledger.count(1, engine.plan.event(1))

    assert wait(spawn(child)) == 0
    assert steps_in(path) == 1


@pytest.mark.parametrize("mended", [True, False])
def test_a_fork_keeps_its_charges_when_the_parent_closes_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mended: bool
) -> None:
    """The broken twin holds the file open over the fork: what the fork wrote durably is lost."""
    path = tmp_path / "ledger.db"
    if not mended:
        do_not_look(monkeypatch)  # which would find that the log is gone
    parents = open_ledger(path)
    if not mended:
        monkeypatch.setattr(connection, "_engines", weakref.WeakSet())
    begun, go_on = os.pipe(), os.pipe()

    def child() -> None:
        dataset = open_ledger(path).dataset("data")
        dataset.set_cap(Cap(1.0, 1e-5))
        os.write(begun[1], b"1")
        os.read(go_on[0], 1)
        for epsilon in (2.0, 3.0, 4.0):
            dataset.set_cap(Cap(epsilon, 1e-5))

    pid = spawn(child)
    os.read(begun[0], 1)
    parents.entries()
    parents.store.close()
    os.write(go_on[1], b"1")
    assert wait(pid) == 0
    for end in (*begun, *go_on):
        os.close(end)
    caps = [e.detail["cap"]["epsilon"] for e in open_ledger(path).entries() if e.kind == "cap"]
    assert (caps == [1.0, 2.0, 3.0, 4.0]) is mended


def test_a_ledger_that_is_written_while_a_process_forks_is_refused_there(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db")

    def child() -> None:
        with pytest.raises(LedgerError, match="was being written when this process was forked"):
            open_ledger(tmp_path / "ledger.db")
        open_ledger(tmp_path / "other.db").dataset("data").set_cap(Cap(1.0, 1e-5))

    with ledger.store.write():
        pid = spawn(child)
    assert wait(pid) == 0
    ledger.dataset("data").set_cap(Cap(1.0, 1e-5))


def test_threads_share_a_ledger(location: str) -> None:
    ledger = open_ledger(location)
    plan = dptorch.make_plan(
        sample_rate=1.0, sample_size=9, steps=10, noise_multiplier=1.0, target_delta=1e-3
    )

    def work() -> None:
        run = ledger.dataset("data").run(plan, "operating system")
        for step in range(10):
            run.count(step, plan.event(1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.steps for run in ledger.runs()] == [10] * 4
    assert ledger.verify().problems == []


def test_nan_in_the_model_is_neither_taken_nor_counted(running: Any) -> None:
    path, engine, optimizer = running
    x, y = make_data().tensors
    with torch.no_grad():
        next(engine.model.parameters()).fill_(float("nan"))
    F.cross_entropy(engine.model(x), y).backward()
    with pytest.raises(dptorch.errors.PrivacyError, match="NaN"):
        optimizer.step()
    assert steps_in(path) == engine.steps_done == 1


def test_a_key_that_cannot_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        open_ledger(tmp_path / "l.db", key_file=tmp_path / "none")
    short = tmp_path / "short"
    short.write_bytes(b"k")
    with pytest.raises(ConfigurationError, match="at least 32"):
        open_ledger(tmp_path / "l.db", key_file=short)
    assert not (tmp_path / "l.db").exists()
