"""Averages of weights over steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dptorch
from dptorch.errors import ConfigurationError
from dptorch.postprocessing import LowPassFilter, WeightAverage


def walked(average_of: dict[str, object], steps: int = 12) -> tuple[torch.Tensor, list[float]]:
    """The average after a random walk, and the weights after each step of it."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    average = WeightAverage(model, optimizer, **average_of)  # type: ignore[arg-type]
    path = []
    for _ in range(steps):
        model.weight.grad = torch.randn(1, 1)
        optimizer.step()
        path.append(model.weight.item())
    before = model.weight.detach().clone()
    with average.applied():
        inside = model.weight.detach().clone()
    assert torch.equal(model.weight, before)
    return inside, path


def test_averages_are_those_of_the_weights_after_each_step() -> None:
    even, path = walked({})
    assert even.item() == pytest.approx(sum(path) / 12, abs=1e-6)
    tail, path = walked({"first_step": 8})
    assert tail.item() == pytest.approx(sum(path[8:]) / 4, abs=1e-6)
    smooth, path = walked({"decay": 0.5})
    value = path[0]
    for t, weight in enumerate(path[1:], 2):
        kept = min(0.5, (1 + t) / (10 + t))
        value = kept * value + (1 - kept) * weight
    assert smooth.item() == pytest.approx(value, abs=1e-6)
    assert abs(smooth.item() - even.item()) > 0.01


def test_before_the_first_step_that_counts_the_weights_are_the_result() -> None:
    inside, path = walked({"first_step": 20})
    assert inside.item() == path[-1]


def trained(path: Path | None, stop: int | None = None) -> dict[str, torch.Tensor]:
    """Six steps with a filter and an average, or as many as `stop` before a checkpoint at `path`."""
    torch.manual_seed(3)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    engine = dptorch.PrivacyEngine(
        model, sample_rate=0.5, sample_size=12, steps=6, noise_multiplier=1.0, target_delta=1e-3,
        max_grad_norm=1.0, seed=5,
    )  # fmt: skip
    engine.attach(optimizer)
    filtered, average = LowPassFilter(optimizer, 0.7), WeightAverage(model, optimizer, first_step=1)
    drawn = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randn(12, 3, generator=drawn), torch.randint(0, 2, (12,), generator=drawn)
    )
    if path is not None and path.exists():
        engine.load_checkpoint(path, filtered=filtered, average=average)
    while not engine.exhausted:
        for x, y in engine.loader(data):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if engine.steps_done == stop:
                assert path is not None
                engine.save_checkpoint(path, filtered=filtered, average=average)
                return {}
    with average.applied():
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_run_with_a_filter_and_an_average_resumes(tmp_path: Path) -> None:
    whole = trained(None)
    trained(tmp_path / "run.pt", stop=3)
    resumed = trained(tmp_path / "run.pt")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name])


def test_a_decay_outside_its_range_is_refused() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(ConfigurationError, match=r"ema=1\.0: expected a decay in \[0, 1\)"):
        WeightAverage(model, torch.optim.SGD(model.parameters(), lr=1.0), decay=1.0)
