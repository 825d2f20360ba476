"""Ranks that are killed at random instants: what was released is in the ledger, and nobody waits.

    python -m tests.distributed.kills 50

kills a rank of a two-process run 50 times and goes on from the last checkpoint each time, on one, two
or four ranks in turn. The oracle is a table in shared memory in which each rank marks a step once its
noise was drawn, before anything else can see it.
"""

from __future__ import annotations

import faulthandler
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dptorch import accounting
from dptorch.accounting import SampledGaussian
from dptorch.ledger import open_ledger
from dptorch.ledger.counting import Attempts
from tests.distributed.processes import start
from tests.ledger.lives import DELTA, EPSILON, NOISE, READY, go_on, watch
from tests.ledger.processes import kill, shared, until, wait

__all__ = ["check", "lives"]

AT_MOST = 3  # releases after the one that the kill waits for
GOALS = 6  # a kill waits for fewer releases than these


def life(folder: Path, row: np.ndarray, goal: int | None) -> None:
    """On a rank: go on from the last checkpoint to the end of the plan, and mark what is released.

    goal: of the rank that will be killed: it does not go on for ever, however late the kill comes.
    """

    def seen(step: int) -> None:
        row[step] += 1
        while goal is not None and row[:READY].sum() >= goal + AT_MOST:
            signal.pause()

    watch(seen)
    go_on(str(folder / "ledger.db"), folder / "run.pt", row, "data", save_every=3)


def lives(kills: int, folder: Path, say: Callable[[str], object] = lambda line: None) -> np.ndarray:
    """Kill a rank `kills` times, then let the run end; returns [lives, ranks, steps + 2]."""
    chance = random.Random(0)
    table = shared((kills + 1, 4, (GOALS + AT_MOST) * kills + 6 + 2))
    killed = 0
    for i in range(kills + 1):
        size = (2, 4, 1)[i % 3] if i < kills else 2
        place = folder / f"life-{i}"
        place.mkdir()
        victim, goal = (chance.randrange(size), chance.randrange(GOALS)) if i < kills else (-1, 0)

        def work(rank: int, i: int = i, victim: int = victim, goal: int = goal) -> None:
            faulthandler.disable()  # gloo ends those whose peer was killed: what is meant to happen
            life(folder, table[i, rank], goal if rank == victim else None)

        pids = start(size, place, work)
        if i == kills:
            assert [wait(pid) for pid in pids] == [0] * size
            break
        until(
            lambda i=i, victim=victim, goal=goal: (  # type: ignore[misc]
                table[i, victim, READY] and table[i, victim, :READY].sum() >= goal
            ),
            pids[victim],
        )
        for _ in range(chance.randrange(2000)):
            pass
        code = kill(pids[victim])
        codes = [wait(pid) for r, pid in enumerate(pids) if r != victim]  # a hang would stay here
        killed += code < 0
        say(f"life {i}: {size} ranks, rank {victim} ended with {code}, the others with {codes}")
    assert killed == kills
    return table


def check(folder: Path, table: np.ndarray) -> dict[str, float]:
    """Assert that the ledger has every release of every life, and that ε was told as it is."""
    entries = open_ledger(folder / "ledger.db").entries(dataset="data")
    counted = Attempts.of(e for e in entries if e.kind in ("steps", "close"))
    # Ranks of one life release a step together: once.
    released = table[:, :, :READY].max(1).sum(0)
    for step in range(len(released)):
        assert counted.times(step) >= released[step] >= 1, f"step {step} is missing"
    history = Attempts()
    for step in range(len(released)):
        for _ in range(released[step]):
            history.add(SampledGaussian(NOISE, 1.0, 1), step, 1)
    truth = accounting.get_accountant("exact").epsilon(history.events(), DELTA)
    told = table[-1, :2, EPSILON] / 1e6
    assert told[0] == told[1] >= truth - 1e-5
    return {"released": int(released.sum()), "counted": counted.total, "told": float(told[0])}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        found = lives(int(sys.argv[1]), where, print)
        print(check(where, found))
