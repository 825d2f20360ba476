"""Gradients that a loop takes from ``.grad`` after a backward keep their examples."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.engine.setup import clipped_mean, make_engine, make_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dptorch.errors import ExamplesMixError
from dptorch.tape.recording.handlers import SPECIAL

ROWS, C = 40, 0.1
Drop = Callable[[], None]  # forgets the gradients of the model
Attack = Callable[[nn.Module, Tensor, Tensor, Drop], Tensor]


def data(outlier: bool = False) -> TensorDataset:
    draw = torch.Generator().manual_seed(2)
    x, y = 0.3 * torch.randn(ROWS, 5, generator=draw), torch.zeros(ROWS).long()
    if outlier:
        x[-1] = 30.0
    return TensorDataset(x, y)


def sign(model: nn.Module, x: Tensor, y: Tensor, drop: Drop) -> Tensor:
    """FGSM."""
    near = x.clone().detach().requires_grad_()
    F.cross_entropy(model(near), y).backward()
    assert near.grad is not None
    return (near + 0.1 * near.grad.sign()).detach()


def projected(model: nn.Module, x: Tensor, y: Tensor, drop: Drop) -> Tensor:
    """Three steps of PGD, each of the length that the gradient of the row allows."""
    delta = torch.zeros_like(x, requires_grad=True)
    for _ in range(3):
        F.cross_entropy(model(x + delta), y).backward()
        assert delta.grad is not None
        delta.data.add_(0.1 * delta.grad / delta.grad.norm(dim=1, keepdim=True))
        delta.data.clamp_(-0.2, 0.2)
        delta.grad.zero_()
        drop()
    return x + delta.detach()


def by_an_optimizer(model: nn.Module, x: Tensor, y: Tensor, drop: Drop) -> Tensor:
    """Three steps of Adam on each row's own perturbation."""
    delta = torch.zeros_like(x, requires_grad=True)
    steps = torch.optim.Adam([delta], 0.1, eps=1e-30, maximize=True)
    for _ in range(3):
        F.cross_entropy(model(x + delta), y).backward()
        steps.step()
        steps.zero_grad()
        drop()
    return x + delta.detach()


def far(model: nn.Module, x: Tensor) -> Tensor:
    """A loss whose gradient an outlier dominates."""
    return F.mse_loss(model(x)[:, 0], x.detach()[:, 0] ** 2)


def by_the_batch(model: nn.Module, x: Tensor, y: Tensor, drop: Drop) -> Tensor:
    """A perturbation whose length depends on the gradients of all rows."""
    near = x.clone().detach().requires_grad_()
    far(model, near).backward()
    assert near.grad is not None
    return (near + 30.0 * near.grad / near.grad.norm()).detach()


class Kept(nn.Module):
    """A model that keeps the gradient of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_model()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layers[:2](x)  # type: ignore[index,operator]
        if h.requires_grad:
            h.retain_grad()
        self.h = h
        return self.layers[2](h)  # type: ignore[index,operator,no-any-return]


def by_an_activation(model: nn.Module, x: Tensor, y: Tensor, drop: Drop) -> Tensor:
    """The same, with the gradient of an activation."""
    far(model, x).backward()
    assert isinstance(model, Kept)
    assert model.h.grad is not None
    return 10.0 * x / (1e-3 + model.h.grad.norm())


def private_gradient(attack: Attack, model: nn.Module, rows: TensorDataset, own: bool) -> Tensor:
    """The gradient of the step on the attacked rows, without noise."""
    engine = make_engine(model, sample_size=ROWS, steps=1, max_grad_norm=C)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.0))
    (batch,) = DataLoader(rows, batch_size=ROWS) if own else engine.loader(rows)
    x, y = batch
    moved = attack(model, x, y, optimizer.zero_grad)
    optimizer.zero_grad()
    F.cross_entropy(model(moved), y).backward()
    optimizer.step()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("attack", [sign, projected, by_an_optimizer])
def test_an_attack_on_each_row_is_the_loop(attack: Attack, own: bool) -> None:
    x, y = data().tensors
    moved = attack(make_model(), x, y, lambda: None)
    expected = clipped_mean(make_model(), TensorDataset(moved, y), C, ROWS)
    found = private_gradient(attack, make_model(), data(), own)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


BY_ALL_ROWS = [(by_the_batch, make_model), (by_an_activation, Kept)]


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("attack", "make"), BY_ALL_ROWS)
def test_a_statistic_of_gradients_is_refused(
    attack: Attack, make: Callable[[], nn.Module], own: bool
) -> None:
    with pytest.raises(ExamplesMixError, match="'norm'"):
        private_gradient(attack, make(), data(), own)


@pytest.mark.parametrize(("attack", "make"), BY_ALL_ROWS)
def test_the_twin_would_be_more_sensitive(
    attack: Attack, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SPECIAL, ".grad", lambda recording, func, name, args, kwargs: func(*args))
    one, other = (
        private_gradient(attack, make(), data(outlier), False) for outlier in (False, True)
    )
    assert ROWS * (one - other).norm() > 1.5 * 2 * C
