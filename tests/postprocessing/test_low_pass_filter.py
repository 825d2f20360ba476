"""The filter of noisy gradients: its recurrence, and that it sees nothing but noisy gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dptorch
from dptorch.errors import ConfigurationError
from dptorch.postprocessing import LowPassFilter

GRADIENTS = (1.0, -2.0, 0.5, 3.0, 3.0)


def expected(a: float) -> list[float]:
    """The recurrence of the paper, written out, with the response to ones as its scale."""
    found, m, c = [], 0.0, 0.0
    for t, g in enumerate(GRADIENTS):
        before, one = (GRADIENTS[t - 1], 1.0) if t else (0.0, 0.0)
        m = a * m + (1 - a) / 2 * (g + before)
        c = a * c + (1 - a) / 2 * (1.0 + one)
        found.append(m / c)
    return found


@pytest.mark.parametrize("a", [0.0, 0.5, 0.9])
def test_a_filtered_gradient_is_that_of_the_recurrence(a: float) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    kept = LowPassFilter(optimizer, a)
    steps = []
    for g in GRADIENTS:
        before = weight.detach().clone()
        weight.grad = torch.tensor([g, -g])
        optimizer.step()
        steps.append(before - weight.detach())
    assert torch.allclose(torch.stack(steps)[:, 0], torch.tensor(expected(a)), atol=1e-6)
    assert torch.equal(steps[1][0], -steps[1][1])
    assert len(kept.state_dict()["filtered"]) == 1


def test_a_constant_gradient_passes_and_alternating_noise_does_not() -> None:
    """What the filter is for: its gain is 1 at frequency zero, and 0 at the highest."""
    for sign, size in ((1.0, 1.0), (-1.0, 0.0)):
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        LowPassFilter(optimizer, 0.5)
        for t in range(40):
            before = weight.item()
            weight.grad = torch.tensor([sign**t])
            optimizer.step()
        assert abs(before - weight.item()) == pytest.approx(size, abs=1e-6)


def test_the_filter_sees_noisy_gradients_only() -> None:
    """Before or after the engine is attached; physical parts that complete no step reach no filter."""
    for late in (False, True):
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        kept = None if late else LowPassFilter(optimizer, 0.5)
        engine = dptorch.PrivacyEngine(
            model, sample_rate=1.0, sample_size=8, steps=2, noise_multiplier=3.0,
            target_delta=1e-3, max_grad_norm=1.0, seed=0,
        )  # fmt: skip
        engine.attach(optimizer)
        kept = kept or LowPassFilter(optimizer, 0.5)
        data = torch.utils.data.TensorDataset(torch.zeros(8, 3), torch.zeros(8, dtype=torch.long))
        for x, y in engine.loader(data, max_physical_batch_size=3):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if not engine.steps_done:
                assert kept.state_dict()["filtered"] == []
            optimizer.zero_grad()
            if engine.steps_done == 1:
                break
        # Inputs are zero, so the weight's gradient is nothing but noise of deviation 3 / 8.
        first = kept.state_dict()["filtered"][0]
        assert 0.01 < float(first.std()) < 1.0


def test_a_coefficient_outside_its_range_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"low_pass=1\.0: expected a coefficient in \[0, 1\)"
    ):
        LowPassFilter(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 1.0)
