"""Code that a loop applies to followed tensors: custom Functions, TorchScript, hooks of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import BackwardHook

from dptorch.errors import ExamplesMixError, NotCoveredError
from dptorch.tape.recording import backward_code, patches
from tests.engine.setup import (
    SIZE,
    clipped_mean,
    make_data,
    make_engine,
    make_model,
    parameters,
    steps_with,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Change = Callable[[Tensor], Tensor]
BOUND = 0.5


class Doubled(torch.autograd.Function):
    """Twice its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * g


class Normed(Doubled):
    """Twice its argument, with a gradient of length 1 for the batch."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g / g.norm()


class OverMean(Doubled):
    """Its argument over the mean of the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x / x.mean()


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    """Divide by the norm of the batch."""
    return x / x.norm()


class Divided(nn.Module):
    """A module that is divided by the norm of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm()


def hooked(register: str, hook: Callable[..., Any]) -> Change:
    doubled = nn.Linear(3, 3, bias=False).requires_grad_(False)
    doubled.weight.data = 2 * torch.eye(3)
    getattr(doubled, register)(hook)
    return doubled


BEFORE, AFTER = "register_full_backward_pre_hook", "register_full_backward_hook"
MIXING: dict[str, Change] = {
    "Function with a mixing backward": Normed.apply,
    "Function with a mixing forward": OverMean.apply,
    "TorchScript function": scripted,
    "TorchScript module": torch.jit.script(Divided()),
    "traced function": torch.jit.trace(Divided(), torch.ones(4, 3), check_trace=False),
    "hook": hooked(AFTER, lambda m, g, o: (g[0] / g[0].norm(),)),
    "hook before": hooked(BEFORE, lambda m, o: (o[0] / o[0].norm(),)),
    "old hook": hooked(
        "register_backward_hook", lambda m, g, o: tuple(v if v is None else v / v.norm() for v in g)
    ),
}
APART: dict[str, Change] = {
    "Function": Doubled.apply,
    "hook": hooked(AFTER, lambda m, g, o: (g[0] * 1,)),
    "hook before": hooked(BEFORE, lambda m, o: (o[0] * 1,)),
    "hook that looks": hooked(AFTER, lambda m, g, o: None),
}


def loss_of(change: Change) -> Any:
    return lambda m, x, y: F.cross_entropy(change(m(x)), y)


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", MIXING)
def test_code_that_mixes_examples_beside_the_model_is_refused(name: str, own: bool) -> None:
    with pytest.raises((ExamplesMixError, NotCoveredError)):
        steps_with(loss_of(MIXING[name]), make_model(), own=own)


@pytest.mark.parametrize("name", APART)
def test_code_that_keeps_examples_apart_beside_the_model_is_exact(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = 2 * self.inner(x)
            return out

    model, oracle = make_model(), Model()
    engine = make_engine(model, max_grad_norm=BOUND, steps=1)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 1.0))
    before = parameters(model)
    for x, y in engine.loader(make_data()):
        loss_of(APART[name])(model, x, y).backward()
        optimizer.step()
    expected = before - clipped_mean(oracle, make_data(), BOUND, SIZE)
    torch.testing.assert_close(parameters(model), expected)


def test_other_programs_run_as_before_once_a_model_was_hooked() -> None:
    """What is patched for good looks at its arguments, and leaves plain tensors alone."""
    steps_with(loss_of(lambda t: t), make_model())
    for change in [*MIXING.values(), *APART.values()]:
        x = torch.randn(4, 3, requires_grad=True)
        change(x).sum().backward()
        assert x.grad is not None
        assert type(change(x)) is Tensor
    data = [(torch.randn(4, 5), torch.zeros(4, dtype=torch.long))]
    model = make_model()
    train(model, torch.optim.SGD(model.parameters(), 0.1), data)


def test_without_the_patches_mixing_code_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken twin: custom Functions and hooks as torch has them, outside of models."""
    steps_with(loss_of(Doubled.apply), make_model())
    monkeypatch.setattr(patches, "_followed_type", lambda args, kwargs: None)
    assert steps_with(loss_of(Normed.apply), make_model()) == 2
    for owner, name in ((patches, "_backward_hook"), (torch.nn.modules.module, "BackwardHook")):
        monkeypatch.setattr(owner, name, BackwardHook)
    assert steps_with(loss_of(MIXING["hook"]), make_model()) == 2
    monkeypatch.setattr(backward_code, "reading_modules", lambda: iter(()))
    assert steps_with(loss_of(MIXING["old hook"]), make_model()) == 2
