"""Errors and warnings as their reader meets them."""

from __future__ import annotations

import copy
import linecache
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dptorch
from dptorch import errors
from dptorch.errors import PrivacyWarning


def engine_on(model: nn.Module, **settings: Any) -> dptorch.PrivacyEngine:
    return dptorch.PrivacyEngine(
        model,
        **{
            "sample_rate": 0.5,
            "sample_size": 8,
            "steps": 4,
            "noise_multiplier": 1.0,
            "target_delta": 1e-3,
            **settings,
        },
    )


def line_of(make: Callable[[], Any], message: str) -> tuple[str, str]:
    """File of the warning that says `message`, and the text of the line it points at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    (found,) = [w for w in caught if message in str(w.message)]
    assert found.category is PrivacyWarning
    return found.filename, linecache.getline(found.filename, found.lineno).strip()


def plan_with_a_large_delta() -> None:
    dptorch.make_plan(  # THE LINE
        batch_size=4, sample_size=8, steps=1, noise_multiplier=1.0, target_delta=0.5
    )


def engine_with_a_large_delta() -> None:
    engine_on(nn.Linear(2, 1), target_delta=0.5)


def step_on_a_batch_of_ones_own() -> None:
    model = nn.Linear(2, 1)
    optimizer = engine_on(model).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.randn(4, 2)).square().mean().backward()
    optimizer.step()  # THE LINE


def step_by_a_scheduler_and_a_closure() -> None:
    model = nn.Linear(2, 1)
    optimizer = engine_on(model).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(4, 2)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # THE LINE


def forward_after_a_backward_without_an_optimizer() -> None:
    model = nn.Linear(2, 1)
    _engine = engine_on(model)
    model(torch.randn(4, 2)).square().mean().backward()
    model(torch.randn(4, 2))  # THE LINE


def forward_of_a_copy() -> None:
    model = nn.Linear(2, 1)
    _engine = engine_on(model)
    copy.deepcopy(model)(torch.randn(4, 2))  # THE LINE


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (plan_with_a_large_delta, "is not below 1/8"),
        (step_on_a_batch_of_ones_own, "did not come from engine.loader()"),
        (step_by_a_scheduler_and_a_closure, "did not come from engine.loader()"),
        (forward_after_a_backward_without_an_optimizer, "no optimizer is attached"),
        (forward_of_a_copy, "copy of one that has a privacy engine"),
    ],
)
def test_a_warning_points_at_the_users_line(act: Callable[[], None], message: str) -> None:
    file, line = line_of(act, message)
    assert file == __file__
    assert line.endswith("# THE LINE")


def test_one_frame_up_is_not_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: the line depends on how deep the warning is given."""
    monkeypatch.setattr(errors, "_NOT_THE_CALLER", ())  # always the frame that calls `warn`
    file, _ = line_of(engine_with_a_large_delta, "is not below 1/8")
    assert file != __file__


def test_an_engine_with_a_plan_takes_no_settings() -> None:
    plan = dptorch.make_plan(batch_size=4, sample_size=8, steps=1, noise_multiplier=1.0)
    with pytest.raises(
        dptorch.errors.ConfigurationError, match=r"plan= and max_grad_norm= are given"
    ):
        dptorch.PrivacyEngine(nn.Linear(2, 1), plan=plan, max_grad_norm=0.5)


@pytest.mark.parametrize("make", [dptorch.make_plan, lambda **k: engine_on(nn.Linear(2, 1), **k)])
def test_an_unknown_setting_is_answered_with_the_nearest(make: Callable[..., Any]) -> None:
    with pytest.raises(dptorch.errors.ConfigurationError, match=r"Did you mean 'max_grad_norm'"):
        make(max_gradnorm=0.5)


def test_the_engines_settings_are_its_arguments() -> None:
    """What the engine suggests from is what it takes."""
    from dptorch.engine.settings import EngineSettings
    from dptorch.plan import PlanSettings

    own = dptorch.PrivacyEngine.__init__.__kwdefaults__
    assert set(EngineSettings.__annotations__) == {*own, *PlanSettings.__annotations__}
