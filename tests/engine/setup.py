"""Small models, data and engines for the engine's tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dptorch
from dptorch.clipping.sums import ClippedSum
from dptorch.noise import GaussianNoise

SIZE = 24
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def make_data(size: int = SIZE) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(size, 5, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (size,), generator=generator))


def make_engine(model: nn.Module, **overrides: Any) -> dptorch.PrivacyEngine:
    """A full-batch engine without noise and practically without clipping, unless told otherwise.

    It does not look at the first batch, which takes four times as long as the step after it.
    """
    settings: dict[str, Any] = {
        "sample_rate": 1.0,
        "sample_size": SIZE,
        "steps": 10,
        "noise_multiplier": 0.0,
        "target_delta": 1e-3,
        "max_grad_norm": 1e6,
        "seed": 0,
        "self_check": False,
    }
    return dptorch.PrivacyEngine(model, **settings | overrides)


def steps_with(loss: Loss, model: nn.Module, *, own: bool = False, **plan: Any) -> int:
    """Train on two batches, the first of which is looked at; returns the number of steps taken."""
    torch.manual_seed(0)
    engine = make_engine(model, **{"sample_rate": 0.5, "steps": 2, "self_check": True} | plan)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    batches = DataLoader(make_data(), batch_size=12) if own else engine.loader(make_data())
    for x, y in batches:
        loss(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine.steps_done


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Any,
    reduction: str = "mean",
    epochs: int = 1,
) -> Tensor:
    """The ordinary loop; returns the trained parameters."""
    for _ in range(epochs):
        for x, y in batches:
            loss = F.cross_entropy(model(x), y, reduction=reduction)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return parameters(model)


def recorded_sums(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]
) -> list[dict[str, Tensor]]:
    """The sums that reach the noise while `run` runs."""
    sums: list[dict[str, Tensor]] = []
    plain = GaussianNoise.privatize

    def privatize(self: GaussianNoise, clipped: ClippedSum, *rest: Any, **more: Any) -> Any:
        sums.append({k: v.clone() for k, v in clipped.values.items()})
        return plain(self, clipped, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(GaussianNoise, "privatize", privatize)
        run()
    return sums


def clipped_mean(model: nn.Module, data: TensorDataset, bound: float, divisor: float) -> Tensor:
    """The DP-SGD gradient without noise, by a loop over examples."""
    x, y = data.tensors
    total = torch.zeros_like(parameters(model))
    for i in range(len(data)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        total += g * min(1.0, bound / g.norm().item())
    return total / divisor
