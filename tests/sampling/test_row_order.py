"""A collate function that sorts is refused where rows of weight zero are known by their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import dptorch
from dptorch.errors import ConfigurationError
from dptorch.sampling import row_order
from dptorch.sampling.row_order import refuse_own_order

BOUND, SIZE = 0.05, 30
Row = tuple[Tensor, Tensor]


def in_order(items: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    x = pad_sequence([x for x, _ in items], batch_first=True)
    return x, torch.tensor([len(x) for x, _ in items]), torch.stack([y for _, y in items])


def longest_first(items: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    return in_order(sorted(items, key=lambda item: -len(item[0])))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        scores: Tensor = self.head(self.rnn(packed)[1][0][-1])
        return scores


def rows(first: int) -> list[Row]:
    g = torch.Generator().manual_seed(1)
    made = [
        (torch.randn(2 + i % 4, 4, generator=g) * 0.1 + 1, torch.tensor(0)) for i in range(SIZE)
    ]
    return [(torch.randn(first, 4, generator=g) * 0.1 + 1, torch.tensor(0)), *made[1:]]


def one_step(data: list[Row], collate: Any, sampling: str = "truncated-poisson") -> Tensor:
    """The clipped sum of one step, flat."""
    torch.manual_seed(0)
    model = Packed()
    engine = dptorch.PrivacyEngine(
        model,
        sample_size=SIZE,
        batch_size=5,
        steps=1,
        sampling=sampling,
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        target_delta=1e-5,
        seed=0,
    )
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for x, lengths, labels in engine.loader(data, collate_fn=collate):  # type: ignore[arg-type]
        F.cross_entropy(model(x, lengths), labels).backward()
        optimizer.step()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) * 5


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
def test_a_sorting_collate_function_is_refused_where_batches_are_padded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigurationError, match="into an order of its own"):
        one_step(rows(9), longest_first)
    # The same rows in their own order: what is drawn counts, and nothing else.
    drawn = one_step(rows(9), in_order)
    assert float(one_step(rows(9), longest_first, "poisson").norm()) > 0  # nothing is padded
    # Without the refusal padding counts, and rows that were drawn do not.
    monkeypatch.setattr(row_order, "refuse_own_order", lambda *_: None)
    assert float((one_step(rows(9), longest_first) - drawn).norm()) > 2 * BOUND


def test_other_collate_functions_are_let_through() -> None:
    items = [(torch.randn(2 + i % 4, 4), torch.tensor(i % 3)) for i in range(13)]
    backwards = in_order(items[::-1])[0]
    assert not torch.equal(in_order(items)[0], backwards)
    refuse_own_order(in_order, items)
    refuse_own_order(lambda rows: {"x": in_order(rows)[0], "at": torch.arange(len(rows))}, items)
    refuse_own_order(lambda rows: torch.ones(len(rows), 2), items)  # it says nothing of their order
    refuse_own_order(lambda rows: torch.rand(len(rows), 2), items)
    refuse_own_order(lambda rows: torch.stack([x for x, _ in rows]), items)  # raises in the loop


@pytest.mark.parametrize("ties", [False, True])
def test_sorting_is_found_with_ties_and_without(ties: bool) -> None:
    items = [(torch.randn(2 + (i % 4 if ties else i), 4), torch.tensor(i % 3)) for i in range(13)]
    with pytest.raises(
        ConfigurationError, match="of 13 examples and of the same examples backwards"
    ):
        refuse_own_order(longest_first, items)
