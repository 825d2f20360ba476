"""Answers in the ledger: processes share one budget, die at any instant, and never overspend."""

from __future__ import annotations

import random
import threading
from functools import partial

import numpy as np
import pytest

from dptorch.errors import BudgetExhausted
from dptorch.ledger import open_ledger
from dptorch.plan.prediction_plan import PredictionPlan
from tests.ledger.processes import kill, shared, spawn, until, wait

OS = "operating system"
PLAN = PredictionPlan.make("gaussian", (4.0, 1e-5), queries=60, clip=1.0, models=10)


def answering(location: str, row: np.ndarray) -> None:
    """Charge one answer after the other until the budget is gone; count those that may be given."""
    answers = open_ledger(location, timeout_s=3600).dataset("patients").answers(PLAN, OS, "shop")
    while True:
        try:
            answers.charge([PLAN.event(1)])
        except BudgetExhausted:
            return
        row[0] += 1  # here an answer would leave the process


def charged(location: str) -> int:
    (run,) = open_ledger(location).dataset("patients").runs()
    assert run.repeated == 0
    return run.steps


@pytest.mark.slow
def test_processes_share_one_budget_and_never_overspend(location: str) -> None:
    table = shared((8, 1))
    children = [spawn(partial(answering, location, row)) for row in table]
    for child in children:
        wait(child)
    assert int(table.sum()) == charged(location) == PLAN.queries
    assert open_ledger(location).verify().problems == []


@pytest.mark.slow
def test_killed_predictors_never_answer_more_than_was_charged(location: str) -> None:
    chance, table = random.Random(0), shared((12, 1))
    for row in table:
        child = spawn(partial(answering, location, row))
        goal = chance.randrange(6)
        until(lambda row=row, goal=goal: row[0] >= goal, child)
        kill(child)
        if table.any():
            assert int(table.sum()) <= charged(location) <= PLAN.queries
    wait(spawn(partial(answering, location, table[0])))
    assert int(table.sum()) <= charged(location) == PLAN.queries


class AnswersBeforeItCharges:
    """A broken twin: the answer leaves, and then it is charged."""

    def __init__(self, location: str) -> None:
        self.inner = open_ledger(location).dataset("patients").answers(PLAN, OS, "shop")
        self.given = 0

    def answer(self) -> None:
        self.given += 1
        self.inner.charge([PLAN.event(1)])


def test_charging_after_the_answer_would_be_caught(location: str) -> None:
    twin = AnswersBeforeItCharges(location)
    for _ in range(PLAN.queries):
        twin.answer()
    with pytest.raises(BudgetExhausted):
        twin.answer()
    assert twin.given > charged(location)


def test_a_charge_is_all_or_nothing(location: str) -> None:
    answers = open_ledger(location).dataset("patients").answers(PLAN, OS, "shop")
    answers.charge([PLAN.event(50)])
    with pytest.raises(BudgetExhausted, match="pays for 10 more"):
        answers.charge([PLAN.event(6), PLAN.event(6)])
    answers.charge([PLAN.event(10)])
    assert answers.spent == pytest.approx(1.0)
    assert charged(location) == 60


def test_what_others_charge_is_seen(location: str) -> None:
    one, other = (
        open_ledger(location).dataset("patients").answers(PLAN, OS, "shop") for _ in range(2)
    )
    one.charge([PLAN.event(20)])
    other.charge([PLAN.event(30)])
    one.look()
    assert one.answered == other.answered == 50
    assert one.history == [PLAN.event(50)]
    with pytest.raises(BudgetExhausted):
        one.charge([PLAN.event(11)])


def test_waiting_charges_share_a_commit_and_none_is_lost(tmp_path, monkeypatch) -> None:
    ledger = open_ledger(tmp_path / "ledger.db")
    answers = ledger.dataset("patients").answers(PLAN, OS, "shop")
    answers.open()
    commits, granted, refused = [], [], []
    write = type(ledger.store).write

    def counted(store):
        commits.append(1)
        return write(store)

    monkeypatch.setattr(type(ledger.store), "write", counted)

    def charge() -> None:
        try:
            answers.charge([PLAN.event(1)])
        except BudgetExhausted as error:
            refused.append(error)
        else:
            granted.append(1)

    threads = [threading.Thread(target=charge) for _ in range(70)]
    with answers._lock:  # until all of them wait
        for thread in threads:
            thread.start()
        while len(answers._waiting) < len(threads):
            pass
    for thread in threads:
        thread.join()
    assert (len(granted), len(refused), len(commits)) == (60, 10, 1)
    assert charged(str(tmp_path / "ledger.db")) == 60
