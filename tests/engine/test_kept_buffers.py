"""Tensors of the loop's own that rows are written into are followed, and may be emptied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptorch.errors import ExamplesMixError, PrivacyError
from dptorch.tape.recording import outputs
from tests.engine.setup import SIZE, make_model, steps_with

Write = Callable[[Tensor, Tensor, Tensor], Any]


def by_row(bank: Tensor, z: Tensor, x: Tensor) -> None:
    for i in range(len(z)):
        bank[i] = z[i]


def rolled(bank: Tensor, z: Tensor, x: Tensor) -> None:
    bank[:] = torch.roll(bank, len(z), 0)
    bank[: len(z)] = z


WRITES: dict[str, Write] = {
    "slice": lambda bank, z, x: bank.__setitem__(slice(len(z)), z),
    "rows": by_row,
    "rolled": rolled,
    "view": lambda bank, z, x: bank[0].add_(x.mean(0)[:3]),
    "copy into a view": lambda bank, z, x: bank[: len(z)].copy_(z),
    "index_copy_": lambda bank, z, x: bank.index_copy_(0, torch.arange(len(z)), z),
}


def with_a_bank(write: Write) -> Any:
    bank = torch.zeros(SIZE, 3)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = m(x)
        value = (F.cross_entropy(z, y, reduction="none") + (z @ bank.clone().T).logsumexp(1)).mean()
        write(bank, z.detach(), x)
        return value

    return loss


@pytest.mark.parametrize("name", WRITES)
def test_a_bank_of_rows_of_earlier_batches_is_refused(name: str) -> None:
    with pytest.raises(ExamplesMixError, match="memory bank"):
        steps_with(with_a_bank(WRITES[name]), make_model())


@pytest.mark.parametrize("name", ["slice", "rows", "view"])
def test_without_following_what_is_written_to_a_bank_is_not_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken twin."""
    monkeypatch.setattr(outputs, "_follow_written", lambda *_: None)
    assert steps_with(with_a_bank(WRITES[name]), make_model()) == 2


@pytest.mark.parametrize("mixed", [False, True])
def test_weights_that_are_written_by_index_are_followed(mixed: bool) -> None:
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(m(x), y, reduction="none")
        weights = torch.zeros(len(each))
        weights[:] = each.detach()
        return (each * (weights / weights.mean() if mixed else weights)).mean()

    if mixed:
        with pytest.raises(ExamplesMixError):
            steps_with(loss, make_model())
    else:
        assert steps_with(loss, make_model()) == 2


def test_a_buffer_for_a_log_may_be_written_in_every_step() -> None:
    losses, correct = torch.zeros(SIZE), torch.zeros(2)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = m(x)
        each = F.cross_entropy(z, y, reduction="none")
        losses[: len(each)] = each.detach()
        correct[0] += (z.argmax(1) == y).sum()
        correct[1] += len(y)
        return each.mean()

    assert steps_with(loss, make_model()) == 2
    assert losses.numpy().max() > 0
    assert 0 < correct[1].item() <= 2 * SIZE
    assert float(losses.mean()) > 0


@pytest.mark.parametrize("emptied", [False, True])
def test_a_buffer_that_is_emptied_first_may_be_filled_anew(emptied: bool) -> None:
    inputs, one_hot = torch.zeros(SIZE, 5), torch.zeros(SIZE, 3)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if emptied:
            inputs.zero_()
            one_hot.fill_(0.0)
        inputs[: len(x)] = x
        one_hot[torch.arange(len(y)), y] = 1.0
        logits = m(inputs[: len(x)])
        return -(one_hot[: len(x)] * logits.log_softmax(1)).sum(1).mean()

    if emptied:
        assert steps_with(loss, make_model()) == 2
    else:
        with pytest.raises(PrivacyError, match="earlier"):
            steps_with(loss, make_model())
