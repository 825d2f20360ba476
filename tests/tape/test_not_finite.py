"""An example that is not finite is left out alone, also where an op has no rule of its own."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dptorch
from dptorch.tape.rules import generic_rule

B, T, D = 6, 3, 4


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)[0]
        return out[:, -1]


class Steps(nn.Module):
    """A recurrent cell over the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return h


class Product(nn.Module):
    """A matrix product for each example, of a weight that is the same for all."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.w.expand(len(x), -1, -1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GRU": lambda: Last(nn.GRU(D, 5, batch_first=True)),
    "LSTM": lambda: Last(nn.LSTM(D, 5, batch_first=True, bidirectional=True)),
    "RNN": lambda: Last(nn.RNN(D, 5, batch_first=True)),
    "GRUCell": Steps,
    "bmm": Product,
    "Linear": lambda: nn.Linear(D, 2),
}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with dptorch.record(model) as tape:
        loss = model(x).square().flatten(1).sum(1)
    loss.sum().backward()
    return tape.per_example_gradients()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", MODELS)
def test_the_others_keep_their_gradients(name: str, value: float) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(B, T, D)
    expected = gradients(model, x)
    x[2, 1, 0] = value
    found = gradients(model, x)
    others = [i for i in range(B) if i != 2]
    for key, g in expected.items():
        torch.testing.assert_close(found[key][others], g[others], rtol=1e-12, atol=1e-14)
    assert not all(g[2].isfinite().all() for g in found.values())


@pytest.mark.usefixtures("float64")
def test_without_the_second_run_one_example_takes_all_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broken twin."""
    monkeypatch.setattr(generic_rule, "_not_finite", lambda values, n: None)
    model, x = MODELS["bmm"](), torch.randn(B, T, D)
    x[2, 1, 0] = math.nan
    assert not any(g[0].isfinite().all() for g in gradients(model, x).values())
