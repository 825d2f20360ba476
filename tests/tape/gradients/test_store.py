"""The store of forms: what arrives of one parameter from many sites is copied once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.oracles.loop import relative_error
from torch import Tensor, nn

import dptorch
from dptorch.tape.gradients import Outer, PerExampleGradient
from dptorch.tape.gradients.store import FormStore


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each call of torch.cat has written."""
    numbers: list[int] = []
    plain = torch.cat

    def counted(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        out = plain(tensors, *args, **kwargs)
        numbers.append(out.numel())
        return out

    monkeypatch.setattr(torch, "cat", counted)
    return numbers


def measured(key: int, form: PerExampleGradient) -> tuple[Tensor, PerExampleGradient]:
    return form.squared_norm(), form


def outer() -> Outer:
    return Outer(torch.randn(2, 1, 3), torch.randn(2, 1, 5), torch.Size([3, 5]))


def norms_of(forms: list[Outer], *, as_they_arrive: bool) -> Tensor:
    store = FormStore(measured)
    for form in forms:
        store.add(0, form)
        if as_they_arrive:  # what the store must not do
            store._merge(0)
    return store.squared_norm(0)


@pytest.mark.parametrize("steps", [1, 4, 32])
def test_each_factor_of_many_sites_is_copied_once(steps: int, copied: list[int]) -> None:
    forms = [outer() for _ in range(steps)]
    expected = sum(f.dense() for f in forms).square().sum((1, 2))  # type: ignore[union-attr]
    found = norms_of(forms, as_they_arrive=False)
    assert torch.allclose(found, expected, rtol=1e-4)
    assert sum(copied) == (2 * steps * (3 + 5) if steps > 1 else 0)


def test_merging_as_they_arrive_would_copy_the_first_again_and_again(copied: list[int]) -> None:
    norms_of([outer() for _ in range(32)], as_they_arrive=True)
    assert sum(copied) > 10 * 2 * 32 * (3 + 5)


class Looped(nn.Module):
    """A cell that Python calls once for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.RNNCell(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 4)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state)


def test_a_cell_in_a_loop_of_python_copies_as_much_as_its_steps(copied: list[int]) -> None:
    def numbers(steps: int) -> int:
        torch.manual_seed(0)
        model, x = Looped().double(), torch.randn(3, steps, 5, dtype=torch.float64)
        with dptorch.record(model) as tape:
            losses = model(x).square().sum(1)
        losses.sum().backward()
        copied.clear()
        norms = tape.norms()
        total = sum(copied)
        for i in range(3):
            own = torch.autograd.grad(model(x[i : i + 1]).square().sum(), list(model.parameters()))
            norm = torch.cat([g.flatten() for g in own]).norm()
            assert relative_error(norms[i], norm) < 1e-9
        return total

    assert numbers(24) == 3 * numbers(8) > 0
