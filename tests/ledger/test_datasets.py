"""Entries, the chain, and what runs on one data set add up to, on both backends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dptorch
from dptorch import accounting
from dptorch.accounting import Adjacency, SampledGaussian
from dptorch.accounting.correlated import CorrelatedGaussian
from dptorch.accounting.events import (
    RandomAllocationGaussian,
    SampledDiscreteGaussian,
)
from dptorch.errors import BudgetExhausted, ConfigurationError, LedgerError, PrivacyError
from dptorch.ledger import Cap, open_ledger
from dptorch.ledger.budget import adaptive_epsilon, planned_epsilon
from dptorch.ledger.counting import Attempts
from dptorch.sampling import SCHEMES
from tests.ledger.setup import EDITS, OS, execute, plan, take


def test_runs_on_one_data_set_add_up_and_others_do_not(location: str) -> None:
    ledger = open_ledger(location)
    first, second = plan(10, 2.0), plan(20, 3.0, 0.2)
    take(ledger.dataset("a"), 10, first)
    take(ledger.dataset("a"), 5, second)
    take(ledger.dataset("b"), 7, first)
    again = open_ledger(location, create=False)
    total = again.dataset("a").total(1e-5)
    history = [SampledGaussian(2.0, 0.1, 10), SampledGaussian(3.0, 0.2, 5)]
    expected = accounting.get_accountant("pld").epsilon(history, 1e-5, adjacency=Adjacency.ZERO_OUT)
    assert (total.runs, total.steps) == (2, 15)
    assert total.planned == pytest.approx(expected, rel=1e-12)
    assert total.adaptive == total.committed > total.planned
    assert [run.history for run in again.dataset("b").runs()] == [[SampledGaussian(2.0, 0.1, 7)]]
    assert again.datasets() == ["a", "b"]
    assert not again.verify().problems


def test_a_resumed_run_counts_lost_steps_as_repeats_on_the_same_batch(location: str) -> None:
    patients = open_ledger(location).dataset("a")
    p = plan(10, 2.0)
    record = patients.run(p, OS)
    for step in range(8):
        record.count(step, p.event(1))
    # Killed here; the last checkpoint is of step 5.
    patients = open_ledger(location).dataset("a")
    resumed = patients.run(p, OS, run=record.run, steps_done=5)
    assert resumed.repeated_steps == 3
    for step in range(5, 10):
        resumed.count(step, p.event(1))
    twice = SampledGaussian(2.0 / 2**0.5, 0.1, 3)
    assert resumed.attempts.events() == [SampledGaussian(2.0, 0.1, 7), twice]
    (run,) = patients.runs()
    assert (run.steps, run.repeated, run.open) == (10, 3, False)
    assert run.history == resumed.attempts.events()
    # Three more sampled steps would be too few: the same batch was seen twice.
    naive = planned_epsilon([SampledGaussian(2.0, 0.1, 13)], 1e-5)
    assert planned_epsilon(run.history, 1e-5) > naive


def test_two_releases_on_one_batch_cost_what_is_counted() -> None:
    """Brute force in two dimensions: one batch released twice, against two batches."""
    sigma, rate, epsilon = 1.0, 0.05, 1.0
    axis = np.linspace(-8, 9, 1201)
    cell = (axis[1] - axis[0]) ** 2
    absent, present = (np.exp(-((axis - at) ** 2) / 2) / np.sqrt(2 * np.pi) for at in (0, 1))
    q = np.outer(absent, absent)
    mixed = rate * present + (1 - rate) * absent
    one_batch = rate * np.outer(present, present) + (1 - rate) * q
    delta = [
        float(np.maximum(p - np.exp(epsilon) * q, 0).sum() * cell)
        for p in (one_batch, np.outer(mixed, mixed))
    ]
    exact = accounting.get_accountant("exact")
    attempts = Attempts()
    for _ in range(2):
        attempts.add(SampledGaussian(sigma, rate, 1), first=0, steps=1)
    assert exact.delta(attempts.events(), epsilon) == pytest.approx(delta[0], rel=1e-3)
    # Negative control: as two sampled steps it would be counted far too low.
    independent = exact.delta([SampledGaussian(sigma, rate, 2)], epsilon)
    assert independent == pytest.approx(delta[1], rel=1e-3)
    assert delta[0] > 1.5 * delta[1]


def test_a_repeated_step_of_an_epoch_repeats_the_epoch() -> None:
    event = RandomAllocationGaussian(2.0, steps_per_epoch=10, steps=1)
    attempts = Attempts()
    attempts.add(event, first=0, steps=25)
    attempts.add(event, first=12, steps=1)
    assert [(e.noise_multiplier, e.epochs) for e in attempts.events()] == [
        (2.0, 2),
        (2.0 / 2**0.5, 1),
    ]


def test_a_repeated_discrete_step_is_counted_without_sampling() -> None:
    event = SampledDiscreteGaussian(2.0, 0.1, 1)
    attempts = Attempts()
    attempts.add(event, first=0, steps=5)
    attempts.add(event, first=3, steps=2)
    assert attempts.events() == [
        SampledDiscreteGaussian(2.0, 0.1, 3),
        SampledDiscreteGaussian(2.0, 1.0, 4),
    ]


def test_a_mechanism_that_is_no_sequence_of_steps_is_refused() -> None:
    attempts = Attempts()
    attempts.add(CorrelatedGaussian(2.0, 1.0, 1), first=0, steps=1)
    with pytest.raises(PrivacyError, match="no rule"):
        attempts.events()


def test_a_checkpoint_from_before_the_ledger_is_counted_when_the_run_opens(location: str) -> None:
    patients = open_ledger(location).dataset("a")
    record = patients.run(plan(10), OS, steps_done=4)
    assert record.repeated_steps == 0
    record.count(4, plan(10).event(1))
    (run,) = patients.runs()
    assert run.history == [SampledGaussian(2.0, 0.1, 5)]


def test_a_block_counts_in_full_unless_the_run_ends_well(location: str) -> None:
    p = plan(10)
    patients = open_ledger(location, steps_per_write=4).dataset("a")
    killed, ended = patients.run(p, OS), patients.run(p, OS)
    for record in (killed, ended):
        for step in range(5):
            record.count(step, p.event(1))
    ended.close()
    assert killed.attempts.events() == ended.attempts.events() == [SampledGaussian(2.0, 0.1, 5)]
    steps = {run.run: run.steps for run in patients.runs()}
    assert steps == {killed.run: 8, ended.run: 5}
    for step in range(5, 10):
        ended.count(step, p.event(1))
    assert patients.runs()[1].history == [SampledGaussian(2.0, 0.1, 10)]


def test_a_step_past_the_plan_or_out_of_order_is_refused_unspent(location: str) -> None:
    patients = open_ledger(location).dataset("a")
    p = plan(2)
    record = patients.run(p, OS)
    with pytest.raises(BudgetExhausted, match="expects step 0"):
        record.count(1, p.event(1))
    for step in range(2):
        record.count(step, p.event(1))
    with pytest.raises(BudgetExhausted, match="not taken"):
        record.count(2, p.event(1))
    assert patients.runs()[0].steps == 2


def test_of_two_processes_that_go_on_with_one_run_the_earlier_is_shut_out(location: str) -> None:
    p = plan(10)
    first = open_ledger(location).dataset("a").run(p, OS)
    first.count(0, p.event(1))
    second = open_ledger(location).dataset("a").run(p, OS, run=first.run, steps_done=1)
    second.count(1, p.event(1))
    with pytest.raises(LedgerError, match="another process"):
        first.count(1, p.event(1))
    first.close()  # must not close what is no longer its own
    second.count(2, p.event(1))
    assert open_ledger(location).runs()[0].history == [SampledGaussian(2.0, 0.1, 3)]


@pytest.mark.parametrize("wrong", ["run", "plan", "dataset"])
def test_a_run_the_ledger_knows_otherwise_is_refused(location: str, wrong: str) -> None:
    ledger = open_ledger(location)
    run = take(ledger.dataset("a"), 1)
    head = ledger.head()
    patients = ledger.dataset("b" if wrong == "dataset" else "a")
    with pytest.raises(LedgerError, match="does not know" if wrong == "run" else "run"):
        patients.run(
            plan(noise=9.0) if wrong == "plan" else plan(),
            OS,
            run="0" * 16 if wrong == "run" else run,
            steps_done=1,
        )
    assert ledger.head() == head


# -- budgets -------------------------------------------------------------------------------------------


def test_a_first_run_may_use_the_whole_cap_and_then_nothing_fits(location: str) -> None:
    patients = open_ledger(location).dataset("a")
    p = plan(50, 1.5, 0.2)
    patients.set_cap(Cap(p.epsilon(), 1e-5, Adjacency.ZERO_OUT))
    run = take(patients, 50, p)
    with pytest.raises(BudgetExhausted, match="Nothing was spent"):
        take(patients, 1, plan(1, 50.0))
    assert [r.run for r in patients.runs()] == [run]


def test_a_sole_run_keeps_its_reservation_when_it_stops_early(location: str) -> None:
    patients = open_ledger(location).dataset("a")
    p = plan(50, 1.5, 0.2)
    patients.set_cap(Cap(p.epsilon(), 1e-5, Adjacency.ZERO_OUT))
    take(patients, 10, p)
    with pytest.raises(BudgetExhausted):
        take(patients, 1, plan(1, 50.0))
    unused = open_ledger(location).dataset("b")
    unused.set_cap(Cap(p.epsilon(), 1e-5, Adjacency.ZERO_OUT))
    take(unused, 0, p)  # closed before its first step: nothing happened
    take(unused, 1, p)


def test_a_sole_run_changes_what_its_steps_are_under_the_adaptive_count_only(location: str) -> None:
    """What a later step is to be may be chosen after looking at the earlier ones."""
    patients = open_ledger(location).dataset("a")
    p, other = plan(10, 2.0, 0.1), SampledGaussian(2.0, 0.11, 1)  # as of another loader
    mixed = [p.event(1), replace(other, steps=9)]
    room = planned_epsilon(mixed, 1e-5, Adjacency.ZERO_OUT) * 1.01
    assert room < adaptive_epsilon(p.history(10), 1e-5, Adjacency.ZERO_OUT)
    patients.set_cap(Cap(room, 1e-5))
    run = patients.run(p, OS)
    run.count(0, p.event(1))
    with pytest.raises(BudgetExhausted, match="Nothing was spent"):
        run.count(1, other)
    run.count(1, p.event(1))  # as planned
    patients.set_cap(Cap(adaptive_epsilon(mixed, 1e-5, Adjacency.ZERO_OUT) * 1.2, 1e-5))
    run.count(2, other)
    from_the_first = open_ledger(location).dataset("b")
    from_the_first.set_cap(Cap(room, 1e-5))
    begun = from_the_first.run(p, OS)
    for step in range(10):
        begun.count(step, other)


def test_the_planned_count_is_not_for_a_run_that_has_stopped_early(location: str) -> None:
    """It may have stopped for what it had shown."""
    patients = open_ledger(location).dataset("a")
    p = plan(10, 2.0)
    planned, adaptive = (
        f(p.history(4), 1e-5, Adjacency.ZERO_OUT) for f in (planned_epsilon, adaptive_epsilon)
    )
    assert planned * 1.05 < adaptive
    take(patients, 4, p)
    with pytest.raises(ConfigurationError, match="too late"):
        patients.set_cap(Cap(planned * 1.05, 1e-5))
    patients.set_cap(Cap(adaptive, 1e-5))
    whole = open_ledger(location).dataset("b")
    take(whole, 4, plan(4, 2.0))
    whole.set_cap(Cap(planned * 1.05, 1e-5))


def test_runs_share_a_cap_and_give_back_what_they_do_not_use(location: str) -> None:
    patients = open_ledger(location).dataset("a")
    p = plan(50, 3.0, 0.1)
    room = adaptive_epsilon([p.event(100)], 1e-5)
    patients.set_cap(Cap(room * 1.001, 1e-5))
    record = patients.run(p, OS)
    record.open()
    take(patients, 20, p)  # reserves 50, uses 20
    with pytest.raises(BudgetExhausted, match="other runs"):
        take(patients, 60, plan(60, 3.0, 0.1))
    take(patients, 30, plan(30, 3.0, 0.1))
    with pytest.raises(BudgetExhausted):
        take(patients, 1, p)
    patients.ledger.close_run(record.run)
    take(patients, 50, p)
    total = patients.total()
    assert total.steps == 100
    assert total.adaptive <= total.cap.epsilon if total.cap else False
    with pytest.raises(LedgerError, match="another process"):
        record.count(0, p.event(1))  # it was closed as dead, and may not come back unasked


def test_a_cap_below_what_is_spent_is_refused_and_can_be_lifted(location: str) -> None:
    patients = open_ledger(location).dataset("a")
    take(patients, 10)
    with pytest.raises(ConfigurationError, match="too late"):
        patients.set_cap(Cap(1e-3, 1e-5))
    patients.set_cap(Cap(50.0, 1e-5))
    assert patients.cap == Cap(50.0, 1e-5)
    patients.set_cap(None)
    assert patients.cap is None


def test_another_unit_is_refused_under_a_cap(location: str) -> None:
    patients = open_ledger(location).dataset("a")
    patients.set_cap(Cap(50.0, 1e-5, unit="user"))
    with pytest.raises(BudgetExhausted, match="'user'"):
        take(patients, 1)


def by_scheme(sampling: str) -> dptorch.PrivacyPlan:
    return dptorch.make_plan(
        batch_size=5,
        sample_size=100,
        epochs=1,
        noise_multiplier=2.0,
        target_delta=1e-5,
        sampling=sampling,
    )


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SCHEMES)
@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_a_cap_and_a_total_hold_for_schemes_that_their_adjacency_covers(
    tmp_path: Path, sampling: str, adjacency: Adjacency
) -> None:
    p = by_scheme(sampling)
    ledger = open_ledger(tmp_path / "ledger.db")
    capped, free = ledger.dataset("capped"), ledger.dataset("free")
    capped.set_cap(Cap(1e4, 1e-5, adjacency))
    run = take(free, 1, p)
    if adjacency in SCHEMES[sampling].adjacencies:
        take(capped, 1, p)
        assert free.total(adjacency=adjacency).adjacency is capped.total().adjacency is adjacency
        free.set_cap(Cap(1e4, 1e-5, adjacency))
        return
    with pytest.raises(ConfigurationError, match=f"{sampling}.*Nothing was spent.*'zero-out'"):
        take(capped, 1, p)
    assert capped.runs() == []
    for refused in (
        lambda: free.total(adjacency=adjacency),
        lambda: free.set_cap(Cap(1e4, 1e-5, adjacency)),
    ):
        with pytest.raises(ConfigurationError, match=f"does not cover run {run}.*'zero-out'"):
            refused()
    assert free.cap is None


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SCHEMES)
def test_the_default_cap_and_total_cover_every_scheme(tmp_path: Path, sampling: str) -> None:
    patients = open_ledger(tmp_path / "ledger.db").dataset("a")
    patients.set_cap(Cap(1e4, 1e-5))
    take(patients, 1, by_scheme(sampling))
    patients.set_cap(None)
    assert patients.total().adjacency is Adjacency.ZERO_OUT


@pytest.mark.parametrize(
    "values",
    [
        (0.0, 1e-5),
        (float("inf"), 1e-5),
        (1.0, 0.0),
        (1.0, 1.0),
        ("1", 1e-5),
        (True, 1e-5),
        (1.0, None),
        (1.0, 1e-5, "zero-out", "usr"),
        (1.0, 1e-5, "zero-out", None),
    ],
)
def test_an_impossible_cap_is_refused(values: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigurationError, match="of a cap"):
        Cap(*values)


def test_what_is_no_ledger_of_a_data_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    for settings in ({"steps_per_write": 1.5}, {"timeout_s": "x"}, {"timeout_s": -1}):
        with pytest.raises(ConfigurationError, match=next(iter(settings))):
            open_ledger(path, **settings)
    for location in (None, "", 5):
        with pytest.raises(ConfigurationError, match="no place of a ledger"):
            open_ledger(location)
    assert not path.exists()
    ledger = open_ledger(path)
    for other in (str(path), path, ledger):
        with pytest.raises(ConfigurationError, match="expected the ledger of one data set"):
            dptorch.PrivacyEngine(torch.nn.Linear(2, 1), plan=plan(), ledger=other)
    with pytest.raises(ConfigurationError, match=r"expected Cap\(epsilon, delta\)"):
        ledger.dataset("a").set_cap(8.0)
    for name in (None, 5):
        with pytest.raises(ConfigurationError, match="name is public"):
            ledger.dataset(name)
    take(ledger.dataset("a"), 1)
    with pytest.raises(LedgerError, match="does not know run"):
        ledger.close_run(None)
    assert "no entry has the pinned hash" in ledger.verify("é").problems[0]


# -- the chain -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS)
def test_every_kind_of_edit_is_found(location: str, edit: str) -> None:
    ledger = open_ledger(location)
    take(ledger.dataset("a"), 5)
    assert ledger.verify().problems == []
    execute(location, *EDITS[edit].split("; "))
    assert ledger.verify().problems


def test_an_entry_that_cannot_be_read_is_said_and_admits_nothing(tmp_path: Path) -> None:
    """SQLite keeps in a row whatever is written there."""
    ledger = open_ledger(tmp_path / "ledger.db")
    patients = ledger.dataset("a")
    take(patients, 5)
    row = "UPDATE dptorch_ledger_entries SET body = {} WHERE seq = 2"
    for body in ("X'00ff'", "'no JSON'", "'[]'", "'{}'"):
        execute(str(tmp_path / "ledger.db"), row.format(body))
        assert "entry 2 was edited" in ledger.verify().problems[0]
        for refused in (patients.total, patients.runs):
            with pytest.raises(LedgerError, match=r"cannot be read.*ledger verify"):
                refused()
        with pytest.raises(LedgerError, match=r"is broken.*Nothing was spent"):
            open_ledger(tmp_path / "ledger.db").dataset("a").run(plan(), OS).open()


def test_a_consistent_cut_is_found_by_a_pinned_head_only(location: str) -> None:
    ledger = open_ledger(location)
    take(ledger.dataset("a"), 5)
    pin = ledger.head()
    fourth = ledger.entries()[3]
    execute(
        location,
        EDITS["cut off"],
        f"UPDATE dptorch_ledger_head SET seq = 4, time = '{fourth.time}', hash = '{fourth.hash}'",
    )
    assert ledger.verify().problems == []  # nothing in the file can tell
    assert "cut off" in ledger.verify(pin).problems[0]
    assert ledger.verify(fourth.hash).problems == []


def test_with_a_key_nobody_else_can_rebuild_the_chain(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    path = tmp_path / "ledger.db"
    take(open_ledger(path, key_file=key).dataset("a"), 2)
    assert open_ledger(path, key_file=key).verify().problems == []
    with pytest.raises(ConfigurationError, match="--key-file"):
        open_ledger(path)
    key.write_bytes(b"x" * 32)
    assert len(open_ledger(path, key_file=key).verify().problems) == 5


def test_the_only_run_is_stated_as_it_was_admitted(location: str) -> None:
    """A run on its own fits its cap in the planned count, so that no more than that is shown of it."""
    p = plan(10, 2.0)
    patients = open_ledger(location).dataset("a")
    patients.set_cap(Cap(p.epsilon(), 1e-5, Adjacency.ZERO_OUT))
    take(patients, 7, p)
    total = patients.total()
    assert total.adaptive <= total.committed <= p.epsilon() * (1 + 1e-9)
    assert adaptive_epsilon(p.history(10), 1e-5, Adjacency.ZERO_OUT) > p.epsilon()
    assert total.left == 0.0  # a second run would be chosen after looking
    mixed = open_ledger(location).dataset("b")
    run = mixed.run(p, OS)
    run.count(0, p.event(1))
    run.count(1, SampledGaussian(2.0, 0.11, 1))  # so was this step
    steps = [p.event(1), SampledGaussian(2.0, 0.11, 9)]
    expected = adaptive_epsilon(steps, 1e-5, Adjacency.ZERO_OUT)
    assert mixed.total(1e-5).committed == pytest.approx(expected, rel=1e-9)


def test_a_run_that_went_back_is_stated_in_the_adaptive_count(location: str) -> None:
    """To release steps again may have been a choice made after looking, though all are of one kind."""
    p = plan(4, 2.0)
    patients = open_ledger(location).dataset("a")
    record = patients.run(p, OS)
    for step in range(4):
        record.count(step, p.event(1))
    resumed = open_ledger(location).dataset("a").run(p, OS, run=record.run, steps_done=0)
    for step in range(4):
        resumed.count(step, p.event(1))
    twice = [SampledGaussian(2.0 / 2**0.5, p.sample_rate, 4)]
    counted = adaptive_epsilon(twice, 1e-5, Adjacency.ZERO_OUT)
    assert patients.total(1e-5).committed == pytest.approx(counted, rel=1e-9)
    assert planned_epsilon(twice, 1e-5, Adjacency.ZERO_OUT) < counted
