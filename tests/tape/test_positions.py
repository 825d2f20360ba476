"""Rows of a table that every example looks up, as transformers look up positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.oracles.loop import relative_error
from torch import Tensor, nn

import dptorch
from dptorch.tape.gradients import scatter
from dptorch.tape.gradients.tape import Tape

B, T, D, ROWS = 4, 5, 6, 9


class Positions(nn.Module):
    """Tokens and positions, two of which are the same row."""

    def __init__(
        self,
        use: Callable[[nn.Embedding, Tensor, Tensor], Tensor],
        padding: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.use = use
        self.tokens, self.head = nn.Embedding(11, D), nn.Linear(D, 2)
        self.positions = nn.Embedding(ROWS, D, padding, **settings)
        nn.init.normal_(self.positions.weight)

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(T).clamp(max=3)[None]
        h = self.use(self.positions, ids, self.tokens(x))
        return self.head(h).square().flatten(1).sum(1)


def added(table: nn.Embedding, ids: Tensor, h: Tensor) -> Tensor:
    return h + table(ids)


def expanded(table: nn.Embedding, ids: Tensor, h: Tensor) -> Tensor:
    return h + table(ids).expand(len(h), -1, -1)


def twice(table: nn.Embedding, ids: Tensor, h: Tensor) -> Tensor:
    """As they are, and through another op of parameters alone."""
    p = table(ids)
    return (h + p) * torch.tanh(p)


def recorded(model: nn.Module, x: Tensor) -> tuple[Tape, Tensor, Tensor]:
    with dptorch.record(model) as tape:
        losses = model(x)
    losses.sum().backward()
    return tape, tape.norms(), tape.per_example_gradients()["positions.weight"]


def error(model: nn.Module, x: Tensor) -> float:
    """The largest error of a norm or of a gradient of the positions, against a loop."""
    _, norms, found = recorded(model, x)
    errors = []
    for i in range(B):
        own = dict(
            zip(
                dict(model.named_parameters()),
                torch.autograd.grad(model(x[i : i + 1]).sum(), list(model.parameters())),
                strict=True,
            )
        )
        whole = torch.cat([g.flatten() for g in own.values()]).norm()
        errors += [relative_error(norms[i], whole)]
        errors += [relative_error(found[i], own["positions.weight"])]
    return max(errors)


def made(use: Callable[..., Tensor], padding: int | None = None, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return Positions(use, padding, **settings).double()


X = torch.randint(0, 11, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("use", [added, expanded, twice])
def test_positions_are_exact(use: Callable[..., Tensor], padding: int | None) -> None:
    assert error(made(use, padding), X) < 1e-9


@pytest.mark.parametrize("settings", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_a_table_with_more_to_it_is_left_to_autograd(settings: dict[str, Any]) -> None:
    model = made(added, **settings)
    tape, *_ = recorded(model, X)
    assert [s.kind for s in tape.sites if s.parameter == "positions.weight"] == ["Dense"]
    assert error(model, X) < 1e-9


def test_no_gradient_of_the_whole_table_is_formed() -> None:
    tape, *_ = recorded(made(added), X)
    (site,) = (s for s in tape.sites if s.parameter == "positions.weight")
    assert (site.kind, dict(site.sizes)["T"]) == ("Scatter", T)


def test_a_twin_that_forgets_the_padding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = scatter.looked_up
    monkeypatch.setattr(
        "dptorch.tape.recording.recording.looked_up",
        lambda table, ids, padding, n: plain(table, ids, None, n),
    )
    assert error(made(added, 2), X) > 1e-3


def test_rows_are_those_of_the_forward_pass() -> None:
    """The numbers may be written to before the gradient arrives."""

    def counted(table: nn.Embedding, ids: Tensor, h: Tensor) -> Tensor:
        ids = ids.clone()
        out = h + table(ids)
        kept.append(ids)
        return out

    kept: list[Tensor] = []
    model = made(counted)
    with dptorch.record(model) as tape:
        losses = model(X)
    for ids in kept:
        ids.data.zero_()
    losses.sum().backward()
    found = tape.per_example_gradients()["positions.weight"]
    expected = recorded(made(added), X)[2]
    assert relative_error(found, expected) < 1e-9
