"""Several forward passes for one example: as in Opacus, and by the recipes of docs/migrating.md."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dptorch
from dptorch.compat.opacus import PrivacyEngine
from dptorch.errors import NotCoveredError, PrivacyError
from tests.source import REPOSITORY

PAGE = (REPOSITORY / "docs" / "migrating.md").read_text()
TOGETHER, PENALTY = (
    next(b for b in re.findall(r"```python\n(.*?)```", PAGE, re.S) if begin in b)
    for begin in ("criterion(discriminator(real)", "slope = ")
)
SIZE, CLIP = 6, 0.1


def discriminator() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def inputs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(SIZE, 3, generator=draw), torch.randn(SIZE, 3, generator=draw)


def criterion(scores: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, target)


def private(module: nn.Module, **changes: Any) -> tuple[Any, ...]:
    settings = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "poisson_sampling": False}
    return PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(inputs()[0]), batch_size=SIZE),
        **settings | changes,
    )


def names(model: nn.Module, optimizer: Any, real: Tensor) -> dict[str, Any]:
    """What the recipe uses."""
    return {
        "criterion": criterion, "discriminator": model, "optimizer": optimizer, "real": real,
        "fake": inputs()[1], "ones": torch.ones(SIZE, 1), "zeros": torch.zeros(SIZE, 1),
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_two_forward_passes_are_clipped_together_as_opacus_does(mode: str) -> None:
    model = discriminator()
    private_model, optimizer, *_, loader = private(model, grad_sample_mode=mode)
    for (real,) in loader:
        exec(TOGETHER, names(private_model, optimizer, real))
    theirs = GradSampleModule(discriminator())
    for x, target in zip(inputs(), (torch.ones(SIZE, 1), torch.zeros(SIZE, 1)), strict=True):
        (SIZE * criterion(theirs(x), target)).backward()
    # Opacus keeps one tensor for each backward, and adds them up row by row before it clips.
    sums = [torch.stack(p.grad_sample).sum(0) for p in theirs.parameters()]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in sums]).norm(dim=0)
    factors = (CLIP / norms).clamp(max=1)
    assert (factors < 1).all()
    for p, g in zip(model.parameters(), sums, strict=True):
        expected = torch.einsum("b,b...->...", factors, g) / SIZE
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=1e-6)


def test_two_backwards_are_refused_with_the_recipe() -> None:
    model, optimizer, loader = private(discriminator())

    def epoch() -> None:
        for (real,) in loader:
            for x in (real, inputs()[1]):
                criterion(model(x), torch.ones(SIZE, 1)).backward()
            optimizer.step()

    with pytest.raises(PrivacyError, match=r"call backward\(\) once.*migrating"):
        epoch()


def test_a_gradient_penalty_is_refused_and_its_recipe_exact() -> None:
    private_model, _, loader = private(discriminator())
    (real,) = next(iter(loader))
    point = real.clone().requires_grad_()
    scores = private_model(point).sum()
    with pytest.raises(NotCoveredError, match="finite difference"):
        torch.autograd.grad(scores, point, create_graph=True)

    def penalty(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        found: dict[str, Any] = {"discriminator": model, "x": batch[0], "u": batch[1], "h": 0.1}
        exec(PENALTY, found)
        return (found["slope"][:, 0] - 1).square()

    report = dptorch.check(discriminator(), inputs(), penalty)
    assert report.ok, str(report)
