"""32 processes that write to one capped data set at once: never over the cap, nothing lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dptorch
from dptorch.accounting import Event
from dptorch.errors import BudgetExhausted
from dptorch.ledger import Cap, open_ledger, record
from dptorch.ledger.budget import adaptive_epsilon
from tests.ledger.processes import kill, shared, spawn, until, wait

WRITERS, KILLED = 32, 8
PLAN = dptorch.make_plan(
    sample_rate=1.0, sample_size=100, steps=5, noise_multiplier=6.0, target_delta=1e-5
)
STEPS, REFUSED = 0, 1  # columns of the table: what each writer did
LOOKED, GO = 0, 1  # and of the table of the negative control


def cap_for(runs: int) -> Cap:
    return Cap(adaptive_epsilon([PLAN.event(PLAN.steps * runs)], 1e-5) * 1.0001, 1e-5)


def writer(location: str, row: np.ndarray, seed: int) -> None:
    """Begin run after run, each of some of its planned steps, until the budget is gone."""
    chance = random.Random(seed)
    patients = open_ledger(location, timeout_s=3600).dataset("shared")
    for _ in range(4):
        run = patients.run(PLAN, "operating system")
        try:
            for step in range(chance.randrange(1, PLAN.steps + 1)):
                run.count(step, PLAN.event(1))
                row[STEPS] += 1
            run.close()
        except BudgetExhausted:
            row[REFUSED] += 1
            return


def committed_over_time(location: str) -> Iterator[float]:
    """What was spent or reserved after each entry."""
    committed: dict[str, list[Event]] = {}
    for entry in open_ledger(location).entries(dataset="shared"):
        if entry.kind in ("begin", "reserve", "close"):
            committed[str(entry.run)] = [Event.from_dict(e) for e in entry.detail["committed"]]
            steps = sum(e.steps for events in committed.values() for e in events)
            yield adaptive_epsilon([PLAN.event(steps)], 1e-5)


def written_at_once(location: str) -> tuple[np.ndarray, list[int]]:
    """32 processes write, of which eight are killed: what each has noted, and how it ended."""
    table = shared((WRITERS, 2))
    children = [
        spawn(lambda row=row, seed=seed: writer(location, row, seed))  # type: ignore[misc]
        for seed, row in enumerate(table)
    ]
    until(lambda: table[:, STEPS].sum() >= 20, *children)  # in the middle of the work
    killed = [kill(pid) for pid in children[:KILLED]]
    return table, [*killed, *(wait(pid) for pid in children[KILLED:])]


@pytest.mark.slow
def test_32_writers_stay_below_the_cap_and_lose_nothing(
    location: str, small_process: Executor
) -> None:
    cap = cap_for(20)
    open_ledger(location).dataset("shared").set_cap(cap)
    table, codes = small_process.submit(written_at_once, location).result()
    assert set(codes[:KILLED]) <= {0, -9}
    assert codes[KILLED:] == [0] * (WRITERS - KILLED)
    opened = open_ledger(location)
    total = opened.dataset("shared").total()
    # A killed writer may have died between the ledger's entry and its own note of it.
    assert 0 <= total.steps - table[:, STEPS].sum() <= KILLED
    assert max(committed_over_time(location)) <= cap.epsilon
    assert total.adaptive <= total.committed <= cap.epsilon
    assert table[:, REFUSED].sum() > 0, "the cap was never reached: the test says nothing"
    assert opened.verify().problems == []
    kept = {run.run: run.steps for run in opened.runs()}
    assert sum(kept.values()) == total.steps


@pytest.mark.slow
def test_looking_before_locking_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: eight writers that decide on what they read before they had the lock, and
    before any of them wrote."""
    location = str(tmp_path / "ledger.db")
    cap = cap_for(6)
    open_ledger(location).dataset("shared").set_cap(cap)
    read = record.committed_in

    def stale(transaction: Any, dataset: str) -> dict[str, list[Event]]:
        return seen

    seen: dict[str, list[Event]] = {}

    def hasty(row: np.ndarray) -> None:
        opened = open_ledger(location, timeout_s=3600)
        with opened.store.read() as transaction:
            seen.update(read(transaction, "shared"))
        row[LOOKED] = 1
        until(lambda: row[GO])
        opened.dataset("shared").run(PLAN, "operating system").open()

    monkeypatch.setattr(record, "committed_in", stale)
    table = shared((8, 2))
    children = [spawn(lambda row=row: hasty(row)) for row in table]  # type: ignore[misc]
    until(table[:, LOOKED].all, *children)
    table[:, GO] = 1
    assert [wait(pid) for pid in children] == [0] * 8
    assert max(committed_over_time(location)) > cap.epsilon
