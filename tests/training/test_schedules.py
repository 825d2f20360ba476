"""Learning rates over the steps."""

from __future__ import annotations

import pytest
import torch

from dptorch.errors import ConfigurationError
from dptorch.training.schedules import Schedule


def test_decays_go_from_one_to_zero() -> None:
    assert [Schedule("constant", 4)(step) for step in range(4)] == [1.0] * 4
    assert [Schedule("linear", 4)(step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = [Schedule("cosine", 4)(step) for step in range(5)]
    assert cosine == pytest.approx([1.0, 0.8536, 0.5, 0.1464, 0.0], abs=1e-4)


def test_a_warm_up_rises_to_one_and_is_never_above() -> None:
    schedule = Schedule("cosine", 20, warmup=0.25)
    shares = [schedule(step) for step in range(20)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(shares) == 1.0
    assert shares[5:] == sorted(shares[5:], reverse=True)


def test_each_group_keeps_its_own_rate() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 2.0}, {"params": [b], "lr": 4.0}])
    for step in (0, 1):
        Schedule("linear", 2).apply(optimizer, step)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="mean 'cosine'"):
        Schedule("cosin", 4)
    with pytest.raises(ConfigurationError, match=r"warmup=1\.0: expected a fraction"):
        Schedule("linear", 4, warmup=1.0)
