"""Several forward passes for one example: what is refused, and the recipes of docs/migrating.md."""

import re
from pathlib import Path
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

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
RECIPE = next(b for b in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "class Stacked" in b)
SIZE, CLIP = 6, 0.1


def discriminator() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def inputs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(SIZE, 3, generator=draw), torch.randn(SIZE, 3, generator=draw)


def criterion(scores: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, target)


def private(module: nn.Module) -> tuple[Any, ...]:
    return PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(inputs()[0]), batch_size=SIZE),
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        poisson_sampling=False,
    )


def test_the_recipe_for_two_inputs_clips_them_together_as_opacus_does() -> None:
    model, fake = discriminator(), inputs()[1]
    names: dict[str, Any] = {"nn": nn, "torch": torch, "criterion": criterion, "fake": fake}
    made, step = RECIPE.replace(
        "discriminator = Stacked(discriminator)", "private = Stacked(model)"
    ).split("scores =", 1)
    exec(made, names | {"model": model}, names)
    private_model, optimizer, loader = private(names["private"])
    for (real,) in loader:
        names |= {"discriminator": private_model, "real": real, "ones": torch.ones(SIZE, 1)}
        exec("scores =" + step, names | {"zeros": torch.zeros(SIZE, 1)}, names)
        names["loss"].backward()
        optimizer.step()
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


@pytest.mark.parametrize("backwards", [1, 2])
def test_two_forward_passes_are_refused_with_the_recipe(backwards: int) -> None:
    model, optimizer, loader = private(discriminator())
    fake, target = inputs()[1], torch.ones(SIZE, 1)

    def epoch() -> None:
        for (real,) in loader:
            losses = [criterion(model(x), target) for x in (real, fake)]
            for loss in [sum(losses)] if backwards == 1 else losses:
                loss.backward()
            optimizer.step()

    with pytest.raises(PrivacyError, match=r"one forward of a wrapping module.*migrating"):
        epoch()


def test_a_gradient_penalty_is_refused_and_its_recipe_exact() -> None:
    model, (x, u) = discriminator(), inputs()
    private_model, _, loader = private(model)
    (real,) = next(iter(loader))
    point = real.clone().requires_grad_()
    scores = private_model(point).sum()
    with pytest.raises(NotCoveredError, match="finite difference"):
        torch.autograd.grad(scores, point, create_graph=True)
    names: dict[str, Any] = {"nn": nn, "torch": torch}
    exec(RECIPE.split("discriminator = ")[0], names)

    def penalty(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        point, direction = batch
        scores = model(torch.stack([point, point + 0.1 * direction], 1))
        return (((scores[:, 1] - scores[:, 0]) / 0.1)[:, 0] - 1).square()

    report = dptorch.check(names["Stacked"](discriminator()), (x, u), penalty)
    assert report.ok, str(report)
