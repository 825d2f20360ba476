"""Tensors that constructors make of followed tensors are followed."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, tensor
from torch.autograd import Variable, forward_ad
from torch.utils.checkpoint import checkpoint

from dptorch.errors import ExamplesMixError, NotCoveredError, PrivacyError
from dptorch.tape.recording import batches, constructors, outputs, patches
from dptorch.tape.recording.read_numbers import ReadNumbers
from tests.engine.setup import make_model, steps_with
from tests.tape.zoo.base import Lambda

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Make = Callable[[Tensor], Tensor]


def _written(t: Tensor, alias: Callable[[Tensor], Tensor]) -> Tensor:
    """A plain tensor that `t` is written into through an alias of it."""
    made = torch.zeros(t.shape, dtype=t.dtype)
    alias(made).copy_(t)
    return made


MAKERS: dict[str, Make] = {
    "Variable": lambda t: Variable(t),
    "tensor": lambda t: torch.tensor(t),
    "tensor of another dtype": lambda t: torch.tensor(data=t, dtype=torch.float64).float(),
    "as_tensor": lambda t: torch.as_tensor(t, dtype=torch.float64).float(),
    "asarray": lambda t: torch.asarray(t, copy=True),
    "Tensor": lambda t: Tensor(t) if t.is_floating_point() else t * 1,
    "new_tensor": lambda t: torch.ones(2).new_tensor(t),
    "new": lambda t: torch.ones(2, dtype=t.dtype).new(t),
    "as_subclass": lambda t: t.as_subclass(Tensor),
    "make_subclass": lambda t: Tensor._make_subclass(Tensor, t.detach()),
    "set": lambda t: torch.empty(0, dtype=t.dtype).set_(t.detach()),
    "dlpack": lambda t: torch.from_dlpack(t),
    "bound before": lambda t: tensor(t),
    "data": lambda t: _written(t, lambda made: made.data),
    "detached": lambda t: _written(t, lambda made: made.detach()),
    "data of a part": lambda t: _written(t, lambda made: made.data[:]),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def standardised(make: Make) -> Any:
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = make(x)
        return F.cross_entropy(m((x - x.mean(0)) / x.std(0)), y)

    return loss


def weighted(make: Make, mixed: bool) -> Any:
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(m(make(x)), y, reduction="none")
        weights = make(each.detach())
        return (each * (weights / weights.mean() if mixed else weights / 2)).mean()

    return loss


def mixup(make: Make) -> Any:
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x, y = make(0.7 * x + 0.3 * x.flip(0)), copy.copy(y)
        return F.cross_entropy(m(x), y)

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_what_a_constructor_makes_of_followed_rows_is_followed(name: str) -> None:
    make = MAKERS[name]
    assert steps_with(weighted(make, mixed=False), make_model()) == 2
    for loss in (standardised(make), weighted(make, mixed=True), mixup(make)):
        with pytest.raises(ExamplesMixError):
            steps_with(loss, make_model())


@pytest.mark.parametrize("name", ["tensor", "as_tensor", "asarray"])
def test_without_the_replaced_names_mixing_is_not_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken twin: torch's own constructors return plain tensors."""
    steps_with(weighted(MAKERS[name], mixed=False), make_model())
    plain = getattr(torch, name).__wrapped__
    monkeypatch.setattr(torch, name, plain)
    assert steps_with(standardised(MAKERS[name]), make_model()) == 2


TWINS = (
    "Variable", "Tensor", "new_tensor", "new", "as_subclass", "make_subclass", "set", "dlpack", "data",
    "detached", "copy", "deepcopy",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_without_the_replaced_methods_mixing_is_not_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken twin: torch's own methods, and writes that are not looked for on shared memory."""
    steps_with(weighted(MAKERS[name], mixed=False), make_model())
    for module in (constructors, outputs):
        monkeypatch.setattr(module, "made_from", lambda source, made: made)
    monkeypatch.setattr(patches, "_followed_type", lambda args, kwargs: None)
    monkeypatch.setattr(outputs, "others_on_memory_of", lambda t: [])
    monkeypatch.setattr(batches, "_lines_of_columns", lambda a, b: [])
    assert steps_with(standardised(MAKERS[name]), make_model()) == 2


def test_writes_into_memory_of_one_tensor_look_for_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Looking through all objects takes a tenth of a second."""
    looks: list[Tensor] = []
    monkeypatch.setattr(outputs, "others_on_memory_of", lambda t: looks.append(t) or [])

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        kept = torch.zeros(x.shape)
        kept[2:].mul_(0.9)
        kept[:] = x
        other = torch.zeros(x.shape)
        other[1:].copy_(x[1:])
        return F.cross_entropy(m(x), y)

    assert steps_with(loss, make_model()) == 2
    assert not looks


@pytest.mark.parametrize("nested", [False, True])
def test_a_list_of_numbers_of_the_batch_is_followed(nested: bool) -> None:
    def listed(mixed: bool) -> Any:
        def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            rows = [[row[0]] if nested else row[0] for row in x]
            target = torch.tensor(rows).reshape(-1)
            if mixed:
                target = target - target.mean()
            return F.mse_loss(m(x)[:, 0], target)

        return loss

    assert steps_with(listed(False), make_model()) == 2
    with pytest.raises(ExamplesMixError):
        steps_with(listed(True), make_model())


def test_a_tensor_of_a_number_that_was_read_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(number: Callable[[Tensor], Any]) -> Any:
        return lambda m, x, y: F.cross_entropy(m(x) * torch.tensor(number(x)), y)

    for number in (
        lambda x: x.mean().item(),
        lambda x: [1 / x.std().item()],
        lambda x: [[1.0, x.std().item(), 2.0]],
    ):
        with pytest.raises(ExamplesMixError, match="a number that was read"):
            steps_with(scaled(number), make_model())
    assert steps_with(scaled(lambda x: 0.5), make_model()) == 2
    logged = lambda m, x, y: F.cross_entropy(m(x), y) + 0 * len(str(torch.tensor(x.mean().item())))
    assert steps_with(logged, make_model()) == 2
    # Broken twin: what a tensor is made of, and what it is filled with, is not looked up.
    monkeypatch.setattr(constructors, "_follow_numbers", lambda made, numbers: None)
    monkeypatch.setattr(ReadNumbers, "filled", lambda *_: None)
    assert steps_with(scaled(lambda x: [1 / x.std().item()]), make_model()) == 2


def test_functions_of_examples_under_torch_func_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for function in (torch.vmap(torch.sin), torch.func.grad(lambda t: t.sin().sum())):
        loss = lambda m, x, y, f=function: F.cross_entropy(m(x) * f(x)[:, :3], y)
        with pytest.raises(NotCoveredError, match=r"torch\.func"):
            steps_with(loss, make_model())
        assert function(torch.ones(2, 3)).shape == (2, 3)
    # Broken twin: what goes in is not looked at, and a mean over the examples comes out unseen.
    monkeypatch.setattr(constructors, "_refuse", lambda: None)
    mean = torch.vmap(lambda column: column.mean(), in_dims=1)
    assert steps_with(lambda m, x, y: F.cross_entropy(m(x) * mean(x)[:3], y), make_model()) == 2


def dual_sum(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        made = forward_ad.make_dual(torch.ones_like(x), x.detach().pow(2)).sum()
        return forward_ad.unpack_dual(made).tangent


#: Statistics of a batch that come out of torch.func as plain numbers, if what goes in is not looked at.
TRANSFORMED: dict[str, Callable[[Tensor], Tensor]] = {
    "jvp": lambda x: torch.func.jvp(lambda t: t.square().sum(), (x,), (torch.ones_like(x),))[1],
    "jvp along rows": lambda x: torch.func.jvp(torch.sum, (torch.ones(len(x), 5),), (x,))[1],
    "functionalize": lambda x: torch.func.functionalize(lambda t: t.square().sum())(x),
    "closure of vmap": lambda x: torch.vmap(lambda w: (x * w).square().sum())(torch.ones(3)).sum(),
    "shared by vmap": lambda x: torch.vmap(lambda i, t: t.abs().max() * i, in_dims=(0, None))(
        torch.arange(3.0), x
    ).sum(),
    "dual numbers": dual_sum,
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_statistics_by_transformed_functions_are_refused(name: str) -> None:
    """In the loss and in the model."""
    statistic = TRANSFORMED[name]
    beside = lambda m, x, y: F.cross_entropy(m(x) * statistic(x), y)
    inside = Lambda(lambda m, x: m.a(x) * statistic(x), a=nn.Linear(5, 3))
    ordinary = lambda m, x, y: F.cross_entropy(m(x), y)
    for loss, model in ((beside, make_model()), (ordinary, inside)):
        with pytest.raises(PrivacyError):
            steps_with(loss, model, self_check=False)
    assert torch.isfinite(statistic(torch.ones(2, 5)))


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: checkpoint(m, x, use_reentrant=False),
        lambda m, x: torch.func.jvp(m, (x.detach(),), (torch.ones(len(x), 5),))[1],
    ],
    ids=["checkpoint around the model", "jvp of the model"],
)
def test_a_model_that_others_run_is_refused_in_words(run: Any) -> None:
    loss = lambda m, x, y: run(m, x.clone().requires_grad_()).square().sum(1).mean()
    with pytest.raises(NotCoveredError, match=r"inside a backward pass|torch\.func"):
        steps_with(loss, make_model(), self_check=False, own=True)


def observed(x: Tensor) -> Tensor:
    low, high, scale = torch.zeros(1), torch.zeros(1), torch.ones(1)
    on, zero = torch.tensor([1]), torch.zeros(1, dtype=torch.int32)
    torch.fused_moving_avg_obs_fake_quant(x, on, on, low, high, scale, zero, 1.0, 0, 255, -1)
    return high[0]


#: Tensors that are made of a number that is a tensor.
MADE_OF_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "full": lambda v: torch.full((2,), v)[0],
    "full_like": lambda v: torch.full_like(torch.ones(2), v)[0],
    "new_full": lambda v: torch.ones(2).new_full((2,), v)[0],
    "linspace": lambda v: torch.linspace(0, v, 3)[-1],
    "logspace": lambda v: torch.logspace(0, v, 2)[-1],
    "arange": lambda v: torch.arange(0, v, v / 2)[-1],
    "scalar_tensor": lambda v: torch.scalar_tensor(v),
}


@pytest.mark.parametrize("name", MADE_OF_NUMBERS)
def test_tensors_made_of_numbers_that_are_tensors_are_followed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = lambda m, x, y: F.cross_entropy(m(x) * MADE_OF_NUMBERS[name](x.abs().max()), y)
    with pytest.raises(PrivacyError):
        steps_with(loss, make_model(), self_check=False)
    # Broken twin: what is made of a tensor is not followed.
    monkeypatch.setattr(constructors, "made_from", lambda source, made: made)
    assert steps_with(loss, make_model(), self_check=False) == 2


def test_statistics_that_a_kernel_writes_are_followed() -> None:
    with pytest.raises(PrivacyError):
        steps_with(
            lambda m, x, y: F.cross_entropy(m(x) * observed(x), y), make_model(), self_check=False
        )


def test_variables_inside_the_model_are_followed() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = Variable(x)
            out: Tensor = self.layer(h - h.mean(0))
            return out

    with pytest.raises(ExamplesMixError):
        steps_with(lambda m, x, y: F.cross_entropy(m(x), y), Centred())


def test_the_replaced_names_make_of_plain_data_what_they_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks = torch.distributions.Distribution._validate_args
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", checks)  # of compile
    steps_with(weighted(copy.copy, mixed=False), make_model())
    assert torch.equal(torch.tensor([[1, 2], [3, 4]]), torch.arange(1, 5).reshape(2, 2))
    assert torch.tensor(2.0, requires_grad=True).requires_grad
    assert torch.as_tensor(torch.ones(2), dtype=torch.int64).dtype == torch.int64
    assert torch.asarray(range(3)).tolist() == [0, 1, 2]
    assert type(Variable(torch.ones(2), requires_grad=True)) is Tensor
    assert isinstance(torch.ones(2), Variable)
    assert Tensor([1, 2]).tolist() == [1.0, 2.0]
    assert Tensor(2, 3).shape == (2, 3)
    assert torch.ones(2).new_tensor([1.0]).tolist() == torch.ones(2).new([1.0]).tolist() == [1.0]
    assert torch.empty(0).set_(torch.ones(2)).tolist() == [1.0, 1.0]

    def made(n: int) -> Tensor:
        return torch.tensor([1.0, 2.0]) + n

    def classes(n: int) -> Tensor:
        t = Tensor([1.0]).new_tensor([2.0])
        return torch.vmap(lambda v: v + n)(t)

    assert torch.equal(torch.jit.script(made)(1), torch.tensor([2.0, 3.0]))
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    assert torch.equal(compiled(1), torch.tensor([2.0, 3.0]))
    assert torch.compile(classes, backend="eager", fullgraph=True)(1).tolist() == [3.0]


@pytest.mark.slow
def test_a_device_context_still_rules_what_is_made() -> None:
    """Transformers asks so where a model is loaded to; the table of torch is made when first used. In a
    new process, which forks for the broken twin that does not ask for the table before."""
    code = """
        import os, torch
        from dptorch.tape.recording import constructors
        twin = os.fork() == 0
        if twin:
            constructors._device_constructors = lambda: None
        else:
            os.wait()
        constructors.follow_constructors()
        with torch.device("meta"):
            made = [torch.tensor([]), torch.as_tensor([1]), torch.asarray([1])]
        print("twin" if twin else "true", *{str(t.device) for t in made})
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    twin, true = found.stdout.splitlines()
    assert true == "true meta"
    assert twin.startswith("twin ")
    assert twin != "twin meta"


def test_lazy_modules_get_their_shapes() -> None:
    """A parameter without a shape takes ``data`` as torch's own class has it."""
    constructors.follow_constructors()
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3))
    assert model(torch.zeros(2, 2, 4, 4)).shape == (2, 3)
