"""Scale-then-privatize: its formula, its sensitivity, its noise, and what its scales depend on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dptorch
from dptorch.errors import ConfigurationError
from dptorch.postprocessing import Ahead, KalmanFilter, MomentScaling, Scaled
from dptorch.training.wide_resnet import StandardisedConv2d

C, RATE, B, BETA, FLOOR = 0.1, 0.5, 6, 0.6, 0.05


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        StandardisedConv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    ).double()  # fmt: skip


def examples() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(B, 1, 4, 4, generator=drawn, dtype=torch.float64)
    return x, torch.randint(0, 3, (B,), generator=drawn)


def run(
    steps: int, *, path: Path | None = None, noise: float = 0.0, **settings: Any
) -> dict[str, Tensor]:
    """The weights after so many of four steps of the engine, saved at `path` or gone on from there."""
    model = Scaled(network())
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=B, steps=4, noise_multiplier=noise, target_delta=1e-3,
        max_grad_norm=C, seed=0, **settings,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=RATE))
    scaling = MomentScaling(model, optimizer, beta=BETA, floor=FLOOR)
    if path is not None and path.exists():
        engine.load_checkpoint(path, scaling=scaling)
    while engine.steps_done < steps:
        for x, y in engine.loader(
            torch.utils.data.TensorDataset(*examples()), max_physical_batch_size=4
        ):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if engine.steps_done == steps:
                break
    if path is not None:
        engine.save_checkpoint(path, scaling=scaling)
    return {name: p.detach().clone() for name, p in model.network.named_parameters()}


def written_out(steps: int, *, clipped_first: bool = False) -> dict[str, Tensor]:
    """The same by a loop over single examples, after the formulas of the class.

    The broken twin (`clipped_first=True`) clips gradients as they are, and scales them after.
    """
    model = network()
    weights = dict(model.named_parameters())
    moments = {name: torch.ones_like(w) for name, w in weights.items()}
    scales = {name: torch.ones_like(w) for name, w in weights.items()}
    count = sum(w.numel() for w in weights.values())
    for _ in range(steps):
        total = {name: torch.zeros_like(w) for name, w in weights.items()}
        for x, y in zip(*examples(), strict=True):
            own = torch.autograd.grad(
                F.cross_entropy(model(x[None]), y[None]), list(weights.values())
            )
            each = dict(zip(weights, own, strict=True))
            if not clipped_first:
                each = {n: g * scales[n] for n, g in each.items()}
            norm = math.sqrt(sum(float(g.square().sum()) for g in each.values()))
            for n, g in each.items():
                total[n] += g * min(1.0, C / norm) * (scales[n] if clipped_first else 1)
        released = {n: t / scales[n] / B for n, t in total.items()}
        mean = sum(float(g.square().sum()) for g in released.values()) / count
        for n, g in released.items():
            weights[n].data -= RATE * g
            moments[n] = BETA * moments[n] + (1 - BETA) * g.square() / mean
            scales[n] = 1 / ((1 - FLOOR) * moments[n] + FLOOR).sqrt()
    return {name: w.detach().clone() for name, w in weights.items()}


@pytest.mark.parametrize("mode", ["auto", "ghost"])
def test_the_scaled_step_is_that_of_the_formula(mode: str) -> None:
    found, expected = run(4, clipping_mode=mode), written_out(4)
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=1e-9, atol=1e-12)
    twin = written_out(4, clipped_first=True)
    assert any(not torch.allclose(found[name], twin[name], rtol=1e-4) for name in twin)


def test_without_privacy_scales_change_nothing() -> None:
    """The gradients of ordinary training come back as they were."""
    model = Scaled(network())
    plain = network()
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=B, steps=3, noise_multiplier=1.0, target_delta=1e-3,
        clipping_mode="non-private",
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=RATE))
    MomentScaling(model, optimizer, beta=0.5)
    data = torch.utils.data.TensorDataset(*examples())
    while not engine.exhausted:
        for x, y in engine.loader(data):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    stepped = torch.optim.SGD(plain.parameters(), lr=RATE)
    x, y = examples()
    for _ in range(3):
        stepped.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        stepped.step()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-10)


def moved(model: nn.Module, scales: dict[str, Tensor], *, with_last: bool) -> Tensor:
    """The scaled sum of one step without noise, of the examples or of all but the last."""
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=B - (not with_last), steps=1, noise_multiplier=0.0,
        target_delta=1e-3, max_grad_norm=C, loss_reduction="sum", seed=0,
    )  # fmt: skip
    parameters = dict(model.named_parameters())
    optimizer = engine.attach(torch.optim.SGD(parameters.values(), lr=0.0))
    x, y = (t[: B - (not with_last)] for t in examples())
    for x_B, y_B in engine.loader(torch.utils.data.TensorDataset(50 * x, y)):
        F.cross_entropy(model(x_B), y_B, reduction="sum").backward()
        optimizer.step()
    engine.detach()
    grads = {
        n.removeprefix("network."): p.grad for n, p in parameters.items() if p.grad is not None
    }
    if not isinstance(model, Scaled):
        grads = {n: g * scales[n] for n, g in grads.items()}
    return torch.cat([g.flatten() for g in grads.values()])


def test_an_example_moves_the_scaled_sum_by_at_most_the_clipping_norm() -> None:
    """In scaled coordinates, where the noise is added. Scaled after the clip it would be more."""
    drawn = torch.Generator().manual_seed(3)
    scales = {
        name: 20 ** torch.rand(p.shape, generator=drawn, dtype=p.dtype)
        for name, p in network().named_parameters()
    }
    norms = {}
    for kind in ("scaled", "broken"):
        sums = []
        for with_last in (True, False):
            model = network()
            if kind == "scaled":
                model = Scaled(model)
                model.scales = scales
            sums.append(moved(model, scales, with_last=with_last))
        norms[kind] = float(torch.linalg.vector_norm(sums[0] - sums[1]))
    assert 0.999 * C < norms["scaled"] < C * (1 + 1e-9)
    assert norms["broken"] > 2 * C


def test_the_noise_is_scaled_back() -> None:
    """Its deviation is sqrt(w) σ C of a coordinate, and of all together what it is without scales."""
    model = Scaled(nn.Linear(200, 50, bias=False).double())
    moments = {"weight": torch.full((50, 200), 0.5)}
    moments["weight"][:25] = 1.5
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=4, steps=1, noise_multiplier=2.0, target_delta=1e-3,
        max_grad_norm=C, seed=0, loss_reduction="sum",
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    MomentScaling(model, optimizer, floor=1e-9, second_moments=moments)
    nothing = torch.zeros(4, 200, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    data = torch.utils.data.TensorDataset(*nothing)
    for x, y in engine.loader(data):
        F.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()
    noise = model.network.weight.grad
    assert isinstance(noise, Tensor)
    assert noise[:25].std() == pytest.approx(math.sqrt(1.5) * 2 * C, rel=0.03)
    assert noise[25:].std() == pytest.approx(math.sqrt(0.5) * 2 * C, rel=0.03)
    assert noise.std() == pytest.approx(2 * C, rel=0.03)


def test_scales_are_functions_of_noisy_gradients() -> None:
    """Whatever passes of the model there were, scales change in steps, and by what a step is given."""
    found = []
    for data_seed in (0, 1):
        model = Scaled(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        MomentScaling(model, optimizer)
        torch.manual_seed(data_seed)
        model(torch.randn(2, 1, 4, 4, dtype=torch.float64)).sum().backward()
        assert model.scales == {}
        drawn = torch.Generator().manual_seed(7)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=drawn, dtype=p.dtype)
            optimizer.step()
        found.append(model.scales)
    # The second step's gradient was divided by the scales of the first, in both alike.
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    power = torch.cat([(1 / s.square()).flatten() for s in found[0].values()])
    assert float(power.mean()) == pytest.approx(1.0, rel=1e-6)


def test_outputs_are_those_of_the_network_bit_for_bit() -> None:
    model = Scaled(network())
    model.scales = {n: 1000 * torch.rand_like(p) for n, p in model.network.named_parameters()}
    x, _ = examples()
    assert torch.equal(model(x), model.network(x))
    assert torch.equal(model.eval()(x), model.network(x))


def test_filters_go_on_top() -> None:
    """A Kalman filter within, whose two losses are clipped as one, gets gradients scaled back."""
    ahead = Ahead(network())
    model = Scaled(ahead)
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=B, steps=3, noise_multiplier=1.0, target_delta=1e-3,
        max_grad_norm=C, seed=0,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=RATE))
    MomentScaling(model, optimizer)
    kalman = KalmanFilter(ahead, optimizer)
    a, b = kalman.weights
    data = torch.utils.data.TensorDataset(*examples())
    while not engine.exhausted:
        for x, y in engine.loader(data):
            outputs = model(x)
            first, second = (F.cross_entropy(outputs[:, i], y, reduction="none") for i in (0, 1))
            (a * first + b * second).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert set(model.scales) == {f"network.{n}" for n, _ in ahead.network.named_parameters()}
    assert all(bool((o != 0).any()) for o in ahead.offsets.values())


def test_a_run_with_scaled_gradients_resumes(tmp_path: Path) -> None:
    whole = run(4, noise=1.0)
    run(2, noise=1.0, path=tmp_path / "run.pt")
    resumed = run(4, noise=1.0, path=tmp_path / "run.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.0}, r"moment_scaling=1\.0: expected a coefficient"),
        ({"floor": 0.0}, r"floor=0\.0: expected a share"),
        ({"second_moments": {"bias": torch.ones(1)}}, r"'weight' has the shape None"),
        (
            {"second_moments": {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}},
            "have the mean 0",
        ),
        (
            {"second_moments": {"weight": -torch.ones(1, 1), "bias": torch.ones(1)}},
            "values below 0",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    model = Scaled(nn.Linear(1, 1))
    with pytest.raises(ConfigurationError, match=message):
        MomentScaling(model, torch.optim.SGD(model.parameters(), lr=1.0), **settings)
