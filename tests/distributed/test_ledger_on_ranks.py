"""Ledger and checkpoints on ranks: one keeps them, for all, and no rank is ahead of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dptorch
from dptorch.accounting import Event
from dptorch.engine.shared_ledger import SharedLedger
from dptorch.errors import LedgerError, PrivacyError
from dptorch.ledger import RunLedger, open_ledger
from dptorch.noise import GaussianNoise
from tests.distributed.kills import check, lives
from tests.distributed.processes import on_ranks
from tests.distributed.scenarios import loss_of, settings_of, train
from tests.engine.setup import make_data, make_model
from tests.ledger.processes import until

pytestmark = pytest.mark.slow


def watched(location: Path) -> list[tuple[list[bool], float, int]]:
    """Of each rank: whether the ledger had each step when its noise was drawn; ε; runs in the ledger.

    Each looks into the ledger through a connection of its own.
    """

    def work(rank: int) -> tuple[list[bool], float, int]:
        found = []
        plain = GaussianNoise.privatize

        def privatize(self, clipped, key, step, **more):  # type: ignore[no-untyped-def]
            entries = open_ledger(location, create=False).entries(dataset="data")
            steps = [e.first for e in entries if e.kind == "steps"]
            found.append(step in steps)
            location.with_name(f"noise-{rank}-{step}").touch()
            return plain(self, clipped, key, step, **more)

        GaussianNoise.privatize = privatize  # type: ignore[method-assign]
        try:
            ledger = open_ledger(location).dataset("data") if rank == 0 else None
            trained = train(ledger=ledger)
        finally:
            GaussianNoise.privatize = plain  # type: ignore[method-assign]
        return found, trained.epsilon, len(open_ledger(location).runs())

    return on_ranks(2, work)


def test_no_rank_steps_before_the_ledger_has_the_step(tmp_path: Path) -> None:
    alone = train().epsilon
    for found, epsilon, runs in watched(tmp_path / "ledger.db"):
        # Twice a step: `train` draws the noise of a sum of zeros too.
        assert found == [True] * 6
        assert epsilon == alone
        assert runs == 1


def test_the_watch_sees_a_ledger_that_the_other_ranks_do_not_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin: rank 0 tells that it has written before it has."""

    def late(self: SharedLedger, step: int, event: Event) -> None:
        kept, self._kept = self._kept, None
        with self._ranks.together():
            pass
        if kept is not None:
            until((tmp_path / f"noise-1-{step}").exists)
            self._kept = kept
            kept.count(step, event)

    monkeypatch.setattr(SharedLedger, "count", late)
    _, second = watched(tmp_path / "ledger.db")
    assert second[0][::2] == [False] * 3


def test_a_step_that_cannot_be_written_down_is_taken_by_no_rank(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[str, int, torch.Tensor]:
        model = make_model()
        ledger = open_ledger(tmp_path / "ledger.db").dataset("data")
        engine = dptorch.PrivacyEngine(model, **settings_of(), ledger=ledger)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))

        def full(self: RunLedger, step: int, event: object) -> None:
            raise LedgerError("the disk is full.")

        for x, y in engine.loader(make_data()):
            loss_of(model(x), y).backward()
            RunLedger.count = full  # type: ignore[method-assign,assignment]
            with pytest.raises(PrivacyError) as error:
                optimizer.step()
            values = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
            return str(error.value), engine.steps_done, values
        raise AssertionError

    before = torch.nn.utils.parameters_to_vector(make_model().parameters())
    (first, *rest), (second, *others) = on_ranks(2, work)
    assert first == "the disk is full."
    assert second.startswith("rank 0 of 2 stopped, and all ranks with it: LedgerError: the disk")
    for steps, values in (rest, others):
        assert steps == 0
        assert torch.equal(values, before)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4)])
def test_a_checkpoint_goes_on_on_another_number_of_ranks(
    before: int, after: int, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"

    def begin(rank: int) -> None:
        def save(engine: dptorch.PrivacyEngine) -> None:
            if engine.steps_done == 2:
                engine.save_checkpoint(path)

        train(each_step=save)

    def go_on(rank: int) -> tuple[torch.Tensor, float]:
        model = make_model()
        engine = dptorch.PrivacyEngine(model, **settings_of())
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.5))
        engine.load_checkpoint(path)
        for x, y in engine.loader(make_data()):
            loss_of(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        values = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        return values, engine.get_privacy_spent().epsilon

    alone = train()
    on_ranks(before, begin)
    for values, epsilon in on_ranks(after, go_on):
        torch.testing.assert_close(values, alone.values, rtol=1e-6, atol=1e-6)
        assert epsilon == alone.epsilon


def test_a_rank_that_is_killed_stops_the_others_and_no_release_is_missing(tmp_path: Path) -> None:
    """50 kills: python -m tests.distributed.kills 50."""
    found = check(tmp_path, lives(4, tmp_path))
    assert found["counted"] >= found["released"] > 30
