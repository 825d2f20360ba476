"""The Kalman filter of gradients: its formula, one clip for each example, and that a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import dptorch
from dptorch.errors import ConfigurationError
from dptorch.postprocessing import Ahead, KalmanFilter

KAPPA, GAMMA, C, RATE, B = 0.6, 0.4, 0.1, 0.5, 6


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    ).double()  # fmt: skip


def examples() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(B, 1, 4, 4, generator=drawn, dtype=torch.float64)
    return x, torch.randint(0, 3, (B,), generator=drawn)


def run(steps: int, *, path: Path | None = None, noise: float = 0.0) -> dict[str, Tensor]:
    """The weights after so many of four steps of the engine, saved at `path` or gone on from there."""
    model = Ahead(network())
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=B, steps=4, noise_multiplier=noise, target_delta=1e-3,
        max_grad_norm=C, seed=0,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=RATE))
    kalman = KalmanFilter(model, optimizer, kappa=KAPPA, gamma=GAMMA)
    a, b = kalman.weights
    if path is not None and path.exists():
        engine.load_checkpoint(path, kalman=kalman)
    while engine.steps_done < steps:
        for x, y in engine.loader(
            torch.utils.data.TensorDataset(*examples()), max_physical_batch_size=4
        ):
            outputs = model(x)
            ahead, here = (F.cross_entropy(outputs[:, i], y, reduction="none") for i in (0, 1))
            (a * ahead + b * here).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if engine.steps_done == steps:
                break
    if path is not None:
        engine.save_checkpoint(path, kalman=kalman)
    return {name: p.detach().clone() for name, p in model.network.named_parameters()}


def written_out(steps: int, *, once: bool = True) -> dict[str, Tensor]:
    """The same by a loop over single examples, after the formula of the paper.

    The broken twin (`once=False`) clips the two gradients of an example by themselves.
    """
    model = network()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = {name: torch.zeros_like(w) for name, w in weights.items()}
    filtered: dict[str, Tensor] = {}
    a = (1 - KAPPA) / (KAPPA * GAMMA)

    def gradient(at: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        own = {name: w.clone().requires_grad_() for name, w in at.items()}
        loss = F.cross_entropy(functional_call(model, own, (x[None],)), y[None])
        return dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))

    def clipped(g: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = torch.sqrt(sum((v.square().sum() for v in g.values()), torch.zeros(())))
        return {name: v * (C / norm).clamp(max=1) for name, v in g.items()}

    for _ in range(steps):
        total = {name: torch.zeros_like(w) for name, w in weights.items()}
        for x, y in zip(*examples(), strict=True):
            ahead = gradient({n: w + GAMMA * moved[n] for n, w in weights.items()}, x, y)
            here = gradient(weights, x, y)
            if once:
                each = clipped({n: a * ahead[n] + (1 - a) * here[n] for n in weights})
            else:
                ahead, here = clipped(ahead), clipped(here)
                each = {n: a * ahead[n] + (1 - a) * here[n] for n in weights}
            total = {n: total[n] + each[n] / B for n in weights}
        if filtered:
            filtered = {n: (1 - KAPPA) * filtered[n] + KAPPA * total[n] for n in weights}
        else:
            filtered = total
        moved = {n: -RATE * filtered[n] for n in weights}
        weights = {n: w + moved[n] for n, w in weights.items()}
    return weights


def test_the_kalman_step_is_that_of_the_formula() -> None:
    found, expected = run(4), written_out(4)
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=1e-10, atol=1e-12)


def test_the_kalman_gradient_of_each_example_is_clipped_once() -> None:
    """Clipped twice, an example could move the sum by (|a| + |b|) C; the test tells the two apart."""
    found, twice = run(3), written_out(3, once=False)
    assert any(not torch.allclose(found[name], twice[name], rtol=1e-6) for name in twice)


def test_a_run_with_a_kalman_filter_resumes(tmp_path: Path) -> None:
    whole = run(4, noise=1.0)
    run(2, noise=1.0, path=tmp_path / "run.pt")
    resumed = run(4, noise=1.0, path=tmp_path / "run.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_in_evaluation_it_is_the_network() -> None:
    model = Ahead(network()).eval()
    x, _ = examples()
    assert torch.equal(model(x), model.network(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"kappa": 0.0}, r"kalman=0\.0: expected a share"), ({"gamma": 0.0}, r"gamma=0\.0: expected")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    model = Ahead(nn.Linear(1, 1))
    with pytest.raises(ConfigurationError, match=message):
        KalmanFilter(model, torch.optim.SGD(model.parameters(), lr=1.0), **settings)
