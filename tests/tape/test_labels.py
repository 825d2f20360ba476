"""Integers and booleans that carry the examples: labels, masks, lengths in losses written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.loop import one_example_loop, relative_error
from tests.tape.zoo.base import Lambda
from torch import Tensor, nn

import dptorch
from dptorch.errors import PrivacyError
from dptorch.tape.propagation import FAMILIES

B, T, D = 4, 5, 6
Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


TABLE = torch.arange(1.0, D + 1, dtype=torch.float64)
PLACES = torch.arange(T)


def focal(m: nn.Module, h: Tensor, y: Tensor, k: Tensor) -> Tensor:
    p = h.softmax(1).gather(1, y[:, None]).squeeze(1)
    return -((1 - p) ** 2) * p.log()


def in_rows(m: nn.Module, h: Tensor, y: Tensor, k: Tensor) -> Tensor:
    rows = torch.arange(len(h))
    return -h.log_softmax(1)[rows, y]


def written_one_hot(m: nn.Module, h: Tensor, y: Tensor, k: Tensor) -> Tensor:
    target = torch.zeros(len(h), D)
    target[torch.arange(len(h)), y] = 1.0
    return (h.log_softmax(1) * target).sum(1)


def right_answers(m: nn.Module, h: Tensor, y: Tensor, k: Tensor) -> Tensor:
    return F.cross_entropy(h, y, reduction="none") * (1 + (h.argmax(1) == y).long())


def own_positions(m: nn.Module, h: Tensor, y: Tensor, k: Tensor) -> Tensor:
    mask = PLACES[None, :] < k[:, None]
    loss = (h[:, :T] * mask).sum(1) / mask.sum(1)
    return loss.masked_fill(k == 1, 0.5) + h[:, 0]


# A loss for each example, of h [B, D], labels y [B] in [0, D) and lengths k [B] in [1, T].
LOSSES: dict[str, Loss] = {
    "focal": focal,
    "picked by rows": in_rows,
    "picked by a range": lambda m, h, y, k: -h.log_softmax(1)[range(len(h)), y],
    "picked by a list": lambda m, h, y, k: -h.log_softmax(1)[list(range(len(h))), y],
    "picked one by one": lambda m, h, y, k: torch.stack([h[i, y[i]].exp() for i in range(len(h))]),
    "take_along_dim": lambda m, h, y, k: torch.take_along_dim(h, y[:, None], 1).square(),
    "one_hot": lambda m, h, y, k: (F.one_hot(y, D) * h.log_softmax(1)).sum(1),
    "smoothed": lambda m, h, y, k: (
        (0.9 * F.one_hot(y, D) + 0.1 / D) * h.log_softmax(1)
    ).sum(1),
    "scattered one-hot": lambda m, h, y, k: (
        torch.zeros(len(h), D).scatter(1, y[:, None], 1.0) * h.log_softmax(1)
    ).sum(1),
    "written one-hot": written_one_hot,
    "compared one-hot": lambda m, h, y, k: (h * (torch.arange(D) == y[:, None])).sum(1),
    "weights of classes": lambda m, h, y, k: TABLE[y] * F.cross_entropy(h, y, reduction="none"),
    "index_select": lambda m, h, y, k: TABLE.index_select(0, y) * h.sum(1),
    "take": lambda m, h, y, k: torch.take(TABLE, y) * h.sum(1),
    "right answers": right_answers,
    "embedded": lambda m, h, y, k: (m.e(y) * h).sum(1),
    "masked mean of own positions": own_positions,
    "last position": lambda m, h, y, k: h[torch.arange(len(h)), k - 1].square(),
    "where": lambda m, h, y, k: torch.where(y > 2, h.sum(1), h.square().sum(1)),
    "selected by its own mask": lambda m, h, y, k: (h * (y > 1)[:, None])[:, 1:].sum(1),
    "topk": lambda m, h, y, k: h.topk(2, dim=1).values.sum(1) * (h.topk(2, 1)[1] == y[:, None]).any(1),
    "sorted": lambda m, h, y, k: (h.sort(1).values * h.argsort(1)).sum(1),
    "ranks": lambda m, h, y, k: h.argsort(1).argsort(1)[torch.arange(len(h)), y] * h.sum(1),
    "arithmetic": lambda m, h, y, k: ((y * 2 + 1) % 3 | (y & 1)).double() * h.sum(1),
    "bucketize": lambda m, h, y, k: torch.bucketize(y, torch.tensor([1, 3])) * h.sum(1),
    "isin": lambda m, h, y, k: torch.isin(y, torch.tensor([1, 3])) * h.sum(1) + h[:, 0],
    "cumulated": lambda m, h, y, k: (h * F.one_hot(y, D).cumsum(1)).sum(1),
    "index of the dimension of classes": lambda m, h, y, k: h.index_fill(
        1, torch.tensor([0]), 0.0
    ).sum(1) * y,
    "as floats": lambda m, h, y, k: (h.mean(1) - y.to(h)).square() + (h.mean(1) - y.float()).abs(),
    "bits": lambda m, h, y, k: (h[:, :3] * (y[:, None] >> torch.arange(3) & 1)).sum(1),
    "cases": lambda m, h, y, k: torch.stack([h.sum(1), h.prod(1)]).gather(0, (y % 2)[None])[0],
    "logical": lambda m, h, y, k: h.sum(1) * ((y > 1) & (k < 3) | ~(y == 4)).double() + h[:, 1],
}  # fmt: skip


def batch() -> list[Tensor]:
    return [torch.randn(B, 5), torch.tensor([1, 0, 5, 3]), torch.tensor([3, 1, 5, 2])]


def run(loss: Loss, inputs: list[Tensor]) -> None:
    model = Lambda(
        lambda m, x, y, k: loss(m, m.a(x), y, k), a=nn.Linear(5, D), e=nn.Embedding(D, D)
    )
    total = lambda m, *b: m(*b).reshape(len(b[0]), -1).sum(1)
    expected = one_example_loop(model, inputs, total)
    with dptorch.record(model) as tape:
        total(model, *inputs).sum().backward()
    assert expected["a.weight"].abs().sum() > 0
    for parameter, gradient in tape.per_example_gradients().items():
        assert relative_error(gradient, expected[parameter]) <= 1e-9, parameter


@pytest.mark.parametrize("name", LOSSES)
def test_losses_by_the_batchs_own_labels(name: str) -> None:
    run(LOSSES[name], batch())


MIXING: dict[str, Loss] = {
    "frequencies of the batch": lambda m, h, y, k: h.sum(1) / y.bincount(minlength=D)[y],
    "frequencies, added up": lambda m, h, y, k: (
        h.sum(1) / torch.zeros(D).index_add(0, y, torch.ones(len(y)))[y]
    ),
    "frequencies of one-hots": lambda m, h, y, k: h.sum(1) / F.one_hot(y, D).sum(0)[y],
    "length of the longest": lambda m, h, y, k: h.sum(1) * k / k.max(),
    "same class": lambda m, h, y, k: (h @ h.T * (y[:, None] == y)).sum(1),
    "rank among the examples": lambda m, h, y, k: h.sum(1) * y.argsort().argsort(),
    "classes seen": lambda m, h, y, k: h.sum(1) * y.unique().numel() + h.sum(1) * y.unique().sum(),
    "another's label": lambda m, h, y, k: (h * F.one_hot(y.roll(1), D)).sum(1),
    "any of them": lambda m, h, y, k: h.sum(1) * (y == 3).any(),
    "one-hots as wide as the batch needs": lambda m, h, y, k: (
        h.sum(1) * F.one_hot(y).sum(1)
        + (h[:, :1] / F.one_hot(y).double().mean(1, keepdim=True)).sum(1)
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_losses_by_others_labels_are_refused(name: str) -> None:
    model = Lambda(lambda m, x, y, k: MIXING[name](m, m.a(x), y, k), a=nn.Linear(5, D))
    with pytest.raises(PrivacyError), dptorch.record(model):
        model(*batch()).sum().backward()


@pytest.mark.parametrize(
    ("op", "name"),
    [("bincount", "frequencies of the batch"), ("index_add", "frequencies, added up")],
)
def test_counts_taken_for_constants_would_be_caught(
    op: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that lets counts over the batch pass is contradicted by the loop."""
    monkeypatch.setitem(FAMILIES, op, lambda call, outputs: None)
    inputs = batch()
    inputs[1] = torch.tensor([1, 1, 5, 1])
    with pytest.raises(AssertionError):
        run(MIXING[name], inputs)
