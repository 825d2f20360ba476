"""Copies of an engine, or of what it is bound to, never train with less privacy in silence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dptorch
from dptorch.compat import private_transformers
from dptorch.engine import PrivacyEngine
from dptorch.errors import PrivacyError, PrivacyWarning


def made() -> tuple[nn.Module, PrivacyEngine, torch.optim.Optimizer]:
    model = nn.Linear(4, 2)
    engine = dptorch.PrivacyEngine(
        model, batch_size=4, sample_size=64, steps=8, noise_multiplier=1.0, target_delta=1e-3
    )
    return model, engine, engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize(
    "inside", [lambda e: e, lambda e: {"engine": e}], ids=["itself", "in a dict"]
)
def test_an_engine_is_not_copied(
    make_copy: Callable[[Any], Any], inside: Callable[[PrivacyEngine], Any]
) -> None:
    _, engine, _ = made()
    if make_copy is copy.copy and isinstance(inside(engine), dict):
        assert copy.copy(inside(engine))["engine"] is engine  # a shallow copy copies no engine
        return
    with pytest.raises(PrivacyError, match="not copied or pickled"):
        make_copy(inside(engine))


def test_a_copied_engine_would_train_without_privacy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: the copy's model has no hooks, so its optimizer steps on raw gradients."""
    monkeypatch.delattr(PrivacyEngine, "__reduce__")
    _, engine, _ = made()
    twin = copy.deepcopy(engine)
    with pytest.warns(PrivacyWarning, match="copy of one that has a privacy engine"):
        twin.model(torch.randn(4, 4)).sum().backward()
    assert all(p.grad is not None for p in twin.model.parameters())
    assert all(p.grad is None for p in engine.model.parameters())


def test_a_copy_of_the_model_is_an_ordinary_model_and_says_so() -> None:
    model, _, _ = made()
    twin = copy.deepcopy(model)
    with pytest.warns(PrivacyWarning, match="copy of one that has a privacy engine"):
        twin(torch.randn(4, 4))
    pickle.loads(pickle.dumps(model))


def test_copies_of_a_model_with_an_adapter_zero_their_own_gradients() -> None:
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = private_transformers.PrivacyEngine(
        model, batch_size=6, sample_size=10, epochs=1, max_grad_norm=1.0, noise_multiplier=1.0
    )
    engine.attach(optimizer)
    optimizer.virtual_step(loss=model(torch.randn(2, 3)).sum(1))  # type: ignore[attr-defined]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.weight.grad = torch.ones(1, 3)
        twin.zero_grad()
        assert twin.weight.grad is None
        assert engine.engine._batch._kept.sums is not None
    model.zero_grad()
    assert engine.engine._batch._kept.sums is None
    engine.detach()
    assert "zero_grad" not in model.__dict__
    assert "zero_grad" not in optimizer.__dict__
