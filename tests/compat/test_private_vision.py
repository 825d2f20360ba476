"""`dptorch.compat.private_vision`: its modes and functions against a loop over single examples."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptorch.compat.private_vision import PrivacyEngine
from dptorch.errors import ConfigurationError, PrivacyWarning

BATCH = 12
pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")


def network() -> nn.Module:
    """What private_vision gets wrong with ghost_clipping=False, or cannot do: grouped, padded and
    transposed convolutions."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, padding="same"),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(6, 2, 2),
        nn.Flatten(),
        nn.Linear(98, 3),
    ).double()


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, 2, 6, 6, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, 3, (BATCH,), generator=draw)


def through_engine(parts: int = 1, **changes: Any) -> list[Tensor]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"batch_size": BATCH, "sample_size": 60, "max_grad_norm": 0.5, "epochs": 2}
    engine = PrivacyEngine(model, **(settings | {"noise_multiplier": 0.0} | changes))
    engine.attach(optimizer)
    x, y = batch()
    for i, (xs, ys) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True), 1):
        loss = F.cross_entropy(model(xs), ys, reduction="none")
        (optimizer.step if i == parts else optimizer.virtual_step)(loss=loss)
    return [p.grad for p in model.parameters() if p.grad is not None]


def by_loop(coefficient: Callable[[float], float]) -> list[Tensor]:
    model = network()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in zip(*batch(), strict=True):
        gradients = torch.autograd.grad(
            F.cross_entropy(model(x[None]), y[None]), list(model.parameters())
        )
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for t, g in zip(total, gradients, strict=True):
            t += coefficient(norm) * g
    return [t / BATCH for t in total]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("ways", [(True, True), (True, False), (False, False)])
def test_every_mode_is_the_loop(ways: tuple[bool, bool], parts: int) -> None:
    found = through_engine(parts, ghost_clipping=ways[0], mixed=ways[1])
    expected = by_loop(lambda n: min(1.0, 0.5 / n))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "coefficient"),
    [
        ("vanilla", lambda n: min(1.0, 2.0 / n)),
        ("global", lambda n: float(n <= 2.0)),
        ("autov", lambda n: 2.0 / n),
        ("autos", lambda n: 2.0 / (n + 0.01)),
    ],
)
def test_clip_functions(function: str, coefficient: Callable[[float], float]) -> None:
    found = through_engine(clip_function=function, max_grad_norm=2.0)
    torch.testing.assert_close(found, by_loop(coefficient), rtol=1e-9, atol=1e-12)


def make(**changes: Any) -> PrivacyEngine:
    settings = {"batch_size": BATCH, "sample_size": 60, "max_grad_norm": 1.0, "epochs": 2}
    return PrivacyEngine(network(), **(settings | {"target_epsilon": 2.0} | changes))


def test_gdp_does_not_choose_the_noise() -> None:
    with pytest.warns(PrivacyWarning, match="no bound"):
        engine = make(accounting_mode="gdp")
    spent = engine.get_privacy_spent(steps=10)
    assert spent["eps_gdp"] < 1.9 < spent["eps_upper"] <= 2.0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rdp", "rdp_cks", "glw", "all"])
def test_accounting_modes_meet_the_target(mode: str) -> None:
    spent = make(accounting_mode=mode).get_privacy_spent(steps=10)
    expected = {"rdp": {"eps_rdp"}, "rdp_cks": {"eps_rdp_cks"}, "glw": {"eps_upper"}}
    keys = expected.get(mode, {"eps_rdp", "eps_upper"})
    assert keys <= spent.keys()
    assert 1.98 < max(v for k, v in spent.items() if k.startswith("eps")) <= 2.0


def test_what_is_unknown_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'ghost_clipping'"):
        make(ghost_cliping=True)
    with pytest.raises(ConfigurationError, match="Did you mean 'autos'"):
        make(clip_function="auto-s")
