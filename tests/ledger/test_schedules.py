"""Random schedules of pause, resume, kill and copy over four processes: what was released is counted.

Four processes are forked once and told by pipes what to do: begin a run, go on with any checkpoint
that any of them has saved, take steps, save, pause, close a run from outside. What is told in one
round happens at once. Processes are killed in the middle of it. The file of the ledger is copied, and
put back later. The oracle is a table in shared memory in which a process marks each step right after
its noise was drawn. Real engines, real ledgers, real checkpoints, SIGKILL.
"""

from __future__ import annotations

import math
import random
import sqlite3
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dptorch
from dptorch.accounting import SampledGaussian
from dptorch.errors import BudgetExhausted, LedgerError, PrivacyWarning
from dptorch.ledger import Cap, open_ledger
from dptorch.ledger.budget import adaptive_epsilon, planned_epsilon
from dptorch.ledger.counting import Attempts
from dptorch.ledger.record import RunLedger
from dptorch.noise import GaussianNoise
from tests.engine.setup import SIZE, make_data, make_model
from tests.ledger.processes import kill, shared, spawn, until

PROCESSES, RUNS, STEPS, ROUNDS = 4, 40, 8, 6
COMMANDS = ["begin", *["resume"] * 2, *["step"] * 4, "save", "pause", "close"]
SCHEDULES = {"sqlite": 200, "postgresql": 40}
# Without sampling ε is a closed form, so that a process spends its life in steps and not in numerics.
NOISE, RATE, DELTA = 4.0, 1.0, 1e-3
CAP = adaptive_epsilon([SampledGaussian(NOISE, RATE, int(2.7 * STEPS))], DELTA)
WHOLE_RUN = planned_epsilon([SampledGaussian(NOISE, RATE, STEPS)], DELTA)


@dataclass(frozen=True)
class Place:
    """Where a schedule happens."""

    location: str
    dataset: str
    folder: Path
    steps_per_write: int


# -- a process -------------------------------------------------------------------------------------


class Process:
    """What one of the four holds: at most one engine."""

    def __init__(self, marks: np.ndarray) -> None:
        self.marks = marks  # [RUNS, STEPS]
        self.engine: Any = None
        self.run = -1

    def begin(self, place: Place, run: int, number: int) -> None:
        self._make(place)
        self.run = run
        self.engine.save_checkpoint(place.folder / f"{run}-{number}.pt")

    def resume(self, place: Place, run: int, number: int) -> None:
        self._make(place)
        self.engine.load_checkpoint(place.folder / f"{run}-{number}.pt")
        self.run = run

    def _make(self, place: Place) -> None:
        self.ledger = open_ledger(
            place.location, steps_per_write=place.steps_per_write, timeout_s=120
        ).dataset(place.dataset)
        model = make_model()
        self.engine = dptorch.PrivacyEngine(
            model,
            sample_rate=RATE,
            sample_size=SIZE,
            steps=STEPS,
            noise_multiplier=NOISE,
            target_delta=DELTA,
            accountant="exact",
            self_check=False,
            ledger=self.ledger,
        )
        self.optimizer = self.engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))

    def step(self, times: int) -> None:
        if self.engine is None or self.engine.exhausted:
            return
        loader = self.engine.loader(make_data())
        last = min(STEPS, self.engine.steps_done + times)
        while self.engine.steps_done < last:
            for x, y in loader:
                F.cross_entropy(self.engine.model(x), y).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.engine.steps_done >= last:
                    break

    def save(self, place: Place, number: int) -> tuple[int, int] | None:
        if self.engine is None:
            return None
        self.engine.save_checkpoint(place.folder / f"{self.run}-{number}.pt")
        return self.run, number

    def pause(self) -> None:
        if self.engine is not None:
            self.engine.release_budget()

    def close(self, place: Place, run: str) -> None:
        ledger = open_ledger(place.location, timeout_s=120)
        try:
            ledger.close_run(run)
        finally:
            ledger.store.close()

    def forget(self) -> None:
        self.engine = None

    def id(self) -> str | None:
        return None if self.engine is None else str(self.engine.ledger_run["run"])


def serve(pipe: Connection, marks: np.ndarray, breakage: Callable[[], None]) -> None:
    """In a child: do what the pipe says, and reply with (what came of it, the run's id)."""
    warnings.simplefilter("ignore", PrivacyWarning)
    torch.set_num_threads(1)
    breakage()
    process = Process(marks)
    privatize = GaussianNoise.privatize

    def seen(self: GaussianNoise, clipped: Any, key: Any, step: int, **kwargs: Any) -> Any:
        noisy = privatize(self, clipped, key, step, **kwargs)
        marks[process.run, step] += 1
        return noisy

    GaussianNoise.privatize = seen  # type: ignore[method-assign]
    while True:
        name, *arguments = pipe.recv()
        found: Any = None
        try:
            found = getattr(process, name)(*arguments)
        except (LedgerError, BudgetExhausted) as error:
            found = type(error).__name__
            if name in ("begin", "resume"):
                process.forget()
        pipe.send(found)


# -- the schedule ----------------------------------------------------------------------------------


@dataclass
class Crew:
    """The four processes."""

    table: np.ndarray  # [PROCESSES, RUNS, STEPS]: releases
    breakage: Callable[[], None]
    pids: list[int] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)

    def start(self, i: int) -> None:
        mine, theirs = Pipe()
        pid = spawn(lambda: serve(theirs, self.table[i], self.breakage))
        theirs.close()
        self.pids[i : i + 1], self.pipes[i : i + 1] = [pid], [mine]

    def killed(self, i: int) -> None:
        assert kill(self.pids[i]) == -9, "a process failed by itself"
        self.pipes[i].close()
        self.start(i)

    def ask(self, i: int, *command: Any) -> Any:
        self.pipes[i].send(command)
        return self.pipes[i].recv()


@contextmanager
def crew(breakage: Callable[[], None] = lambda: None) -> Iterator[Crew]:
    found = Crew(shared((PROCESSES, RUNS, STEPS)), breakage)
    try:
        for i in range(PROCESSES):
            found.start(i)
        yield found
    finally:
        for pid in found.pids:
            kill(pid)


class Schedule:
    """One random schedule, and what it must have led to."""

    def __init__(
        self, crew: Crew, place: Place, chance: random.Random, tally: Counter[str]
    ) -> None:
        self.crew, self.place, self.chance, self.tally = crew, place, chance, tally
        self.busy: set[int] = set()  # processes that have a run
        self.checkpoints: list[tuple[int, int]] = []  # (run, number): files that are whole
        self.ids: dict[int, str] = {}  # of the runs
        self.files = 0
        self.runs = 0
        self.lost = np.zeros((RUNS, STEPS), int)  # released, and not in the copy that was put back
        self.copy: tuple[Path, np.ndarray] | None = None
        crew.table[:] = 0
        for i in range(PROCESSES):
            crew.ask(i, "forget")
        ledger = open_ledger(place.location)
        ledger.dataset(place.dataset).set_cap(Cap(CAP, DELTA))
        ledger.store.close()

    @property
    def released(self) -> np.ndarray:
        """[RUNS, STEPS]: how often each step was, of what the ledger can know."""
        return self.crew.table.sum(0) - self.lost

    def play(self) -> None:
        for _ in range(ROUNDS):
            self.round()
            if "://" not in self.place.location and self.chance.random() < 0.2:
                self.put_back_or_copy()

    def command(self, i: int) -> tuple[Any, ...]:
        """What process `i` is told to do: to take up a run, if it has none to go on with."""
        self.files += 1
        name = self.chance.choice(COMMANDS)
        if i not in self.busy and name in ("step", "save", "pause"):
            name = "resume" if self.runs else "begin"
        if name == "begin" and self.runs < RUNS:
            self.runs += 1
            return "begin", self.place, self.runs - 1, self.files
        if name in ("begin", "resume") and self.checkpoints:
            return "resume", self.place, *self.chance.choice(self.checkpoints)
        if name == "save":
            return "save", self.place, self.files
        if name == "pause":
            return ("pause",)
        if name == "close" and self.ids:
            return "close", self.place, self.chance.choice(list(self.ids.values()))
        return "step", self.chance.randrange(1, 5)

    def round(self) -> None:
        """All at once, one of them perhaps killed in the middle."""
        told = {i: self.command(i) for i in range(PROCESSES) if self.chance.random() < 0.85}
        victim = self.chance.choice([*told]) if told and self.chance.random() < 0.3 else None
        before = self.crew.table.sum((1, 2))
        for i, command in told.items():
            self.crew.pipes[i].send(command)
        if victim is not None:
            if told[victim][0] == "step":  # a step further, however busy the machine is
                until(
                    lambda: (
                        self.crew.table[victim].sum() > before[victim]
                        or self.crew.pipes[victim].poll()
                    )
                )
            time.sleep(self.chance.random() * 0.03)
            self.crew.killed(victim)
            self.tally["kills"] += 1
            self.busy.discard(victim)
            del told[victim]
        for i, command in told.items():
            found = self.crew.pipes[i].recv()
            self.tally[f"{command[0]} {found if isinstance(found, str) else 'done'}"] += 1
            if command[0] in ("begin", "resume"):
                (self.busy.add if found is None else self.busy.discard)(i)
            if command[0] == "begin" and found is None:
                self.checkpoints.append(command[2:])
                self.ids[command[2]] = self.crew.ask(i, "id")
            elif command[0] == "save" and found is not None:
                self.checkpoints.append(found)

    def put_back_or_copy(self) -> None:
        """Copy the ledger's file; or put the last copy in its place, under open connections."""
        if self.copy is None or self.chance.random() < 0.5:
            path = self.place.folder / "copy.db"
            path.unlink(missing_ok=True)
            with (
                closing(sqlite3.connect(self.place.location)) as source,
                closing(sqlite3.connect(path)) as target,
            ):
                source.backup(target)
            self.copy = path, self.released.copy()
            return
        path, released = self.copy
        self.tally["copies put back"] += 1
        for suffix in ("-wal", "-shm"):
            Path(self.place.location + suffix).unlink(missing_ok=True)
        path.rename(self.place.location)
        self.lost += self.released - released
        self.copy = None

    def problems(self) -> list[str]:
        """What is wrong now: releases that are not counted, or a cap that counts too little."""
        ledger = open_ledger(self.place.location)
        try:
            entries = ledger.entries(dataset=self.place.dataset)
            total = ledger.dataset(self.place.dataset).total()
            broken = ledger.verify().problems
        finally:
            ledger.store.close()
        found = [f"chain: {problem}" for problem in broken]
        for run, id in self.ids.items():
            attempts = Attempts.of(e for e in entries if e.run == id)
            counted = np.array([attempts.times(step) for step in range(STEPS)])
            if (counted < self.released[run]).any():
                found.append(f"run {run}: released {self.released[run]}, counted {counted}")
        spent = true_epsilon(self.released)
        if spent > total.committed * (1 + 1e-9):
            found.append(f"the cap counts {total.committed:.4f} where {spent:.4f} was spent")
        if total.committed > CAP * (1 + 1e-6):
            found.append(f"the cap of {CAP:.4f} admitted {total.committed:.4f}")
        return found


def true_epsilon(released: np.ndarray) -> float:
    """ε of releasing each step of each run so often: in the adaptive count, or in that of its plan for
    one run alone of which no step was released again."""
    history = [
        SampledGaussian(NOISE / times**0.5, RATE, steps)
        for times, steps in sorted(Counter(int(n) for n in released.flat).items())
        if times
    ]
    if not history:
        return 0.0
    alone = released.any(1).sum() == 1 and released.max() == 1
    return min(adaptive_epsilon(history, DELTA), WHOLE_RUN if alone else math.inf)


def play(
    crew: Crew, tmp_path: Path, seed: int, tally: Counter[str], server: str | None
) -> list[str]:
    """Play one schedule; returns what is wrong after it."""
    chance = random.Random(seed)
    folder = tmp_path / str(seed)
    folder.mkdir()
    location = server or str(folder / "ledger.db")
    place = Place(location, f"data-{seed}", folder, steps_per_write=chance.choice((1, 1, 3)))
    schedule = Schedule(crew, place, chance, tally)
    schedule.play()
    tally["releases"] += int(schedule.released.sum())
    tally["released again"] += int((schedule.released > 1).sum())
    return [f"schedule {seed}: {problem}" for problem in schedule.problems()]


def imports(folder: Path) -> None:
    """Import what training imports late, before forking."""
    place = Place(str(folder / "warm.db"), "warm", folder, 1)
    process = Process(np.zeros((RUNS, STEPS), int))
    process.begin(place, 0, 0)
    process.step(2)
    process.pause()
    process.ledger.store.close()


def played(folder: Path, server: str | None) -> list[str]:
    """Play all schedules; returns what is wrong after any of them."""
    imports(folder)
    schedules = SCHEDULES["postgresql" if server else "sqlite"]
    # What the schedules are for, and how often each must have happened. Which process comes first is
    # the machine's to decide, so that more are played where these happened too seldom.
    wanted = {
        "kills": schedules,
        "step LedgerError": schedules / 4,  # another process has the run
        "step BudgetExhausted": schedules / 4,  # the cap is reached
        "released again": schedules / 2,
        "copies put back": 0 if server else schedules / 20,
    }
    tally: Counter[str] = Counter()
    problems: list[str] = []
    seed = 0
    with crew() as four:
        while seed < schedules or any(tally[name] < times for name, times in wanted.items()):
            assert seed < 5 * schedules, f"wanted {wanted}, found {tally}"
            problems += play(four, folder, seed, tally, server)
            seed += 1
    return problems


@pytest.mark.slow
def test_200_schedules_count_every_step(
    location: str, tmp_path: Path, small_process: Executor
) -> None:
    server = location if "://" in location else None
    assert small_process.submit(played, tmp_path, server).result() == []


def without_the_lease() -> None:
    RunLedger._refuse_unless_owned = lambda self, transaction: None  # type: ignore[method-assign]


def without_reading_anew() -> None:
    RunLedger._read = lambda self, transaction: self._in_ledger  # type: ignore[method-assign]


def noticed(folder: Path, breakage: Callable[[], None]) -> bool:
    """Whether a schedule notices that processes are broken."""
    imports(folder)
    with crew(breakage) as four:
        return any(play(four, folder, seed, Counter(), None) for seed in range(SCHEDULES["sqlite"]))


@pytest.mark.slow
@pytest.mark.parametrize("breakage", [without_the_lease, without_reading_anew])
def test_a_broken_lease_is_caught(
    breakage: Callable[[], None], tmp_path: Path, small_process: Executor
) -> None:
    """The broken twins."""
    assert small_process.submit(noticed, tmp_path, breakage).result(), "no schedule noticed"
