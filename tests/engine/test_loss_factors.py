"""What a loss is multiplied by is a public constant: checked for scalars, vectors, weights and rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dptorch
from dptorch.engine import batch_checks, logical_batch
from dptorch.errors import PrivacyError
from tests.engine.setup import make_model, steps_with

SIZE, STEPS = 16, 4


def mean(losses: Tensor, factor: float) -> None:
    (losses.mean() * factor).backward()


def vector(losses: Tensor, factor: float) -> None:
    (losses * factor).backward()


def weights(losses: Tensor, factor: float) -> None:
    losses.backward(torch.full((len(losses),), factor))


def uneven_weights(losses: Tensor, factor: float) -> None:
    """Weights that are not all equal are still scaled as a whole."""
    losses.backward(factor * torch.linspace(0.5, 1.0, len(losses)))


BACKWARDS = (mean, vector, weights, uneven_weights)


def train(
    backward: Callable[[Tensor, float], None], factors: list[float], physical: int | None = None
) -> int:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=SIZE, steps=STEPS, noise_multiplier=1.0,
        target_delta=1e-3, seed=1,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    data = TensorDataset(torch.randn(SIZE, 6), torch.arange(SIZE) % 3)
    while not engine.exhausted:
        for x, y in engine.loader(data, max_physical_batch_size=physical):
            losses = F.cross_entropy(model(x), y, reduction="none")
            backward(losses, factors[engine.steps_done])
            optimizer.step()
            optimizer.zero_grad()
    return engine.steps_done


# A part of one row has the first of the uneven weights alone, which is another constant.
CONSTANTS = [(b, p) for b in (mean, vector, weights) for p in (None, 5, 1)] + [
    (uneven_weights, None)
]


@pytest.mark.slow
@pytest.mark.parametrize(("backward", "physical"), CONSTANTS)
def test_a_constant_may_multiply_the_loss(
    backward: Callable[[Tensor, float], None], physical: int | None
) -> None:
    assert train(backward, [0.5] * STEPS, physical) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("physical", [None, 1])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_a_factor_that_changes_is_refused(
    backward: Callable[[Tensor, float], None], physical: int | None
) -> None:
    with pytest.raises(PrivacyError, match="multiplied by"):
        train(backward, [0.5, 0.5, 0.4, 0.5], physical)


def test_without_the_check_a_factor_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin."""
    monkeypatch.setattr(logical_batch, "check_factors", lambda factors, before: None)
    assert train(vector, [0.5, 0.5, 0.4, 0.5]) == STEPS
    assert batch_checks.check_factors is not logical_batch.check_factors


def _each(m: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return [F.cross_entropy(z[None], label[None]) for z, label in zip(m(x), y, strict=True)]


ADDED: dict[str, Callable[[list[Tensor]], Any]] = {
    "squared": lambda each: sum(each) ** 2 / len(each),
    "product": lambda each: each[0] * each[1] + sum(each[2:]),
    "over itself": lambda each: sum(each) / sum(v.detach() for v in each),
    "weighed by another": lambda each: sum(
        v * w.detach() for v, w in zip(each, each[::-1], strict=True)
    ),
    "over their sum": lambda each: (
        lambda read: sum(v * (r / sum(read)) for v, r in zip(each, read, strict=True))
    )([float(v) for v in each]),
    "root of two": lambda each: (each[0] + each[1]).sqrt() + sum(each[2:]),
    "times their number over 3": lambda each: sum(each) * sum(float(v) > 1 for v in each) / 30,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADDED)
def test_losses_of_single_examples_may_be_added_and_no_more(name: str) -> None:
    """Broken twins of the legitimate programs that add up a list of losses."""
    assert steps_with(lambda m, x, y: sum(_each(m, x, y)) / len(x), make_model()) == 2
    with pytest.raises(PrivacyError):
        steps_with(lambda m, x, y: ADDED[name](_each(m, x, y)), make_model())


def test_factors_of_added_losses_are_compared() -> None:
    steps = iter(range(100))

    def varying(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        total, scale = torch.zeros(()), 1.0 + next(steps)
        for loss in _each(m, x, y):
            total += loss * scale
        return total

    with pytest.raises(PrivacyError, match="multiplied by"):
        steps_with(varying, make_model(), loss_reduction="sum")


COUNTS = ([2, 1, 3, 1], [2, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0], [0, 1, 1, 0])


def _selected(counts: list[list[int]], factors: list[float], physical: int | None = None) -> Tensor:
    """The parameters after steps on four examples, of each of which so many rows are selected."""
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=4, steps=len(counts), noise_multiplier=0.0,
        target_delta=1e-3, max_grad_norm=0.1, seed=1, self_check=False,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    x = torch.randn(4, 3, 5)
    while not engine.exhausted:
        for h, i in engine.loader(
            TensorDataset(x, torch.arange(4)), max_physical_batch_size=physical
        ):
            step = engine.steps_done
            chosen = torch.arange(3) < torch.tensor(counts[step])[i, None]
            ((model(h)[chosen] - 1).square().sum() * factors[step] / len(h)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _looped(counts: list[list[int]]) -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    parameters, x = list(model.parameters()), torch.randn(4, 3, 5)
    for some in counts:
        total = [torch.zeros_like(p) for p in parameters]
        for h, count in zip(x, some, strict=True):
            g = torch.autograd.grad((model(h)[:count] - 1).square().sum(), parameters)
            length = torch.stack([part.norm() for part in g]).norm()
            for t, part in zip(total, g, strict=True):
                t += part * min(1.0, 0.1 / max(float(length), 1e-9))
        with torch.no_grad():
            for p, t in zip(parameters, total, strict=True):
                p.sub_(t / 4)
    return torch.cat([p.detach().flatten() for p in parameters])


@pytest.mark.parametrize("physical", [None, 3])
@pytest.mark.parametrize("first", range(len(COUNTS)))
def test_a_sum_over_selected_rows_may_be_of_one_example(first: int, physical: int | None) -> None:
    """Divided by the number of rows it is a mean, whoever has selected rows in a batch."""
    counts = [*COUNTS[first:], *COUNTS[:first]]
    found = _selected(counts, [1.0] * len(counts), physical)
    torch.testing.assert_close(found, _looped(counts), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", COUNTS[:2])
@pytest.mark.parametrize("then", COUNTS[:2])
def test_a_factor_of_selected_rows_that_changes_is_refused(
    first: list[int], then: list[int]
) -> None:
    """The broken twins."""
    with pytest.raises(PrivacyError, match=r"multiplied by|would be off"):
        _selected([first, then], [1.0, 0.7])
