"""What the engines of fastDP, private-transformers and private_vision have in common, and do not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dptorch.compat import fastdp, private_transformers, private_vision
from dptorch.errors import BudgetExhausted

SIZE, BATCH = 50, 10
ENGINES = {
    "fastDP": fastdp.PrivacyEngine,
    "private-transformers": private_transformers.PrivacyEngine,
    "private_vision": private_vision.PrivacyEngine,
}
pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")


def engine_of(name: str, model: nn.Module, **changes: Any) -> Any:
    settings = {"batch_size": BATCH, "sample_size": SIZE, "max_grad_norm": 0.5}
    return ENGINES[name](model, **(settings | {"noise_multiplier": 1.0} | changes))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def losses(model: nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 6, generator=draw, dtype=torch.float64)
    y = torch.randint(0, 3, (BATCH,), generator=draw)
    return F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize(
    ("name", "delta"),
    [
        ("fastDP", 1 / (2 * SIZE)),
        ("private-transformers", SIZE**-1.1),
        ("private_vision", 1 / (2 * SIZE)),
    ],
)
def test_delta_is_that_of_the_original(name: str, delta: float) -> None:
    assert engine_of(name, network()).target_delta == pytest.approx(delta)
    assert engine_of(name, network(), target_delta=1e-6).target_delta == 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_noise_that_is_given_goes_before_a_target(name: str) -> None:
    """And the run has no end; without it the first step past the target is refused."""
    for noise, refused in ((1.7, False), (None, True)):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = engine_of(name, model, noise_multiplier=noise, target_epsilon=2.0, epochs=1)
        engine.attach(optimizer)
        assert (engine.noise_multiplier == 1.7) != refused

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            if name == "fastDP":
                losses(model).mean().backward()
                optimizer.step()
            else:
                optimizer.step(loss=losses(model))

        for _ in range(SIZE // BATCH):
            step()
        if refused:
            with pytest.raises(BudgetExhausted):
                step()
        else:
            step()
            assert engine.steps == SIZE // BATCH + 1


@pytest.mark.parametrize("given", [None, 0.3, 5.0])
def test_automatic_clipping_has_norm_one(given: float | None) -> None:
    """As in fastDP: the norm is the learning rate's to choose."""
    changes = {} if given is None else {"max_grad_norm": given}
    engine = engine_of("fastDP", network(), clipping_fn="automatic", **changes)
    assert engine.max_grad_norm == 1.0
    assert engine_of("fastDP", network(), clipping_fn="Abadi").max_grad_norm == 0.5


@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("name", ["private-transformers", "private_vision"])
def test_a_scaled_loss_is_scaled_back_in_every_engine(name: str, ghost: bool) -> None:
    modes: dict[str, Any] = {
        "private-transformers": {"clipping_mode": "ghost" if ghost else "default"},
        "private_vision": {"ghost_clipping": ghost, "fp16": True},
    }[name]
    found = []
    for scale in (1.0, 1024.0):
        model = network()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        engine_of(name, model, noise_multiplier=0.0, **modes).attach(optimizer)
        optimizer.virtual_step(loss=losses(model) * scale, scale=scale)
        optimizer.step(loss=losses(model) * scale, scale=scale)
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
