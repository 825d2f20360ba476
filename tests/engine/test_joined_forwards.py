"""Several forward passes of one batch in one loss: each example's gradients are clipped as the one
gradient they add up to, as a loop over single examples does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dptorch
from dptorch.errors import ExamplesMixError, PrivacyError
from dptorch.tape.gradients.store import FormStore

SIZE, BOUND = 12, 0.1
MODES = ("auto", "ghost", "BK-MixOpt", "non-ghost")


def model_of(*, tied: bool = True) -> nn.Module:
    """A layer that is used twice in each forward pass, and one with a bias."""
    torch.manual_seed(0)
    inner = nn.Linear(4, 4)
    layers = [inner, nn.Tanh(), inner if tied else nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)]
    return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(SIZE, 4, generator=draw, dtype=torch.float64)
    return x, torch.arange(SIZE) % 2


def second_view(x: Tensor) -> Tensor:
    return 0.5 * x.flip(1) + 1


def run(
    model: nn.Module, loss_of: Any = None, physical: int | None = None, **settings: Any
) -> tuple[list[Tensor], dptorch.PrivacyEngine]:
    """(the gradients that one step without noise steps on, its engine)."""
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=SIZE, steps=3, noise_multiplier=0.0, target_delta=1e-3,
        **{"max_grad_norm": BOUND, "seed": 0} | settings,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for x, y in engine.loader(TensorDataset(*data()), max_physical_batch_size=physical):
        (loss_of or pair_loss)(model, x, y).backward()
        optimizer.step()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], engine


def pair_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    first = F.cross_entropy(model(x), y)
    return first + F.cross_entropy(model(second_view(x)), 1 - y)


def contrastive(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Both outputs of an example meet in its own loss."""
    a, b = model(x), model(second_view(x))
    return (a - b).square().sum(1).mean()


def by_loop(model: nn.Module, loss_of: Any) -> list[Tensor]:
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in zip(*data(), strict=True):
        gradient = torch.autograd.grad(loss_of(model, x[None], y[None]), parameters)
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        for t, g in zip(total, gradient, strict=True):
            t += g * min(1.0, BOUND / float(norm))
    return [t / SIZE for t in total]


@pytest.mark.slow
@pytest.mark.parametrize("physical", [None, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss_of", [pair_loss, contrastive])
def test_forward_passes_of_one_batch_are_clipped_together(
    loss_of: Any, mode: str, physical: int | None
) -> None:
    found, _ = run(model_of(), loss_of, physical, clipping_mode=mode)
    torch.testing.assert_close(found, by_loop(model_of(), loss_of), rtol=1e-9, atol=1e-12)


def test_a_forward_pass_that_is_clipped_alone_or_lost_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broken twin: the second pass of each example does not enter its gradient."""
    monkeypatch.setattr(FormStore, "absorb", lambda self, other: None)
    found, _ = run(model_of())
    expected = by_loop(model_of(), pair_loss)
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) > 1e-4


def test_three_forward_passes_and_a_retained_graph() -> None:
    def three(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return pair_loss(model, x, y) + F.cross_entropy(model(-x), y)

    def twice(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The same, of which a part is backpropagated first."""
        first = F.cross_entropy(model(x), y)
        rest = F.cross_entropy(model(second_view(x)), 1 - y) + F.cross_entropy(model(-x), y)
        first.backward(retain_graph=True)
        return rest

    expected = by_loop(model_of(), three)
    for loss_of in (three, twice):
        found, _ = run(model_of(), loss_of)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("style", ["layer-wise", "param-wise"])
def test_group_wise_clipping_takes_one_forward_pass(style: str) -> None:
    with pytest.raises(PrivacyError, match="all-layer"):
        run(model_of(tied=False), clipping_style=style)


def flipped(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    order = torch.arange(len(x) - 1, -1, -1)
    first, other = F.cross_entropy(model(x), y), F.cross_entropy(model(x[order]), y[order])
    other.backward(retain_graph=True)
    return first


def half(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    first, n = F.cross_entropy(model(x), y), len(x) // 2
    return first + F.cross_entropy(model(x[:n]), y[:n])


@pytest.mark.parametrize("loss_of", [flipped, half])
def test_rows_in_another_order_or_number_are_other_examples(loss_of: Any) -> None:
    with pytest.raises((PrivacyError, ExamplesMixError), match="row"):
        run(model_of(), loss_of)


def test_rows_of_unknown_origin_may_be_other_examples() -> None:
    model = model_of()
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=SIZE, steps=3, noise_multiplier=1.0, target_delta=1e-3
    )
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    x, y = data()
    with pytest.raises(PrivacyError, match=r"2 forward passes.*different examples"):
        pair_loss(model, x, y).backward()
    assert engine.steps_done == 0


def test_a_backward_after_the_step_is_dropped_unless_it_is_stepped_on() -> None:
    """A generator learns through the discriminator that was just trained."""
    model, generator = model_of(), nn.Linear(3, 4).double()
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=SIZE, steps=3, noise_multiplier=0.0, target_delta=1e-3,
        max_grad_norm=BOUND, seed=0,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    expected = by_loop(model_of(), pair_loss)
    loader = engine.loader(TensorDataset(*data()))
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            pair_loss(model, x, y).backward()
            optimizer.step()
            found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
            made = generator(torch.randn(SIZE, 3, dtype=torch.float64))
            F.cross_entropy(model(made), torch.zeros(SIZE, dtype=y.dtype)).backward()
            assert generator.weight.grad is not None
    with pytest.raises(PrivacyError, match="multiplied by"):
        optimizer.step()
    assert engine.steps_done == 2
