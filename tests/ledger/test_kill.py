"""Training killed at random instants: no step whose noise became visible is ever missing.

The oracle is a table in shared memory in which a child marks each step right after its noise was drawn,
before anything else can see it. Real engine, real ledger, real checkpoints, SIGKILL.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from collections import Counter
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dptorch import accounting
from dptorch.accounting import SampledGaussian
from dptorch.ledger import DatasetLedger, RunLedger, open_ledger
from dptorch.ledger.counting import Attempts
from dptorch.ledger.entry import Entry
from dptorch.plan import PrivacyPlan
from tests.ledger.lives import DELTA, EPSILON, NOISE, RATE, READY, go_on, watch
from tests.ledger.processes import kill, shared, spawn, until, wait

KILLS = 200
STEPS = 24


class RecordsAfter(RunLedger):
    """The broken twin: writes a step down when the next one begins."""

    _late: tuple[int, Any] | None = None

    def count(self, step: int, event: Any) -> None:
        late, self._late = self._late, (step, event)
        if late is None:
            self.open()
        else:
            super().count(*late)


def watched(row: np.ndarray, record: type, dies_at: int | None) -> None:
    """In a child: mark each step once its noise exists, and keep the ledger with `record`.

    The child kills itself with the noise of step `dies_at` drawn.
    """

    def run(self: DatasetLedger, plan: PrivacyPlan, provenance: str, **kwargs: Any) -> RunLedger:
        made: RunLedger = record(self, plan, provenance, **kwargs)
        return made

    def seen(step: int) -> None:
        row[step] += 1
        if step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    DatasetLedger.run = run  # type: ignore[method-assign]
    watch(seen)


def train(location: str, folder: Path, row: np.ndarray, dataset: str) -> None:
    """Go on from the last checkpoint to the end of the plan."""
    go_on(location, folder / f"{dataset}.pt", row, dataset, save_every=2)


def life(
    location: str,
    folder: Path,
    row: np.ndarray,
    dataset: str,
    *,
    record: type = RunLedger,
    dies_at: int | None = None,
) -> int:
    """Fork a child that trains; returns its pid."""

    def work() -> None:
        watched(row, record, dies_at)
        train(location, folder, row, dataset)

    return spawn(work)


def imports(folder: Path) -> None:
    """Import what training imports late, before forking."""
    train(str(folder / "warm.db"), folder, np.zeros(STEPS + 2, int), "warm")


def times(entries: list[Entry]) -> np.ndarray:
    """How often the ledger counted each step, over all runs of a data set."""
    runs: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.run is not None:
            runs.setdefault(entry.run, []).append(entry)
    return sum(
        (
            np.array([attempts.times(step) for step in range(STEPS)])
            for attempts in map(Attempts.of, runs.values())
        ),
        start=np.zeros(STEPS, int),
    )


def true_epsilon(counts: np.ndarray) -> float:
    """ε of releasing step i counts[i] times."""
    history = [
        SampledGaussian(NOISE / times**0.5, RATE, steps)
        for times, steps in sorted(Counter(int(n) for n in counts).items())
        if times
    ]
    return accounting.get_accountant("exact").epsilon(history, DELTA, adjacency="zero-out")


def killed_at_random(location: str, folder: Path, *, kills: int, seed: int = 0) -> Counter[str]:
    """Train run after run, killing at random instants; returns what happened."""
    imports(folder)
    chance = random.Random(seed)
    table = shared((kills + 1, STEPS + 2))
    found: Counter[str] = Counter()
    run = 0
    while found["kills"] < kills:
        row, dataset = table[run], f"run-{run}"
        row[READY] = 0
        pid = life(location, folder, row, dataset)
        _wait_for_the_moment(pid, row, chance)
        if (code := kill(pid)) == 0:
            found["completed"] += 1
            truth = int(true_epsilon(row[:STEPS]) * 1e6)
            found["under-reported"] += bool(row[EPSILON] < truth - 1)
            run += 1
        else:
            assert code == -9, "a child failed by itself"
            found["kills"] += 1
        check(location, dataset, row, found)
    return found


def _wait_for_the_moment(pid: int, row: np.ndarray, chance: random.Random) -> None:
    """Until some number of steps has been seen, and a random part of a step more; one time in eight
    a random part of start-up and resumption."""
    if chance.random() < 0.125:
        time.sleep(chance.random() * 0.1)
        return
    until(lambda: row[READY], pid)
    steps = chance.randrange(1, 5)
    ahead = row[:STEPS].sum() + steps
    began = time.monotonic()
    until(lambda: row[:STEPS].sum() >= ahead, pid)
    a_step = (time.monotonic() - began) / steps
    time.sleep(chance.random() * 1.5 * a_step)


def check(location: str, dataset: str, row: np.ndarray, found: Counter[str]) -> None:
    """The ledger can be read, holds together, and counts all that the table has."""
    opened = open_ledger(location)
    try:
        found["unreadable"] += bool(opened.verify().problems)
        counted = times(opened.entries(dataset=dataset))
    finally:
        opened.store.close()
    found["under-counted"] += bool((counted < row[:STEPS]).any())
    found[f"surplus {dataset}"] = int((counted - row[:STEPS]).sum())


def surplus(found: Counter[str]) -> int:
    return sum(n for name, n in found.items() if name.startswith("surplus"))


@pytest.mark.slow
def test_200_kills_lose_no_step(location: str, tmp_path: Path, small_process: Executor) -> None:
    found = small_process.submit(killed_at_random, location, tmp_path, kills=KILLS).result()
    assert found["under-counted"] == found["under-reported"] == found["unreadable"] == 0
    assert found["completed"] >= 5, "runs did get through"
    # A step that was written down and then not released: at most one a kill.
    assert 0 <= surplus(found) <= KILLS
    if "://" not in location:
        with sqlite3.connect(location) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_ledger_that_records_afterwards_is_caught(tmp_path: Path) -> None:
    """Negative control: the last step before a kill is missing."""
    imports(tmp_path)
    path, row, found = str(tmp_path / "ledger.db"), shared((STEPS + 2,)), Counter[str]()
    for record in (RunLedger, RecordsAfter):
        row[:] = 0
        assert wait(life(path, tmp_path, row, record.__name__, record=record, dies_at=5)) == -9
        check(path, record.__name__, row, found)
        assert found["under-counted"] == (record is RecordsAfter)


def test_the_epsilon_of_a_resumed_engine_counts_the_lost_steps(tmp_path: Path) -> None:
    """No chance involved: a child is killed in its ninth step, another one goes on from the
    checkpoint of the eighth."""
    imports(tmp_path)
    path, table = str(tmp_path / "ledger.db"), shared((1, STEPS + 2))
    assert wait(life(path, tmp_path, table[0], "run-0", dies_at=8)) == -9
    assert wait(life(path, tmp_path, table[0], "run-0")) == 0
    counts = table[0, :STEPS]
    assert counts.tolist() == [2 if step == 8 else 1 for step in range(STEPS)]
    (run,) = open_ledger(path).runs()
    assert run.repeated >= (counts == 2).sum()
    plan_only = SampledGaussian(NOISE, RATE, STEPS)
    assert true_epsilon(counts) > true_epsilon(np.ones(STEPS)) > 0
    assert (
        accounting.get_accountant("exact").epsilon(run.history, DELTA)
        >= true_epsilon(counts) - 1e-9
    )
    assert accounting.get_accountant("exact").epsilon([plan_only], DELTA) < true_epsilon(counts)
