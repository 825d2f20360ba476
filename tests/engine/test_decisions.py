"""What a loop decides by values of the batch, and what an optimizer's hook makes of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dptorch.engine import optimizer_binding, step_hooks
from dptorch.errors import ExamplesMixError, PrivacyError
from dptorch.tape import trusted_reads
from dptorch.tape.recording import reads, recording
from tests.engine.setup import Loss, make_data, make_engine, make_model, parameters, steps_with

LARGE = 1e6


def said(loss: Loss, **plan: Any) -> list[str]:
    """The warnings of two steps with this loss."""
    reads._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert steps_with(loss, make_model(), **plan) == 2
    return [str(w.message) for w in caught if "no epsilon covers that" in str(w.message)]


def _branch(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(m(x), y)
    return loss * 1.0 if loss > LARGE else loss


def _guard(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    if (x.abs() > LARGE).any():
        x = x.clamp(-1, 1)
    return F.cross_entropy(m(x), y)


def _trusted(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(m(x), y)
    with trusted_reads():
        return loss * 1.0 if loss > LARGE else loss


def _logged(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    loss = F.cross_entropy(out, y)
    right = int((out.argmax(1) == y).sum()) / len(y) + loss.item() + float(x.norm())
    assert math.isfinite(right)
    assert str(loss)
    return loss


def _finite(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(m(x), y)
    assert torch.isfinite(loss)
    assert not torch.isnan(loss).any()
    assert bool(torch.isfinite(x).all())
    return loss


def _own(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    rows = [out[i] * 2 if x[i, 0] > 0 else out[i] for i in range(len(x))]
    return F.cross_entropy(torch.stack(rows), y)


@pytest.mark.parametrize("loss", [_branch, _guard])
def test_a_decision_for_several_examples_is_warned_of_once(loss: Loss) -> None:
    (text,) = said(loss)
    assert "a truth value of several examples" in text
    assert "test_decisions.py, line" in text


@pytest.mark.parametrize("loss", [_trusted, _logged, _finite, _own])
def test_logs_finite_checks_and_own_decisions_are_not(loss: Loss) -> None:
    assert said(loss) == []


@pytest.mark.parametrize(
    "skips", [lambda loss: not torch.isfinite(loss), lambda loss: math.isnan(loss.item())]
)
def test_a_loss_that_is_not_finite_is_warned_of_when_it_is(skips: Callable[[Any], bool]) -> None:
    reads._warned.clear()
    model, data = make_model(), make_data()
    data.tensors[0][3] = torch.nan
    engine = make_engine(model, steps=1)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    ((x, y),) = engine.loader(data)
    loss = F.cross_entropy(model(x), y)
    with pytest.warns(UserWarning, match="is not finite. If a step is skipped for that"):
        assert skips(loss)


# -- rows by their place ----------------------------------------------------------------------------


def _first(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y, reduction="none")[:4].sum()


def _decided(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y, reduction="none")[: 3 + int(x.max() > 0)].sum()


def _masked(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y, reduction="none")[x[:, 0] > 0].sum()


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize("loss", [_first, _decided])
def test_rows_by_their_place_are_refused(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ExamplesMixError, match=r"of the \d+ examples of the batch, picked by their"
    ):
        steps_with(loss, make_model(), loss_reduction="sum")
    for own in (False, True):
        assert steps_with(_masked, make_model(), own=own, loss_reduction="sum") == 2
    # The broken twin: a record that leaves moves another one into the sum.
    monkeypatch.setattr(recording, "judge_sum", lambda recording, call, state, out: state)
    x, y = make_data().tensors
    sums = []
    for kept in (x[:12], x[1:12]):
        model = make_model()
        engine = make_engine(model, loss_reduction="sum", max_grad_norm=0.01)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 1.0))
        before = parameters(model)
        _first(model, kept, y[12 - len(kept) : 12]).backward()
        optimizer.step()
        sums.append(parameters(model) - before)
    assert float((sums[0] - sums[1]).norm()) > 1.2 * 0.01


# -- hooks of the optimizer -------------------------------------------------------------------------


def stepped(hook: Callable[[Tensor, Tensor], Any]) -> int:
    """Steps with a hook that gets the noisy gradient and the loss."""
    model = make_model()
    engine = make_engine(model, steps=1)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    kept: list[Tensor] = []

    def before_the_step(*_: Any) -> None:
        for p in model.parameters():
            assert p.grad is not None
            hook(p.grad, kept[0])

    optimizer.register_step_pre_hook(before_the_step)
    for x, y in engine.loader(make_data()):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        kept.append(loss.detach())
        assert loss.item() > 0
        optimizer.step()
    return engine.steps_done


HOOKS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a number": lambda g, loss: g.mul_(loss.item()),
    "one over it": lambda g, loss: g.mul_(1 / loss.item()),
    "a tensor": lambda g, loss: g.div_(loss),
    "several at once": lambda g, loss: torch._foreach_mul_([g], 0.5 / loss.item()),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_scales_by_the_loss_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PrivacyError, match="a hook of the optimizer computes with"):
        stepped(HOOKS[name])
    # The broken twin: numbers go through. A tensor is followed to the parameter, with another message.
    monkeypatch.setattr(optimizer_binding, "has_hooks", lambda _: False)
    if name != "a tensor":
        assert stepped(HOOKS[name]) == 1


def test_public_hooks_and_logs_run() -> None:
    log: list[float] = []
    assert stepped(lambda g, loss: g.clamp_(-0.1, 0.1)) == 1
    assert stepped(lambda g, loss: log.append(float(g.norm()) / loss.item())) == 1
    assert len(log) == 4


@pytest.mark.parametrize("metric", ["loss", "item", "mean of the batch"])
def test_a_schedule_that_follows_a_private_loss_is_refused(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate() -> float:
        model = make_model()
        engine = make_engine(model, sample_rate=0.5, steps=4)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        schedule = ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
        for x, y in (batch for _ in range(2) for batch in engine.loader(make_data())):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step(
                {"loss": loss, "item": loss.item(), "mean of the batch": x.mean()}[metric]
            )
        return float(optimizer.param_groups[0]["lr"])

    with pytest.raises(PrivacyError, match="ReduceLROnPlateau is given a value"):
        rate()
    # Broken twin: torch's own method, by which the batches' losses decide the learning rate.
    monkeypatch.setattr(step_hooks, "watch_schedulers", lambda: None)
    monkeypatch.setattr(ReduceLROnPlateau, "step", step_hooks._plain_step)
    assert rate() < 0.1
