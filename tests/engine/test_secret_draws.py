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
from torch.utils.data import TensorDataset

import dptorch
from dptorch.engine.secret_draws import SecretDraws
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


def step(run: Any, dataset: TensorDataset) -> Tensor:
    """The sum of a step in clipping norms, with masks of a seed that everybody knows."""
    engine, model, optimizer = run
    before = parameters(model)
    torch.manual_seed(0)
    x, y = next(iter(engine.loader(dataset)))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    return parameters(model) - before


def moved(monkeypatch: pytest.MonkeyPatch) -> float:
    """How far one record less moves a step, in clipping norms, under one secret key."""
    key = RootKey.from_os()
    monkeypatch.setattr(RootKey, "from_os", classmethod(lambda cls: key))
    with_it, without_it = step(start(), data()), step(start(), data(1))
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


@pytest.mark.parametrize("settings", [{"seed": 1}, {"adjacency": "zero-out"}])
def test_runs_that_it_would_not_help_keep_their_seed(settings: dict[str, Any]) -> None:
    drawn = []
    for _ in range(2):
        run = start(**settings)
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
