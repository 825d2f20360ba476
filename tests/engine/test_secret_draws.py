"""Dropout and augmentation under a known seed: one record more would move everybody's masks."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import dptorch
from dptorch.engine.secret_draws import SecretDraws
from dptorch.errors import PrivacyError
from dptorch.randomness import RootKey
from tests.engine.setup import parameters

pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
SIZE = 32


def start(*, seed: int | None = None, adjacency: str = "add-remove", dropout: float = 0.5) -> Any:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Dropout(dropout), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2))
    engine = dptorch.PrivacyEngine(
        model,
        sample_rate=1.0,
        batch_size=SIZE,
        sample_size=None if adjacency == "add-remove" else SIZE,
        adjacency=adjacency,
        steps=4,
        noise_multiplier=1e-9,
        target_delta=1e-3,
        max_grad_norm=0.05,
        seed=seed,
    )
    return engine, model, engine.attach(torch.optim.SGD(model.parameters(), SIZE / 0.05))


def data(first: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SIZE, 20, generator=generator)
    return TensorDataset(x[first:], torch.randint(0, 2, (SIZE,), generator=generator)[first:])


def step(run: Any, dataset: TensorDataset, *, late: bool = False) -> Tensor:
    """The sum of a step in clipping norms, under a seed that everybody knows, set before its batch
    or after it."""
    engine, model, optimizer = run
    before = parameters(model)
    torch.manual_seed(0)
    x, y = next(iter(engine.loader(dataset)))
    if late:
        torch.manual_seed(0)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    return parameters(model) - before


class Ragged(Dataset[Any]):
    """Rows that are padded to the longest of their batch; the last is short, or longer than all."""

    def __init__(self, last: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = [torch.randn(n, 5, generator=generator) for n in [4] * (SIZE - 1) + [last]]

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.rows[i], -100 if i == SIZE - 1 else i % 2


def ragged_sum(last: int) -> Tensor:
    """The sum of a step under a seed that everybody knows; the last row adds nothing to it."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 2))
    engine = dptorch.PrivacyEngine(
        model,
        sample_rate=1.0,
        sample_size=SIZE,
        adjacency="zero-out",
        steps=1,
        noise_multiplier=1e-9,
        target_delta=1e-3,
        max_grad_norm=0.05,
    )
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), SIZE / 0.05))
    before = parameters(model)

    def collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        x = nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True)
        return x, torch.tensor([label for _, label in rows])

    torch.manual_seed(0)
    for x, y in engine.loader(Ragged(last), collate_fn=collate):
        losses = F.cross_entropy(model(x).sum(1), y, reduction="none", ignore_index=-100)
        losses.mean().backward()
        optimizer.step()
    return parameters(model) - before


def test_one_long_row_does_not_move_the_masks_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows keep their places under zero-out adjacency, and their masks only with a secret seed."""
    one, other = ragged_sum(4), ragged_sum(4)
    assert not torch.equal(one, other)
    # Broken twin: masks of a known seed are those of the places.
    monkeypatch.setattr(SecretDraws, "begin_batch", lambda *_: None)
    one, same, other = ragged_sum(4), ragged_sum(4), ragged_sum(9)
    assert torch.allclose(one, same, atol=1e-5)
    assert float((one - other).norm()) > 2


def moved(monkeypatch: pytest.MonkeyPatch, *, late: bool = False) -> float:
    """How far one record less moves a step, in clipping norms, under one secret key."""
    key = RootKey.from_os()
    monkeypatch.setattr(RootKey, "from_os", classmethod(lambda cls: key))
    with_it, without_it = (step(start(), each, late=late) for each in (data(), data(1)))
    return float((with_it - without_it).norm())


def test_a_known_seed_does_not_decide_the_masks_of_a_private_run() -> None:
    masks = []
    for _ in range(2):
        torch.manual_seed(0)
        run = start()
        torch.manual_seed(0)
        for _ in run[0].loader(data()):
            masks.append((torch.rand(8), random.random(), np.random.rand()))  # noqa: NPY002
    assert not torch.equal(masks[0][0], masks[1][0])
    assert masks[0][1] != masks[1][1]
    assert masks[0][2] != masks[1][2]
    assumed = run[0].statement().assumed
    assert any("dropout, augmentation" in each for each in assumed)


def test_without_the_secret_one_record_moves_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: masks of a known seed. Without dropout the same step is within its bound."""
    monkeypatch.setattr(SecretDraws, "begin_batch", lambda *_: None)
    assert moved(monkeypatch) > 3
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    assert moved(monkeypatch) <= 1 + 1e-4


def test_runs_that_protect_nobody_keep_their_seed() -> None:
    drawn = []
    for _ in range(2):
        run = start(seed=1)
        torch.manual_seed(0)
        for _ in run[0].loader(data()):
            drawn.append(torch.rand(8))
    assert torch.equal(drawn[0], drawn[1])


def test_it_is_seeded_once_and_whenever_the_program_seeds() -> None:
    """So that a run that goes on draws what it would have drawn."""
    run, seeds, drawn = start(), [], []
    while not run[0].exhausted:
        if run[0].steps_done == 2:
            torch.manual_seed(0)
        for x, y in run[0].loader(data()):
            seeds.append(torch.initial_seed())
            drawn.append(torch.rand(8))
            F.cross_entropy(run[1](x), y).backward()
            run[2].step()
            run[2].zero_grad()
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert 0 not in seeds
    assert not any(torch.equal(a, b) for a, b in pairwise(drawn))


def test_a_run_that_goes_on_has_the_masks_that_it_would_have_had(tmp_path: Path) -> None:
    def steps(run: Any, until: int) -> None:
        while run[0].steps_done < until:
            for x, y in run[0].loader(data()):
                F.cross_entropy(run[1](x), y).backward()
                run[2].step()
                run[2].zero_grad()

    whole = start()
    steps(whole, 2)
    whole[0].save_checkpoint(tmp_path / "run.pt")
    steps(whole, 4)
    later = start()
    later[0].load_checkpoint(tmp_path / "run.pt")
    steps(later, 4)
    assert torch.equal(parameters(later[1]), parameters(whole[1]))


@pytest.mark.parametrize("size", [None, 8])
def test_a_seed_set_after_the_batch_is_refused(size: int | None) -> None:
    """Nothing is counted, and the step that is due can still be taken."""
    engine, model, optimizer = start()
    parts = iter(engine.loader(data(), max_physical_batch_size=size))
    x, y = next(parts)
    torch.manual_seed(0)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyError, match="seeded with 0"):
        optimizer.step()
    assert engine.steps_done == 0
    optimizer.zero_grad()
    parts.close()
    step((engine, model, optimizer), data())
    assert engine.steps_done == 1


def test_without_the_refusal_a_late_seed_moves_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin."""
    monkeypatch.setattr(SecretDraws, "refuse_known", lambda _: None)
    assert moved(monkeypatch, late=True) > 3


@pytest.mark.parametrize("settings", [{"dropout": 0.0}, {"seed": 1}])
def test_seeds_that_tell_nothing_are_no_reason_to_refuse(settings: dict[str, Any]) -> None:
    engine, model, optimizer = start(**settings)
    model[0].train(settings.get("dropout") != 0.0)
    for x, y in engine.loader(data()):
        torch.manual_seed(0)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.steps_done


def test_two_engines_may_take_turns() -> None:
    first, second = start(), start()
    for one, other in zip(first[0].loader(data()), second[0].loader(data()), strict=True):
        for (_, model, optimizer), (x, y) in ((first, one), (second, other)):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert first[0].steps_done == second[0].steps_done > 0


class Drawn(Dataset[Tensor]):
    """Rows of what the three generators draw in the process that loads them."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Tensor:
        drawn = [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002
        return torch.tensor(drawn)


def seeded(worker: int) -> None:
    torch.manual_seed(42 + worker)
    random.seed(42)
    np.random.seed(42)  # noqa: NPY002


@pytest.mark.slow
def test_a_known_seed_does_not_reach_the_workers_of_a_private_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drawn(seed: int | None = None) -> Tensor:
        engine, _, _ = start(seed=seed)
        torch.manual_seed(0)
        known = torch.Generator().manual_seed(0)
        batch: Tensor = next(
            iter(engine.loader(Drawn(), num_workers=1, worker_init_fn=seeded, generator=known))
        )
        return batch

    assert not (drawn() == drawn()).any()
    assert torch.equal(drawn(seed=1), drawn(seed=1))  # a run that protects nobody is left as it is
    # The broken twin: a worker draws what everybody can draw.
    monkeypatch.setattr("dptorch.engine.loading.seed_workers_in_secret", lambda _: None)
    assert torch.equal(drawn(), drawn())
