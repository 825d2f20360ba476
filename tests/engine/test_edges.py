"""What enters the loss is followed from the loader to the step: each edge, and its legitimate twin.

A refused program would let one record move a step by many times the clipping norm. The twin beside
it computes each example's loss from its own row, and runs.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dptorch
from dptorch.errors import ExamplesMixError, NotCoveredError, PrivacyError
from dptorch.tape.recording import tensor_states
from tests.engine.setup import make_engine, make_model, steps_with

N = 24
pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def data() -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(N, 5), torch.randint(0, 3, (N,)))


def steps_of(loss: Loss, model: nn.Module | None = None, *, own: bool = False, **plan: Any) -> int:
    """`steps_with`, on a small model unless one is given."""
    return steps_with(loss, model or make_model(), own=own, **plan)


def real(y: Tensor) -> Tensor:
    return y.float()


frozen = nn.Linear(5, 3).requires_grad_(False)


def _no_grad_keys(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        keys = m(x)
    return F.cross_entropy(m(x * 1.1) @ keys.T, torch.arange(len(x)))


def _no_grad_own_key(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        keys = m(x)
    return (m(x * 1.1) * keys).sum(1).mean()


def _hard(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(m(x), y, reduction="none")
    return (each * each.detach() / each.detach().max()).mean()


def _focal(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(m(x), y, reduction="none")
    return (each * (1 - torch.exp(-each.detach())) ** 2).mean()


def _weighted_backward(m: nn.Module, x: Tensor, y: Tensor) -> Any:
    each = F.cross_entropy(m(x), y, reduction="none")
    weights = each.detach() / each.detach().sum()

    class Backward:
        def backward(self) -> None:
            each.backward(weights)

    return Backward()


MIXED: dict[str, tuple[Loss, Loss]] = {
    "broadcast target": (
        lambda m, x, y: F.mse_loss(m(x)[:, :1], real(y)),
        lambda m, x, y: F.mse_loss(m(x)[:, :1], real(y)[:, None]),
    ),
    "keys of a detached output": (
        lambda m, x, y: F.cross_entropy(m(x) @ m(x).detach().T, torch.arange(len(x))),
        lambda m, x, y: F.mse_loss(m(x), frozen(x).detach()),
    ),
    "keys of a frozen tower": (
        lambda m, x, y: F.cross_entropy(m(x) @ frozen(x).T, torch.arange(len(x))),
        lambda m, x, y: (m(x) * frozen(x)).sum(1).mean(),
    ),
    "keys of a pass without gradients": (_no_grad_keys, _no_grad_own_key),
    "weights from detached losses": (_hard, _focal),
    "weights given to backward": (
        _weighted_backward,
        lambda m, x, y: F.cross_entropy(m(x), y, reduction="none"),
    ),
}
OF_THE_LOADER: dict[str, tuple[Loss, Loss]] = {
    "centred target": (
        lambda m, x, y: F.mse_loss(m(x)[:, 0], real(y) - real(y).mean()),
        lambda m, x, y: F.mse_loss(m(x)[:, 0], real(y) - 1.0),
    ),
    "divided by a sum of the mask": (
        lambda m, x, y: (F.cross_entropy(m(x), y, reduction="none") / (y > 0).sum()).sum(),
        lambda m, x, y: (F.cross_entropy(m(x), y, reduction="none") * (y > 0)).mean(),
    ),
    "mixup": (
        lambda m, x, y: F.cross_entropy(m(0.7 * x + 0.3 * x[torch.randperm(len(x))]), y),
        lambda m, x, y: F.cross_entropy(m(x + 0.1 * torch.randn_like(x)), y),
    ),
    "normalised by the batch": (
        lambda m, x, y: F.cross_entropy(m((x - x.mean(0)) / x.std(0)), y),
        lambda m, x, y: F.cross_entropy(m((x - 0.5) / 2.0), y),
    ),
    "class counts": (
        lambda m, x, y: F.cross_entropy(m(x) + torch.bincount(y, minlength=3).log1p(), y),
        lambda m, x, y: F.cross_entropy(m(x) + torch.tensor([0.1, 0.2, 0.3]), y),
    ),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("own", [False, True])
def test_values_of_other_examples_in_the_loss_are_refused(name: str, own: bool) -> None:
    mixing, legitimate = MIXED[name]
    with pytest.raises(ExamplesMixError, match=r"test_edges\.py, line \d+"):
        steps_of(mixing, own=own)
    assert steps_of(legitimate, own=own) == 2


@pytest.mark.parametrize("name", OF_THE_LOADER)
def test_what_the_loader_hands_out_is_followed(name: str) -> None:
    mixing, legitimate = OF_THE_LOADER[name]
    with pytest.raises(ExamplesMixError, match=r"test_edges\.py, line \d+"):
        steps_of(mixing)
    assert steps_of(legitimate) == 2


class Reads(nn.Module):
    """Scales what it computes if something is huge."""

    def __init__(self, test: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.test = nn.Linear(5, 3), test

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h * 1e-3 if self.test(h) else h


@pytest.mark.slow
@pytest.mark.parametrize(
    "test",
    [
        lambda h: h.abs().max() > 1e3,
        lambda h: (h.abs() > 1e3).any().item(),
        lambda h: int((h.abs() > 1e3).sum()) > 0,
        lambda h: not torch.equal(h, h.clamp(-1e3, 1e3)),
        lambda h: not torch.allclose(h, h.clamp(-1e3, 1e3)),
        lambda h: h.abs().max().item() > 1e3,
        lambda h: h.abs().amax().numpy() > 1e3,
        lambda h: torch.is_nonzero((h > 1e3).any()),
    ],
)
def test_statistics_read_in_the_forward_are_refused(test: Callable[[Tensor], Any]) -> None:
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x), y)

    with pytest.raises(ExamplesMixError, match=r"test_edges\.py, line \d+: .*trusted_reads"):
        steps_of(loss, Reads(test))

    def trusted(h: Tensor) -> bool:
        with dptorch.tape.trusted_reads():
            return bool((h.abs() > 1e30).any())

    assert steps_of(loss, Reads(trusted)) == 2


class Counts(nn.Module):
    """Lets the counts of one step steer the next, as whole numbers or as fractions."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layer, self.dtype = nn.Linear(5, 3), dtype
        self.counts: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.counts is not None:
            h = h * self.counts
        if self.dtype is not None:
            self.counts = torch.bincount(h.detach().argmax(1), minlength=3).to(self.dtype)
        return h


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_counts_of_an_earlier_step_are_refused(dtype: torch.dtype) -> None:
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x), y)

    with pytest.raises(PrivacyError):
        steps_of(loss, Counts(dtype), self_check=False)
    assert steps_of(loss, Counts(None), self_check=False) == 2


class Followed(nn.Module):
    """Runs code of the user in its backward."""

    def __init__(self, set_up: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.t, self.b, self.set_up = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), set_up

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.set_up(self, self.t(self.a(x))))


class Scale(torch.autograd.Function):
    mixes = True

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g / g.norm() if Scale.mixes else g * 0.5


scale = Scale.apply  # bound before any recording


def hooked(hook: Callable[[Tensor], Tensor | None]) -> Callable[[nn.Module, Tensor], Tensor]:
    def set_up(m: nn.Module, h: Tensor) -> Tensor:
        h.register_hook(hook)
        return h

    return set_up


def _in_place(g: Tensor) -> None:
    g.div_(g.norm())


def _node(m: nn.Module, h: Tensor) -> Tensor:
    h = h * 1
    assert h.grad_fn is not None
    h.grad_fn.register_prehook(lambda g: (g[0] / g[0].norm(),))
    return h


@pytest.mark.parametrize(
    "set_up",
    [
        hooked(lambda g: g / g.norm()),
        hooked(lambda g: g / g.norm().item()),
        hooked(_in_place),
        lambda m, h: scale(h),
        _node,
    ],
)
def test_code_of_the_backward_that_mixes_is_refused(set_up: Any) -> None:
    with pytest.raises(NotCoveredError if set_up is _node else ExamplesMixError):
        steps_of(lambda m, x, y: F.cross_entropy(m(x), y), Followed(set_up))


def test_code_of_the_backward_that_keeps_examples_apart_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Scale, "mixes", False)

    def set_up(m: nn.Module, h: Tensor) -> Tensor:
        h = hooked(lambda g: g * 0.5)(m, h)
        return hooked(lambda g: g / g.norm(dim=1, keepdim=True).clamp(min=1.0))(m, scale(h))

    assert steps_of(lambda m, x, y: F.cross_entropy(m(x), y), Followed(set_up)) == 2


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_module_hooks_are_followed_in_every_backward(mixes: bool, before: bool) -> None:
    def own(g: Tensor) -> Tensor:
        return g / g.norm() if mixes else 0.5 * g

    model = Followed(lambda m, h: h)
    if before:
        model.t.register_full_backward_pre_hook(lambda m, out: (own(out[0]),))
    else:
        model.t.register_full_backward_hook(lambda m, into, out: (own(into[0]),))

    def run() -> int:
        return steps_of(lambda m, x, y: F.cross_entropy(m(x), y), model, self_check=False)

    if mixes:
        with pytest.raises(ExamplesMixError, match="hook on Tanh"):
            run()
    else:
        assert run() == 2


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("vector", [False, True])
def test_factors_of_every_loss_are_compared(rows: int | None, vector: bool) -> None:
    model = nn.Linear(5, 3)
    engine = make_engine(model, sample_rate=0.5, steps=2)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))

    def train(factor: Callable[[], float]) -> None:
        for x, y in engine.loader(data(), max_physical_batch_size=rows):
            each = F.cross_entropy(model(x), y, reduction="none")
            ((each if vector else each.mean()) * factor()).backward()
            optimizer.step()
            optimizer.zero_grad()

    numbers = iter(range(1, 1000))
    with pytest.raises(PrivacyError, match="multiplied by"):
        train(lambda: 1.0 / next(numbers))
    engine.drop_batch()
    train(lambda: 1.0)


def test_rows_of_an_earlier_batch_are_refused() -> None:
    model = nn.Linear(5, 3)
    engine = make_engine(model, sample_rate=0.5, steps=2)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1)).zero_grad()
    batches = iter(engine.loader(data()))
    first, _ = next(batches)
    model(first)
    second, _ = next(batches)
    with pytest.raises(PrivacyError, match="earlier batch"):
        model(first)
    assert model(second).shape == (len(second), 3)


class Conditioned(nn.Module):
    """A model that takes a context beside each row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.context = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.rows(x) + self.context(context)


KEPT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "running mean": lambda old, x: 0.9 * old + 0.1 * x.mean(0).expand(len(x), -1),
    "the rows themselves": lambda old, x: x,
    "without a graph": lambda old, x: x.detach().clone() * 2,
    "a hidden state": lambda old, x: 0.9 * old + x,
}


def kept_as_argument(keep: Callable[[Tensor, Tensor], Tensor], **parts: Any) -> int:
    """Steps whose second argument is what was kept of the batch before."""
    model = Conditioned()
    engine = make_engine(model, steps=2)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    context: Tensor | None = None
    while not engine.exhausted:
        for x, y in engine.loader(data(), **parts):
            context = torch.zeros(len(x), 5) if context is None else context
            F.cross_entropy(model(x, context), y).backward()
            context = keep(context, x)
            optimizer.step()
            optimizer.zero_grad()
    return engine.steps_done


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("what", KEPT)
def test_what_is_kept_of_an_earlier_batch_is_no_argument(what: str, rows: int | None) -> None:
    with pytest.raises(ExamplesMixError, match="from an earlier batch of the loader"):
        kept_as_argument(KEPT[what], max_physical_batch_size=rows)


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_number_that_was_read_is_no_argument_in_rows(is_kept: bool) -> None:
    number = 1.0

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        nonlocal number
        before, number = number, float(x.max())
        filled = torch.ones(len(x), 5) * (before if is_kept else number)
        return F.cross_entropy(m(x, filled), y)

    with pytest.raises(ExamplesMixError, match="filled with a number that was read"):
        steps_of(loss, Conditioned(), self_check=False)


def test_what_holds_nothing_of_a_batch_is_an_argument() -> None:
    assert kept_as_argument(lambda old, x: torch.zeros(len(x), 5)) == 2


def test_broken_twin_of_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_states, "_KEPT", None)
    assert kept_as_argument(KEPT["running mean"]) == 2


def test_metrics_and_copies_of_a_batch_are_ordinary() -> None:
    """The user must not notice that a tensor is followed."""
    total = torch.zeros(())
    seen: list[Tensor] = []

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = m(x)
        value = F.cross_entropy(out, y)
        nonlocal total
        total = total + value.detach() * len(x) + (out.argmax(1) == y).float().mean()
        seen.append(out.detach().cpu())
        assert torch.cat(seen).numpy().shape[1] == 3
        assert len([int(v) for v in y]) == len(y.tolist()) == y.numpy().size
        file = io.BytesIO()
        torch.save({"y": y, "out": out.detach()}, file)
        file.seek(0)
        for other in (
            torch.load(file, weights_only=True)["y"],
            pickle.loads(pickle.dumps(y)),
        ):
            assert type(other) is Tensor
            assert torch.equal(other, y)
        assert torch.equal(copy.deepcopy(y), y)
        assert repr(y).startswith("tensor(")
        assert isinstance(y, Tensor)
        assert f"{value.detach():.2f}"
        return value

    assert steps_of(loss) == 2
    assert total.item() > 0


def test_parts_of_data_that_went_through_the_model_whole_are_batches() -> None:
    model = nn.Linear(5, 3)
    engine = make_engine(model, sample_rate=0.5, steps=6)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    x, y = data().tensors
    for chosen in (slice(None), torch.randperm(N)[:7], slice(3, 9), slice(4, 5)):
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    assert engine.steps_done == 4


def test_a_batch_may_be_put_together_of_old_and_new_rows() -> None:
    """As a replay buffer does. Inside a model, rows that nobody owns meet no parameter, as before."""
    model = nn.Linear(5, 3)
    engine = make_engine(model, sample_rate=0.5, steps=6)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    x, y = data().tensors
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    x, y = torch.cat([x[:4], torch.ones(2, 5)]), torch.cat([y[:4], y.new_zeros(2)])
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert engine.steps_done == 2

    class Joins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.cat([x, torch.ones(1, 5)]))

    twin = Joins()
    other = make_engine(twin, sample_rate=0.5, steps=1)
    other.attach(torch.optim.SGD(twin.parameters(), 0.1))
    with pytest.raises(PrivacyError):
        F.cross_entropy(twin(data().tensors[0]), torch.zeros(N + 1, dtype=torch.long)).backward()
