"""What is trained on private rows beside the private model may not come into it in a later step, also
where it is given nothing but noise by then."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import swa_utils

from dptorch.errors import ExamplesMixError, PrivacyError
from dptorch.tape.recording import backward, batches, outputs
from tests.engine.setup import SIZE, make_data, make_engine, make_model, steps_with

pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")

REFUSED = "a model without an engine trains|rows of an earlier batch|takes a statistic"
Learn = Callable[[Tensor], None]
Make = Callable[[], Tensor]


def noise() -> Tensor:
    return torch.randn(SIZE, 2)


def generator() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(2, 5)


def off(made: Tensor, x: Tensor) -> Tensor:
    """How far generated rows are off the data: a statistic of private rows."""
    return (made.mean(0) - x.mean(0)).square().sum()


def by_optimizer(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Any:
    def way() -> tuple[Learn, Make]:
        g = generator()
        optimizer = make(list(g.parameters()))

        def learn(x: Tensor) -> None:
            optimizer.zero_grad()
            off(g(noise()), x).backward()
            optimizer.step()

        return learn, lambda: g(noise())

    return way


def by_closure() -> tuple[Learn, Make]:
    g = generator()
    optimizer = torch.optim.LBFGS(g.parameters(), max_iter=2)

    def learn(x: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = off(g(noise()), x)
            loss.backward()
            return loss

        optimizer.step(closure)

    return learn, lambda: g(noise())


def by_hand(update: Callable[[Tensor, Tensor], None]) -> Any:
    """Gradients of autograd.grad, applied by the loop's own code."""

    def way() -> tuple[Learn, Make]:
        g = generator()

        def learn(x: Tensor) -> None:
            found = torch.autograd.grad(off(g(noise()), x), list(g.parameters()))
            with torch.no_grad():
                for p, grad in zip(g.parameters(), found, strict=True):
                    update(p, grad)

        return learn, lambda: g(noise())

    return way


def _in_place(p: Tensor, grad: Tensor) -> None:
    p -= 0.1 * grad


def _by_data(p: Tensor, grad: Tensor) -> None:
    p.data.add_(grad, alpha=-0.1)


def _by_new_data(p: Tensor, grad: Tensor) -> None:
    p.data = p.data - 0.1 * grad


def _by_copy(p: Tensor, grad: Tensor) -> None:
    p.copy_(p - 0.1 * grad)


def _foreach(p: Tensor, grad: Tensor) -> None:
    torch._foreach_add_([p], [grad], alpha=-0.1)


def _given(p: Tensor, grad: Tensor) -> None:
    p.grad = grad
    torch.optim.SGD([p], 0.1).step()


def by_leaf() -> tuple[Learn, Make]:
    w = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.SGD([w], 0.1)

    def learn(x: Tensor) -> None:
        optimizer.zero_grad()
        (w - x.mean(0)).square().sum().backward()
        optimizer.step()

    return learn, lambda: torch.randn(SIZE, 5) + w.detach()


def by_leaf_without_autograd() -> tuple[Learn, Make]:
    w = torch.zeros(5)

    def learn(x: Tensor) -> None:
        w.sub_(0.1 * (w - x.mean(0)))

    return learn, lambda: torch.randn(SIZE, 5) + w


def by_statistics() -> tuple[Learn, Make]:
    norm = nn.BatchNorm1d(5)

    def learn(x: Tensor) -> None:
        norm.train()(x)

    return learn, lambda: norm.eval()(torch.randn(SIZE, 5))


def through(passed_on: Callable[[nn.Linear], Callable[[Tensor], Tensor]]) -> Any:
    """Something made from the trained module after each step."""

    def way() -> tuple[Learn, Make]:
        g = generator()
        optimizer = torch.optim.SGD(g.parameters(), 0.1)
        made: list[Callable[[Tensor], Tensor]] = [g]

        def learn(x: Tensor) -> None:
            optimizer.zero_grad()
            off(g(noise()), x).backward()
            optimizer.step()
            made[0] = passed_on(g)

        return learn, lambda: made[0](noise())

    return way


def _called_functionally(g: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.func.functional_call(g, dict(g.named_parameters()), (z,))


def _loaded(g: nn.Linear) -> nn.Linear:
    other = generator()
    other.load_state_dict(g.state_dict())
    return other


def _assigned(g: nn.Linear) -> nn.Linear:
    other = generator()
    other.load_state_dict(g.state_dict(), assign=True)
    return other


def _averaged(g: nn.Linear) -> nn.Module:
    average = swa_utils.AveragedModel(g)
    average.update_parameters(g)
    average.update_parameters(g)
    return average


def _mixed_in(g: nn.Linear) -> nn.Linear:
    other = generator()
    with torch.no_grad():
        for a, p in zip(other.parameters(), g.parameters(), strict=True):
            a.mul_(0.9).add_(p, alpha=0.1)
    return other


def _mixed_into_data(g: nn.Linear) -> nn.Linear:
    other = generator()
    for a, p in zip(other.parameters(), g.parameters(), strict=True):
        a.data.lerp_(p.data, 0.1)
    return other


def _mixed_into_lists(g: nn.Linear) -> nn.Linear:
    other = generator()
    with torch.no_grad():
        torch._foreach_lerp_(list(other.parameters()), list(g.parameters()), 0.1)
    return other


def _on_vectors(g: nn.Linear) -> nn.Linear:
    other = generator()
    vector = nn.utils.parameters_to_vector(g.parameters())
    nn.utils.vector_to_parameters(vector.detach(), other.parameters())
    return other


WAYS: dict[str, Callable[[], tuple[Learn, Make]]] = {
    "sgd": by_optimizer(lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9)),
    "adam": by_optimizer(lambda ps: torch.optim.Adam(ps, 0.1)),
    "adamw, all at once": by_optimizer(lambda ps: torch.optim.AdamW(ps, 0.1, foreach=True)),
    "adam, fused": by_optimizer(lambda ps: torch.optim.Adam(ps, 0.1, fused=True)),
    "lbfgs": by_closure,
    "in place": by_hand(_in_place),
    "data": by_hand(_by_data),
    "new data": by_hand(_by_new_data),
    "copied": by_hand(_by_copy),
    "lists": by_hand(_foreach),
    "a gradient that is given": by_hand(_given),
    "a leaf": by_leaf,
    "a tensor without a gradient": by_leaf_without_autograd,
    "running statistics": by_statistics,
    "functional_call": through(_called_functionally),
    "deepcopy": through(copy.deepcopy),
    "load_state_dict": through(_loaded),
    "load_state_dict, assigned": through(_assigned),
    "AveragedModel": through(_averaged),
    "an average": through(_mixed_in),
    "an average of data": through(_mixed_into_data),
    "an average of lists": through(_mixed_into_lists),
    "vectors": through(_on_vectors),
    "halved": through(lambda g: copy.deepcopy(g).double().float()),
}


def _as_input(m: nn.Module, x: Tensor, y: Tensor, made: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y) + F.softplus(m(made)).mean()


def _as_target(m: nn.Module, x: Tensor, y: Tensor, made: Tensor) -> Tensor:
    return (m(x) - made[:, :3]).square().mean()


def _as_weight(m: nn.Module, x: Tensor, y: Tensor, made: Tensor) -> Tensor:
    return (F.cross_entropy(m(x), y, reduction="none") * made[:, 0]).mean()


def _added_to_input(m: nn.Module, x: Tensor, y: Tensor, made: Tensor) -> Tensor:
    return F.cross_entropy(m(x + made[:1]), y)


def steps(way: Callable[[], tuple[Learn, Make]], use: Any) -> int:
    learn, make = way()
    model = make_model()
    engine = make_engine(model, steps=2)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    while not engine.exhausted:
        for x, y in engine.loader(make_data()):
            with torch.no_grad():
                made = make()
            use(model, x, y, made).backward()
            optimizer.step()
            optimizer.zero_grad()
            learn(x)
    return engine.steps_done


@pytest.mark.parametrize("way", WAYS)
def test_what_was_trained_on_rows_is_refused_in_the_next_step(way: str) -> None:
    with pytest.raises((ExamplesMixError, PrivacyError), match=REFUSED):
        steps(WAYS[way], _as_input)


@pytest.mark.parametrize("use", [_as_target, _as_weight, _added_to_input])
def test_wherever_it_enters(use: Any) -> None:
    with pytest.raises(ExamplesMixError, match="a model without an engine trains"):
        steps(WAYS["sgd"], use)


def test_broken_twin_of_gradients_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "note_trained_beside", lambda loss, recording: [])
    assert steps(WAYS["sgd"], _as_input) == 2


def test_broken_twin_of_what_is_written_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_note_written_beside", lambda *_: None)
    assert steps(WAYS["running statistics"], _as_input) == 2


Keep = Callable[[Tensor, Callable[[Any], None]], Any]
HOOKS: dict[str, Keep] = {
    "register_hook": lambda w, keep: w.register_hook(keep),
    "register_post_accumulate_grad_hook": lambda w, keep: w.register_post_accumulate_grad_hook(
        lambda p: keep(p.grad)
    ),
    "register_multi_grad_hook": lambda w, keep: torch.autograd.graph.register_multi_grad_hook(
        [w], lambda grads: keep(grads[0])
    ),
}


def kept_by(hook: Keep) -> int:
    """Steps with the gradient of a statistic of the batch that a hook kept, in the same step."""
    model = make_model()
    engine = make_engine(model, steps=2)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    while not engine.exhausted:
        for x, y in engine.loader(make_data()):
            w = torch.zeros(5, requires_grad=True)
            kept: list[Tensor] = []
            handle = hook(w, kept.append)
            F.mse_loss(x @ w, x[:, 0]).backward()
            handle.remove()
            (F.cross_entropy(model(x), y, reduction="none") * (x @ kept[0]).abs()).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return engine.steps_done


@pytest.mark.parametrize("hook", HOOKS)
def test_what_hooks_keep_of_a_gradient_is_refused(hook: str) -> None:
    with pytest.raises(ExamplesMixError, match="a model without an engine trains"):
        kept_by(HOOKS[hook])


def test_broken_twin_of_what_hooks_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "marked_for_hooks", lambda *_: contextlib.nullcontext())
    assert kept_by(HOOKS["register_hook"]) == 2


def _frozen() -> tuple[Learn, Make]:
    g = generator().requires_grad_(False)
    return lambda x: None, lambda: g(noise())


def _on_public_data() -> tuple[Learn, Make]:
    g = generator()
    optimizer = torch.optim.Adam(g.parameters(), 0.1)

    def learn(x: Tensor) -> None:
        optimizer.zero_grad()
        off(g(noise()), torch.ones(4, 5)).backward()
        optimizer.step()

    return learn, lambda: g(noise())


def _statistics_of_public_data() -> tuple[Learn, Make]:
    norm = nn.BatchNorm1d(5)

    def learn(x: Tensor) -> None:
        norm.train()(torch.ones(4, 5))

    return learn, lambda: norm.eval()(torch.randn(SIZE, 5))


@pytest.mark.parametrize("way", [_frozen, _on_public_data, _statistics_of_public_data])
def test_what_no_private_row_has_trained_may_enter(way: Any) -> None:
    assert steps(way, _as_input) == 2


def test_a_generator_that_learns_through_the_private_model_may_enter() -> None:
    """Its gradients are functions of released parameters."""
    model, g = make_model(), generator()
    engine = make_engine(model, steps=3)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    of_g = torch.optim.Adam(g.parameters(), 0.1)
    while not engine.exhausted:
        for x, y in engine.loader(make_data()):
            with torch.no_grad():
                made = g(noise())
            (F.cross_entropy(model(x), y) + F.softplus(model(made)).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            F.softplus(-model(g(noise()))).mean().backward()
            of_g.step()
            of_g.zero_grad()
            optimizer.zero_grad()
    assert engine.steps_done == 3
    assert type(g.weight) is nn.Parameter


def gan(loss_of_g: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> int:
    """Steps of a discriminator whose generator learns by `loss_of_g` of it, generated rows and data."""
    model, g = make_model(), generator()
    engine = make_engine(model, steps=2)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    of_g = torch.optim.SGD(g.parameters(), 0.1)
    while not engine.exhausted:
        for x, _ in engine.loader(make_data()):
            made = g(noise())
            (F.softplus(-model(x)) + F.softplus(model(made.detach()))).mean().backward()
            optimizer.step()
            of_g.zero_grad()
            loss_of_g(model, made, x).mean().backward()
            of_g.step()
            optimizer.zero_grad()
    return engine.steps_done


SHOW_EXAMPLES = {
    "relativistic": lambda m, made, x: F.softplus(m(x) - m(made)),
    "of detached outputs": lambda m, made, x: F.softplus(m(x).detach() - m(made)),
    "weighed": lambda m, made, x: F.softplus(-m(made)) * m(x).detach().exp(),
    "matched": lambda m, made, x: (m(made)[:, :1] - x[:, :1]).square(),
}
SHOW_NONE = {
    "plain": lambda m, made, x: F.softplus(-m(made)),
    "labels": lambda m, made, x: F.binary_cross_entropy_with_logits(
        m(made), torch.ones(SIZE, 3), reduction="none"
    ),
    "added": lambda m, made, x: (F.softplus(-m(made)) + F.softplus(-m(x))) / 2,
    "of Wasserstein": lambda m, made, x: m(x).mean() - m(made).mean(),
    "squared": lambda m, made, x: (m(made) - 1).square(),
}


@pytest.mark.parametrize("loss", SHOW_EXAMPLES)
def test_a_generator_whose_gradient_shows_examples_is_refused(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExamplesMixError, match="a model without an engine trains"):
        gan(SHOW_EXAMPLES[loss])
    # Broken twin: whatever goes through the private model is taken for released.
    monkeypatch.setattr(outputs, "follow_generated", lambda *_: None)
    assert gan(SHOW_EXAMPLES[loss]) == 2


@pytest.mark.parametrize("loss", SHOW_NONE)
def test_a_generator_whose_gradient_shows_none_is_free(loss: str) -> None:
    assert gan(SHOW_NONE[loss]) == 2


def test_a_generator_whose_discriminator_sees_private_labels_is_refused() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.classes = make_model(), nn.Embedding(3, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out: Tensor = self.rows(x) * self.classes(y)
            return out

    def train() -> None:
        model, g = Conditional(), generator()
        engine = make_engine(model, steps=2)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        while not engine.exhausted:
            for _, y in engine.loader(make_data()):
                F.softplus(-model(g(noise()), y)).mean().backward()
                optimizer.step()
                optimizer.zero_grad()

    with pytest.raises(ExamplesMixError, match="a model without an engine trains"):
        train()


def _attacked(mixes: bool) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    torch.manual_seed(4)
    norm = nn.BatchNorm1d(5, track_running_stats=not mixes).eval()
    frozen = nn.Sequential(norm, nn.Linear(5, 3)).requires_grad_(False)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        near = x.detach().clone().requires_grad_()
        F.cross_entropy(frozen(near), y, reduction="sum").backward()
        assert near.grad is not None
        return F.cross_entropy(m(x + 0.1 * near.grad.sign()), y)

    return loss


def test_gradients_of_rows_by_a_loss_that_mixes_them_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An attack on a frozen model is each example's own, unless that model mixes the examples."""
    assert steps_with(_attacked(mixes=False), make_model(), self_check=False) == 2
    with pytest.raises(ExamplesMixError, match="BatchNorm in training mode"):
        steps_with(_attacked(mixes=True), make_model(), self_check=False)
    # Broken twin: the gradient of a row is that row's, whatever the loss was.
    monkeypatch.setattr(batches.Batch, "gradients", property(lambda _: None, lambda _, state: None))
    assert steps_with(_attacked(mixes=True), make_model(), self_check=False) == 2


Centres = Callable[[Tensor, Tensor], Tensor]


def looked_up() -> tuple[nn.Parameter, Centres]:
    c = nn.Parameter(torch.zeros(3, 3))
    return c, lambda out, y: (out - c[y]).square().sum(1).mean()


def embedded() -> tuple[nn.Parameter, Centres]:
    layer = nn.Embedding(3, 3)
    return layer.weight, lambda out, y: (out - layer(y)).square().sum(1).mean()


def selected() -> tuple[nn.Parameter, Centres]:
    c = nn.Parameter(torch.zeros(3, 3))
    return c, lambda out, y: (out * c.exp().index_select(0, y)).sum(1).mean()


def apart() -> tuple[nn.Parameter, Centres]:
    """A term of the loss that is computed from the labels alone, and added."""
    c = nn.Parameter(torch.zeros(3, 3))
    return c, lambda out, y: out.square().sum(1).mean() + c[y].square().sum(1).mean()


def centred(make: Callable[[], tuple[nn.Parameter, Centres]]) -> Any:
    parameter, distance = make()
    optimizer = torch.optim.SGD([parameter], 10.0)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        optimizer.step()
        optimizer.zero_grad()
        return distance(m(x), y)

    return loss


@pytest.mark.parametrize("make", [looked_up, embedded, selected, apart])
def test_a_loss_with_parameters_of_its_own_is_refused(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class centres that labels look up learn from all rows, and enter the loss of the next step."""
    with pytest.raises(PrivacyError, match="not followed"):
        steps_with(centred(make), make_model(), self_check=False)
    if make is not apart:
        # Broken twin: what labels look up is taken for rows of the batch, whatever it was made of.
        monkeypatch.setattr(outputs, "refuse_trained_beside", lambda *_: None)
        assert steps_with(centred(make), make_model(), self_check=False) == 2


def test_what_labels_look_up_in_constants_may_enter_a_loss() -> None:
    """Also where it is moved along a gradient of its own rows, as an attack moves inputs."""
    table = torch.randn(3, 3)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        target = table[y].requires_grad_()
        (g,) = torch.autograd.grad(target.square().sum(), target)
        return (m(x) - (target - 0.1 * g)).square().sum(1).mean()

    assert steps_with(loss, make_model(), self_check=False) == 2


def test_a_trained_module_stays_one() -> None:
    """Its parameters are ones, can be copied and saved, and are loaded as plain ones."""
    g = generator()
    optimizer = torch.optim.SGD(g.parameters(), 0.1)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        off(g(noise()), x).backward()
        optimizer.step()
        return F.cross_entropy(m(x), y)

    assert steps_with(loss, make_model(), self_check=False) == 2
    for made in (g, copy.deepcopy(g), pickle.loads(pickle.dumps(g))):
        assert [isinstance(p, nn.Parameter) for p in made.parameters()] == [True, True]
        torch.testing.assert_close(made.weight.detach().clone(), g.weight.detach().clone())
    assert type(pickle.loads(pickle.dumps(g)).weight) is nn.Parameter
