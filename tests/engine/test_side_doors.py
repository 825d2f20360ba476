"""Values of a batch that leave a forward pass, or a backward, by another way than being returned.

An attribute of a module, a list that a hook appends to, a closure, a custom Function that keeps what it
is given. Whoever reads them there, in this step or the next, gets values of the batch.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dptorch
from dptorch.errors import NotCoveredError, PrivacyError, PrivacyWarning
from dptorch.tape import trusted_reads
from dptorch.tape.recording import batches, model_hooks, outputs, patches
from tests.engine.setup import make_data, make_engine, make_model, steps_with
from tests.tape.zoo.base import Lambda

pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")


class _Keeping(Function):
    """An identity that keeps what its forward, or its backward, gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Callable[[Tensor, bool], Any]) -> Tensor:
        ctx.keep = keep
        keep(x.detach().clone(), False)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.keep(grads[0].clone(), True)
        return grads[0], None


class Model(nn.Module):
    """Keeps its hidden values where a test says."""

    def __init__(self, keep: Callable[[Model, Tensor], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.keep = nn.Linear(5, 7), nn.Linear(7, 3), keep
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.keep is not None:
            self.keep(self, h)
        out: Tensor = self.last(h)
        return out


def _attribute(m: Model, h: Tensor) -> None:
    m.kept = [h.detach()]


def _with_its_graph(m: Model, h: Tensor) -> None:
    m.kept = [h]


def _by_a_hook() -> Model:
    m = Model()
    m.first.register_forward_hook(lambda _, inputs, out: m.kept.append(out.detach()))
    return m


def _by_a_backward_hook() -> Model:
    m = Model()
    m.last.register_full_backward_hook(lambda _, inputs, outs: m.kept.append(outs[0]))
    return m


def _by_a_hook_of_a_tensor(m: Model, h: Tensor) -> None:
    if h.requires_grad:
        h.register_hook(m.kept.append)


def _of_the_step(m: Model, x: Tensor, y: Tensor) -> Tensor:
    """The loss is scaled by what the forward pass left."""
    out = m(x)
    return F.cross_entropy(out * m.kept[-1].detach().abs().sum(), y)


def _of_the_last_step(m: Model, x: Tensor, y: Tensor) -> Tensor:
    if m.kept:
        x = x * m.kept[-1].abs().sum()
    return F.cross_entropy(m(x), y)


def _function(of_the_backward: bool) -> Callable[[Model, Tensor, Tensor], Tensor]:
    def loss(m: Model, x: Tensor, y: Tensor) -> Tensor:
        def keep(t: Tensor, in_the_backward: bool) -> None:
            if in_the_backward == of_the_backward:
                m.kept.append(t)

        if m.kept:
            x = x * m.kept[-1].abs().sum()
        return F.cross_entropy(_Keeping.apply(m(x), keep), y)  # type: ignore[no-untyped-call]

    return loss


DOORS: dict[str, tuple[Callable[[], Model], Any]] = {
    "attribute": (lambda: Model(_attribute), _of_the_step),
    "attribute with its graph": (lambda: Model(_with_its_graph), _of_the_step),
    "attribute, next step": (lambda: Model(_attribute), _of_the_last_step),
    "forward hook": (_by_a_hook, _of_the_step),
    "forward hook, next step": (_by_a_hook, _of_the_last_step),
    "hook of a tensor": (lambda: Model(_by_a_hook_of_a_tensor), _of_the_last_step),
    "backward hook": (_by_a_backward_hook, _of_the_last_step),
    "forward of a Function": (Model, _function(of_the_backward=False)),
    "backward of a Function": (Model, _function(of_the_backward=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_what_a_forward_pass_leaves_behind_is_followed(
    door: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loss = DOORS[door]
    with pytest.raises(PrivacyError, match=r"statistic|earlier batch|another forward pass"):
        steps_with(loss, model(), own=own)

    def forget(batch: batches.Batch) -> Iterator[Tensor]:
        batch.made = []
        return iter(())

    # Broken twin: only what a model returns is followed.
    monkeypatch.setattr(batches.Batch, "kept", forget)
    assert steps_with(loss, model(), own=own) == 2


class _MixesBackwards(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] + grads[0].mean(0)


def _in_the_model(m: Model, h: Tensor) -> Tensor:
    return _MixesBackwards.apply(h)  # type: ignore[no-any-return,no-untyped-call]


def _scripted(m: Model, h: Tensor) -> Tensor:
    return _centre(h)  # type: ignore[no-any-return]


@torch.jit.script
def _centre(x: Tensor) -> Tensor:
    return x - x.mean(0)


def _hooked(m: Model, h: Tensor) -> Tensor:
    h.register_hook(lambda g: g - g.mean(0))
    return h


def _in_a_thread(m: Model, h: Tensor) -> Tensor:
    made: list[Tensor] = []
    thread = threading.Thread(target=lambda: made.append(h.detach().mean(0)))
    thread.start()
    thread.join()
    return h - made[0]


@pytest.mark.parametrize("change", [_in_the_model, _scripted, _hooked, _in_a_thread])
def test_a_model_is_followed_after_the_engine_of_another_was_detached(
    change: Callable[[Model, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps() -> int:
        """As `steps_with`, with another engine detached before the first step."""
        model = Model()
        model.last = Changed(model, change)
        other, engine = make_engine(make_model()), make_engine(model, steps=2, self_check=False)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        other.detach()
        for _ in range(2):
            for x, y in engine.loader(make_data()):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        return engine.steps_done

    with pytest.raises(
        PrivacyError, match=r"from others|was not computed in|a thread is given work"
    ):
        steps()
    if change is _in_the_model:
        # Broken twin: detaching takes the patch off custom Functions for all.
        monkeypatch.setitem(patches._apply_function.__globals__, "_dptorch_apply", _plainly)
        assert steps() == 2


class Changed(nn.Module):
    """A last layer of what `change` makes of its inputs."""

    def __init__(self, model: Model, change: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.change = model.last, lambda h: change(model, h)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.layer(self.change(h))
        return out


def _plainly(cls: Any, *args: Any, **kwargs: Any) -> Any:
    return types.MethodType(patches._plain_apply, cls)(*args, **kwargs)


class _Mixing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        return out - out.mean(0) if func is torch.ops.aten.tanh.default else out


class _MixingFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        return out - out.mean(0) if func is torch.tanh else out


class _MixingBackward(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        return out + out.mean(0) if func is torch.ops.aten.tanh_backward.default else out


def _under(mode: Callable[[], Any]) -> Any:
    def loss(m: Model, x: Tensor, y: Tensor) -> Tensor:
        with mode():
            out = m(x)
        return F.cross_entropy(out, y)

    return loss


@pytest.mark.parametrize("mode", [_Mixing, _MixingFunctions])
def test_a_mode_of_ones_own_around_the_model_is_refused(
    mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotCoveredError, match=rf"the mode {mode.__name__} .*trusted_reads"):
        steps_with(_under(mode), Model())
    with trusted_reads():  # a promise, which nobody checks
        assert steps_with(_under(mode), Model(), self_check=False) == 2
    assert steps_with(_under(lambda: FlopCounterMode(display=False)), Model()) == 2
    # Broken twin: nobody looks at the modes.
    monkeypatch.setattr(model_hooks, "refuse_modes", lambda where: None)
    monkeypatch.setattr(outputs, "refuse_modes", lambda where: None)
    assert steps_with(_under(mode), Model(), self_check=False) == 2


def test_a_mode_of_ones_own_around_the_backward_is_refused() -> None:
    model = make_model()
    engine = make_engine(model)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    for x, y in engine.loader(make_data()):
        loss = F.cross_entropy(model(x), y)
        with _MixingBackward(), pytest.raises(NotCoveredError, match="the mode _MixingBackward"):
            loss.backward()
        return


def test_private_rows_in_a_public_pass_are_warned_of() -> None:
    model = make_model()
    engine = make_engine(model)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    for x, y in engine.loader(make_data()):
        with engine.public():
            with torch.no_grad():
                model(x)  # looked at
            model(torch.randn(len(x), 5)).sum().backward()  # not private
            with pytest.warns(PrivacyWarning, match=r"rows of engine\.loader .*torch\.no_grad"):
                F.cross_entropy(model(x), y)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_frozen_table_that_lookups_rewrite_is_refused(kind: Any, rows: int) -> None:
    """Which rows of it are short shows what was looked up."""
    table = kind(20, 4, max_norm=0.5)
    table.weight.requires_grad_(False)
    model = Lambda(lambda m, ids: m.h(m.e(ids).flatten(1)), e=table, h=nn.LazyLinear(2))
    model(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(NotCoveredError, match="max_norm"), dptorch.record(model):
        model(torch.randint(0, 20, (rows, 3)))
