"""Means of a loss over the columns of a batch that is padded to its longest example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dptorch.errors import ExamplesMixError
from dptorch.tape.recording.padding import Padding
from tests.engine.setup import make_engine, parameters

BOUND, SIZE = 0.05, 12
Row = tuple[Tensor, Tensor]


def rows(longest: int = 7) -> list[Row]:
    """Sequences of 5 and 6 positions, the last of another length."""
    g = torch.Generator().manual_seed(1)
    lengths = [5 + i % 2 for i in range(SIZE - 1)] + [longest]
    return [
        (torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)) for n in lengths
    ]


def padded(label: int = 0, width: int | None = None) -> Callable[[list[Row]], Any]:
    def collate(items: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
        x = pad_sequence([x for x, _ in items], batch_first=True)
        y = pad_sequence([y for _, y in items], batch_first=True, padding_value=label)
        if width is not None:
            x = F.pad(x, (0, 0, 0, width - x.shape[1]))
            y = F.pad(y, (0, width - y.shape[1]), value=label)
        mask = torch.arange(x.shape[1]) < torch.tensor([len(x) for x, _ in items])[:, None]
        return x, y, mask

    return collate


def step(loss: Any, collate: Any, data: list[Row] | None = None, **settings: Any) -> Tensor:
    """The clipped sum of one step on all rows."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    plan = {"max_grad_norm": BOUND, "sample_size": SIZE, "steps": 1, "self_check": True}
    engine = make_engine(model, **plan | settings)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=SIZE))
    before = parameters(model)
    for batch in engine.loader(data or rows(), collate_fn=collate):
        loss(model, *batch).backward()
        optimizer.step()
    return before - parameters(model)


def each(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x).transpose(1, 2), y, reduction="none")


MIXING: dict[str, Any] = {
    "classes": lambda m, x, y, k: F.cross_entropy(m(x).transpose(1, 2), y),
    "classes, flat": lambda m, x, y, k: F.cross_entropy(m(x).flatten(0, 1), y.flatten()),
    "positions, then examples": lambda m, x, y, k: each(m, x, y).mean(1).mean(),
    "all at once": lambda m, x, y, k: each(m, x, y).mean(),
    "elements": lambda m, x, y, k: F.mse_loss(m(x), F.one_hot(y.relu(), 3).float()),
    "binary": lambda m, x, y, k: F.binary_cross_entropy_with_logits(m(x)[..., 0], 1.0 * (y > 1)),
}
OWN: dict[str, Any] = {
    "own positions": lambda m, x, y, k: ((each(m, x, y) * k).sum(1) / k.sum(1)).mean(),
    "sums": lambda m, x, y, k: (each(m, x, y) * k).sum(1).mean(),
    "one output an example": lambda m, x, y, k: F.mse_loss(
        (m(x) * k[..., None]).sum(1), torch.zeros(len(x), 3)
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_mean_over_padded_columns_is_refused(name: str) -> None:
    with pytest.raises(ExamplesMixError, match=r"padded to 7 columns, the length of its longest"):
        step(MIXING[name], padded())


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
def test_without_the_refusal_one_long_record_divides_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broken twin: one row is replaced by one of the same begin that is far longer."""
    monkeypatch.setattr(Padding, "is_seen", lambda *_: False)
    moved = {
        name: float((step(loss, padded(), rows()) - step(loss, padded(), rows(70))).norm() / BOUND)
        for name, loss in {**MIXING, "own": OWN["own positions"]}.items()
    }
    assert moved.pop("own") <= 2 + 1e-4
    assert all(each > 4 for each in moved.values())


@pytest.mark.parametrize("name", OWN)
def test_means_over_an_example_s_own_positions_run(name: str) -> None:
    assert 0 < float(step(OWN[name], padded()).norm()) <= SIZE * BOUND


def test_a_constant_length_runs_and_so_do_labels_that_are_left_out() -> None:
    for name in ("classes", "classes, flat"):
        assert float(step(MIXING[name], padded(label=-100)).norm()) > 0
    for loss in MIXING.values():
        assert float(step(loss, padded(width=9)).norm()) > 0


def test_a_batch_without_padding_runs() -> None:
    """All rows of one length, another than that of the first record of the data set."""
    even = [(x[:5], y[:5]) for x, y in rows()]
    even[0] = even[0][0][:4], even[0][1][:4]
    for loss in MIXING.values():
        assert float(step(loss, padded(), even[1:] + even[1:2]).norm()) > 0
        with pytest.raises(ExamplesMixError):
            step(loss, padded(), even)


def test_the_check_can_be_switched_off() -> None:
    assert float(step(MIXING["classes"], padded(), self_check=False).norm()) > 0
