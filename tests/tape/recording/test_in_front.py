"""What is trained beside the model, by an optimizer of its own, gets no gradient of private rows."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engine.setup import make_engine, make_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dptorch
from dptorch.errors import NotCoveredError
from dptorch.tape.recording import model_hooks, recording

ROWS, C = 12, 0.1
Front = Callable[[Tensor, nn.Module], Tensor]


class Prompt(nn.Module):
    """Trained tensors that are no module of the model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.added = nn.Parameter(torch.zeros(5))
        self.encoder = nn.Linear(5, 5)
        self.several = nn.ParameterList([torch.zeros(1, 2)])


FRONTS: dict[str, Front] = {
    "added": lambda x, p: x + p.added,  # type: ignore[operator]
    "a mask": lambda x, p: x * torch.sigmoid(p.added),  # type: ignore[arg-type]
    "an encoder": lambda x, p: p.encoder(x),  # type: ignore[operator]
    "columns": lambda x, p: torch.cat([x[:, :3], p.several[0].expand(len(x), -1)], 1),  # type: ignore
}


def data(outlier: bool = False) -> TensorDataset:
    draw = torch.Generator().manual_seed(2)
    x, y = torch.randn(ROWS, 5, generator=draw), torch.arange(ROWS) % 3
    if outlier:
        x[-1] = 50.0
    return TensorDataset(x, y)


def engine_of(model: nn.Module, steps: int = 2) -> tuple[dptorch.PrivacyEngine, torch.optim.SGD]:
    engine = make_engine(model, sample_size=ROWS, steps=steps, max_grad_norm=C)
    return engine, engine.attach(torch.optim.SGD(model.parameters(), 0.1))


def batches_of(engine: dptorch.PrivacyEngine, data: TensorDataset) -> Iterator[Any]:
    """Every batch of the run."""
    loader = engine.loader(data)
    while not engine.exhausted:
        yield from loader


def trained(front: Front, outlier: bool = False) -> Tensor:
    """What the front's own optimizer makes of it."""
    model, prompt = make_model(), Prompt()
    engine, optimizer = engine_of(model)
    its_own = torch.optim.SGD(prompt.parameters(), 0.1)
    for x, y in batches_of(engine, data(outlier)):
        F.cross_entropy(model(front(x, prompt)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        its_own.step()
        its_own.zero_grad()
    return torch.cat([p.detach().flatten() for p in prompt.parameters()])


@pytest.mark.parametrize("name", FRONTS)
def test_what_is_trained_in_front_of_the_model_is_refused(name: str) -> None:
    with pytest.raises(NotCoveredError, match=r"in front of the model.*detach"):
        trained(FRONTS[name])


def test_the_twin_would_train_it_without_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_hooks, "refuse_trained_in_front", lambda t: None)
    front = FRONTS["an encoder"]
    change = trained(front, outlier=True) - trained(front)
    assert change.norm() > 10 * 2 * C * 0.1 / ROWS


@pytest.mark.parametrize("own", [False, True])
def test_a_leaf_of_rows_and_a_detached_input_are_let_through(own: bool) -> None:
    model = make_model()
    engine, optimizer = engine_of(model)
    prompt = Prompt()
    for x, y in DataLoader(data(), batch_size=ROWS) if own else engine.loader(data()):
        near = x.clone().detach().requires_grad_()
        delta = torch.zeros_like(x, requires_grad=True)
        for leaf, moved in ((near, near * 2), (delta, x + delta)):
            F.cross_entropy(model(moved), y).backward()
            optimizer.zero_grad()
            assert leaf.grad is not None
            assert leaf.grad.abs().sum() > 0
        seen = FRONTS["an encoder"](x, prompt).detach()
        F.cross_entropy(model(seen), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.steps_done


def test_a_perturbation_kept_for_the_next_batch_is_refused() -> None:
    model = make_model()
    engine, optimizer = engine_of(model)
    kept: list[Tensor] = []

    def run() -> None:
        for x, y in batches_of(engine, data()):
            kept[:] = kept or [torch.zeros_like(x, requires_grad=True)]
            F.cross_entropy(model(x + kept[0]), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(NotCoveredError, match="anew for each batch"):
        run()
    assert engine.steps_done == 1


class WithTensor(nn.Module):
    """A model with a tensor that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.tensor = make_model(), torch.zeros(5, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + self.tensor)


def step_with_a_leaf(where: str, own: bool) -> Tensor:
    """The gradient of a plain tensor that meets the batch in the model or in the loss."""
    model = WithTensor() if where == "in the model" else make_model()
    engine, _ = engine_of(model)
    leaf = torch.ones(1, requires_grad=True)
    leaf = model.tensor if isinstance(model, WithTensor) else leaf
    x, y = next(iter(DataLoader(data(), batch_size=ROWS) if own else engine.loader(data())))
    if where == "of the outputs":
        F.cross_entropy(model(x) * leaf, y).backward()
    elif where == "of the loss":
        (F.cross_entropy(model(x), y) * leaf).backward()
    else:
        F.cross_entropy(model(x), y).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("where", ["in the model", "of the outputs", "of the loss"])
def test_a_leaf_that_is_no_parameter_is_refused(
    where: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotCoveredError, match=r"requires grad and is no parameter of the model"):
        step_with_a_leaf(where, own)
    monkeypatch.setattr(recording, "refuse_leaf", lambda *_: None)
    if where != "of the loss":  # the twin: a gradient of all rows, which nothing has clipped
        assert step_with_a_leaf(where, own).abs().sum() > 0


def test_a_generator_learns_through_a_private_discriminator() -> None:
    """No row of the batch is in its input, so its gradient is made from the model alone."""
    model, generator = make_model(), nn.Linear(2, 5)
    engine, optimizer = engine_of(model)
    for x, y in batches_of(engine, data()):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        model(generator(torch.randn(7, 2))).mean().backward()
        assert generator.weight.grad is not None
        assert generator.weight.grad.abs().sum() > 0
        optimizer.zero_grad()
    assert engine.steps_done == 2
