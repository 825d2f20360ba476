"""Operands are bound by the names that torch gives them, whatever way they were passed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.loop import one_example_loop, relative_error
from tests.tape.zoo.base import Lambda
from torch import Tensor, nn

import dptorch
from dptorch.tape.propagation import FAMILIES
from dptorch.tape.provenance.calls import canonical_name
from dptorch.tape.provenance.schemas import bind
from dptorch.tape.recording.handlers import SPECIAL
from dptorch.tape.rules import LOSSES, RULES


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


X = torch.arange(18.0, dtype=torch.float64).view(2, 3, 3)
METHOD = torch.Tensor


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "names"),
    [
        (torch.baddbmm, (X,), {"batch2": X, "batch1": X}, ["input", "batch1", "batch2"]),
        (torch.addmm, (X[0], X[0]), {"mat2": X[0]}, ["input", "mat1", "mat2"]),
        (F.linear, (), {"weight": X, "input": X}, ["input", "weight"]),
        (torch.sum, (X,), {"axis": 1}, ["input", "dim"]),
        (METHOD.max, (X, 1), {}, ["input", "dim"]),
        (METHOD.max, (X, X), {}, ["input", "other"]),
        (METHOD.std, (X, False), {}, ["input", "unbiased"]),
        (METHOD.std, (X, 1), {}, ["input", "dim"]),
        (METHOD.permute, (X, 2, 0, 1), {}, ["input", "dims"]),
        (torch.swapaxes, (X, 0, 1), {}, ["input", "dim0", "dim1"]),
        (METHOD.swapaxes, (X,), {"axis1": 1, "axis0": 0}, ["input", "dim0", "dim1"]),
        (torch.moveaxis, (X, 0, 1), {}, ["input", "source", "destination"]),
        (METHOD.view, (X, 3, -1), {}, ["input", "size"]),
        (METHOD.scatter, (X, 1, X.long(), 1.0), {}, ["input", "dim", "index", "value"]),
        (METHOD.scatter, (X, 1, X.long(), X), {}, ["input", "dim", "index", "src"]),
        (METHOD.__rsub__, (X, 1), {}, ["input", "other"]),
        (torch.cosine_similarity, (), {"x2": X, "x1": X}, ["x1", "x2"]),
        (torch.ops.aten.addmm.default, (X[0], X[0], X[0]), {}, ["input", "mat1", "mat2"]),
    ],
)
def test_arguments_have_the_names_of_the_schema(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
) -> None:
    bound = bind(func, args, kwargs)
    assert list(bound) == names
    given = [*args, *kwargs.values()]
    assert all(any(v is g or v == tuple(args[1:]) for g in given) for v in bound.values())


CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "baddbmm": lambda m, x: torch.baddbmm(m.w.expand(len(x), 3, 3), batch2=x, batch1=x),
    "addmm": lambda m, x: torch.addmm(m.w[0], mat2=m.w, mat1=x[:, 0]),
    "bmm": lambda m, x: torch.bmm(input=x, mat2=(x * m.w)),
    "matmul": lambda m, x: torch.matmul(other=m.w, input=x),
    "linear": lambda m, x: F.linear(weight=m.w, input=x, bias=m.w[0]),
    "layer_norm": lambda m, x: F.layer_norm(weight=m.w[0], normalized_shape=(3,), input=x),
    "conv1d": lambda m, x: F.conv1d(weight=m.w[:, :, None], input=x, padding=1),
    "embedding": lambda m, x: F.embedding(weight=m.w, input=(x > 0).long()),
    "where": lambda m, x: torch.where(x > 0, input=x, other=m.w),
    "lerp": lambda m, x: torch.lerp(x, end=2 * x, weight=m.w),
    "cat": lambda m, x: torch.cat(dim=1, tensors=[x, m.w.expand(len(x), 3, 3)]),
    "softmax without a dimension": lambda m, x: F.softmax(x.flatten(1)) * m.w.flatten(),
    "log_softmax, none of three": lambda m, x: (
        F.log_softmax(x.transpose(0, 1)).transpose(0, 1) * m.w
    ),
    "softmax": lambda m, x: torch.softmax(dim=2, input=x * m.w),
    "gather": lambda m, x: torch.gather(dim=1, index=(x > 0).long(), input=x * m.w),
}


@pytest.mark.parametrize("name", CALLS)
def test_keyword_operands_give_the_same_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = Lambda(CALLS[name], w=torch.randn(3, 3))
    x = torch.randn(4, 3, 3)
    loss = lambda m, x: m(x).flatten(1).square().sum(1)
    expected = one_example_loop(model, [x], loss)
    with dptorch.record(model) as tape:
        loss(model, x).sum().backward()
    assert relative_error(tape.per_example_gradients()["w"], expected["w"]) <= 1e-12


def torch_names() -> set[str]:
    """Every name under which torch hands a function to a mode, and those of its core operators."""
    functions = {*torch.overrides.get_testing_overrides(), *torch.overrides.get_ignored_functions()}
    functions |= {torch.autograd.grad}
    names = {canonical_name(f) for f in functions}
    for space in (torch._C._VariableFunctions, torch._C._nn, F, Tensor, torch):
        for raw in dir(space):
            found = inspect.getattr_static(space, raw, None)
            both = [f for f in (found, getattr(space, raw, None)) if callable(f)]
            names |= {canonical_name(inspect.unwrap(f)) for f in both}  # as torch has it
            names.add(f".{raw}" if isinstance(found, property) or hasattr(found, "__get__") else "")
    operators = torch._C._dispatch_get_all_op_names()
    names |= {n.removeprefix("aten::").partition(".")[0].rstrip("_") for n in operators}
    return names


@pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="older torch lacks functions that are named"
)
def test_every_name_in_the_tables_is_one_that_torch_uses() -> None:
    """`logsigmoid` is dispatched as `log_sigmoid`: a name that torch does not use would be dead."""
    known = torch_names() | {"_sparse_mm", "numpy", ".data=", ".requires_grad=", "im2col"}
    for table in (FAMILIES, RULES, LOSSES, SPECIAL):
        unknown = {n for n in table if "::" not in n and "." not in n[1:]} - known
        assert not unknown, unknown


def test_a_name_that_torch_does_not_use_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "logsigmoid_", FAMILIES["add"])
    with pytest.raises(AssertionError, match="logsigmoid_"):
        test_every_name_in_the_tables_is_one_that_torch_uses()
